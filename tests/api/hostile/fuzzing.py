"""Sends hostile requests to an API, in this process or a running app, and judges the answers."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Protocol

import httpx2

from deployments.api.fields import Endpoint
from tests.api.documented import ApiDocument
from tests.api.hostile import broken_bodies, broken_files
from tests.api.hostile.broken_bodies import JSON, MULTIPART, Body
from tests.api.hostile.byte_api import Sent
from tests.api.hostile.lure_watch import Watch
from tests.mode_inputs import png

IMAGE_FIELDS = ("image", "image_reference", "input_reference", "input_references")

_SMALL_BYTES = 300_000


class ByteEndpoint(Protocol):
    """An API that takes requests as raw bytes."""

    @property
    def documented(self) -> ApiDocument:
        """Its OpenAPI document."""
        ...

    def exchange(self, sent: Sent) -> httpx2.Response:
        """Return the answer, checked to be safe."""
        ...

    def check_accepted(self) -> None:
        """Check the last accepted request."""
        ...


class Fuzz:
    """Sends hostile requests and counts the answers.

    Args:
        api: receives the requests.
        watch: reports access to the forbidden file and port.

    Attributes:
        statuses: status -> number of answers.
        accepted: names of files that were accepted.
    """

    def __init__(self, api: ByteEndpoint, watch: Watch) -> None:
        self.api, self.watch = api, watch
        self.statuses: Counter[int] = Counter()
        self.accepted: Counter[str] = Counter()

    def send(self, sent: Sent, what: object) -> int:
        """Send a request; return its status, checked to be harmless."""
        with self.watch.expect_no_access((what, sent)):
            answer = self.api.exchange(sent)
        self.api.documented.check(answer)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            self.api.check_accepted()
        return answer.status_code

    def send_all(self, bodies: Iterable[Body], path: str = Endpoint.VIDEOS) -> int:
        """Send requests one by one; return their number."""
        return sum(self.send(Sent.post(path, kind, body), what) > 0 for what, kind, body in bodies)

    def send_file(self, name: str, data: bytes, field: str, *, is_json: bool = False) -> int:
        """Send a request with a file; return its status."""
        kind, body = broken_files.make_body(data, field, f"{name}.mp4", is_json=is_json)
        status = self.send(Sent.post(Endpoint.VIDEOS, kind, body), (name, field))
        self.accepted[name] += status == 200
        return status

    def send_odd_values(self, rng: random.Random, num_values: int, endpoints: Iterable[Endpoint] = Endpoint) -> None:
        """Send each field with ``num_values`` values of any type."""
        for endpoint in endpoints:
            self.send_all(broken_bodies.iterate_odd_values(endpoint, rng, num_values), endpoint)

    def send_mutated(
        self, rng: random.Random, num_bodies: int, endpoints: Sequence[Endpoint] = tuple(Endpoint)
    ) -> None:
        """Send mutated forms, and half as many JSON bodies, in pieces."""
        paths = list(endpoints)
        good = broken_bodies.good_form(png())
        jsons = [b'{"prompt": "a", "size": "64x32"}']
        jsons += [body for _, _, body in select_small(broken_bodies.iterate_broken_json())][:20]
        for index in range(num_bodies):
            kind, body = (JSON, rng.choice(jsons)) if index % 3 == 2 else (MULTIPART, good)
            sent = Sent.post(rng.choice(paths), kind, broken_bodies.mutate(body, rng))
            self.send(broken_bodies.cut(sent, rng), f"number {index}")

    def send_damaged(
        self, rng: random.Random, files: Mapping[str, bytes], fields: Sequence[str], num_files: int
    ) -> None:
        """Send damaged versions of some of these files."""
        for index in range(num_files):
            name, data = broken_files.damage_one(files, rng)
            self.send_file(f"{name} {index}", data, rng.choice(fields), is_json=rng.random() < 0.5)


def select_small(bodies: Iterable[Body]) -> Iterator[Body]:
    """Select the small requests."""
    return (it for it in bodies if len(it[2]) < _SMALL_BYTES)


def select_large() -> Iterator[Body]:
    """Select the large forms and JSON bodies."""
    bodies = itertools.chain(broken_bodies.iterate_broken_forms(), broken_bodies.iterate_broken_json())
    return (it for it in bodies if len(it[2]) >= _SMALL_BYTES)
