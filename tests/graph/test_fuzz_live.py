"""Hostile bodies and files, and cases of the OpenAPI document, sent to a running app over sockets.

Ranks are held, so that accepted jobs wait and are deleted; other tests run such jobs.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import pytest
from schemathesis.generation import GenerationMode

from cluster.events import StepDone
from cosmos3_core.request import GenerationRequest
from deployments.api.field_types import MEDIA
from deployments.api.fields import Endpoint
from tests.api.fake_service import UNKNOWN
from tests.api.generated_cases import CaseSender, iterate_bounds
from tests.api.hostile import broken_bodies, broken_files
from tests.api.hostile.byte_api import Sent
from tests.api.hostile.fuzzing import IMAGE_FIELDS, Fuzz, select_large, select_small
from tests.api.hostile.lure_watch import Watch
from tests.api.hostile.safe_answers import ForbiddenWords
from tests.api.process_memory import MIB, ProcessMemory
from tests.graph.raw_http import LiveApi
from tests.graph.test_jobs import replica_pids

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]

DEADLINE_S = 300.0
SMALL: dict[str, Any] = {"prompt": "a car", "num_frames": 5, "size": "32x32", "num_inference_steps": 2}
_MAX_BODY_BYTES = 16 * MIB
# Operations that answer only when the result exists.
_WAITING = (f"POST {Endpoint.SYNC}", f"POST {Endpoint.IMAGES}")


@dataclass
class LiveJobs:
    """Jobs of a running app that cases can be about.

    Attributes:
        http: client of the app.
        ids: kind -> id.
        queued: id of a job that is or was queued.
    """

    http: httpx2.Client
    ids: dict[str, str] = field(default_factory=dict)
    queued: str = UNKNOWN

    @property
    def kinds(self) -> tuple[str, ...]:
        return (*self.ids, "queued", "unknown")

    def make(self, **fields: Any) -> str:
        """Create a job; return its id."""
        answer = self.http.post("/v1/videos", json={**SMALL, **fields})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["id"])

    def status(self, job_id: str) -> str:
        return str(self.http.get(f"/v1/videos/{job_id}").json().get("status"))

    def wait(self, job_id: str, *statuses: str) -> None:
        deadline_s = time.monotonic() + DEADLINE_S
        while (now := self.status(job_id)) not in statuses:
            assert time.monotonic() < deadline_s, now
            time.sleep(0.1)

    def find_id(self, kind: str) -> str:
        """Return the id of a job of this kind; queued ones are replaced when gone."""
        if kind != "queued":
            return self.ids.get(kind, UNKNOWN)
        if self.status(self.queued) != "queued":
            self.queued = self.make()
        return self.queued


@dataclass
class HeldApp:
    """An app whose rank is held, with a running job in each lane."""

    app: Any
    jobs: LiveJobs
    rank_pid: int
    running: tuple[str, str]
    is_held: bool = True

    def release(self) -> None:
        if self.is_held:
            os.kill(self.rank_pid, signal.SIGCONT)
            self.is_held = False


@pytest.fixture(scope="module")
def held(start_app: Callable[..., Any]) -> Iterator[HeldApp]:
    app = start_app(
        "fuzz",
        jobs__max_running_videos=1,
        jobs__max_running_images=1,
        transformer__first_step_timeout_s=3000,
        http__max_body_bytes=_MAX_BODY_BYTES,
        http__max_bodies_bytes=2 * _MAX_BODY_BYTES,
    )
    request = GenerationRequest(prompt="a car", num_frames=5, height=32, width=32, num_inference_steps=2)
    (rank_pid,) = {it.pid for it in app.client.stream(request) if isinstance(it, StepDone)}
    with httpx2.Client(base_url=app.url, timeout=DEADLINE_S) as http:
        jobs = LiveJobs(http)
        ids = {"completed": jobs.make(), "image": jobs.make(num_frames=1, mode="text_to_image", output="png")}
        for job_id in ids.values():
            jobs.wait(job_id, "completed")
        jobs.ids |= ids
        os.kill(rank_pid, signal.SIGSTOP)
        running = (jobs.make(), jobs.make(num_frames=1, mode="text_to_image"))
        held = HeldApp(app, jobs, rank_pid, running)
        try:
            for job_id in running:
                jobs.wait(job_id, "in_progress")
            jobs.ids["cancelled"] = jobs.make()
            http.post(f"/v1/videos/{jobs.ids['cancelled']}/cancel")
            yield held
        finally:
            held.release()


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    watch = Watch(tmp_path_factory.mktemp("lure"), watches_network=False)
    yield watch
    watch.close()


@pytest.fixture(scope="module")
def api(held: HeldApp, watch: Watch, media: Path) -> LiveApi:
    return LiveApi(held.app.url, ForbiddenWords.of(media, Path(held.app.config.checkpoint), canary=watch.canary))


@pytest.fixture
def fuzz(api: LiveApi, watch: Watch) -> Fuzz:
    return Fuzz(api, watch)


@pytest.fixture
def check_memory(held: HeldApp) -> Callable[[str], None]:
    """Return a check, called with the number of requests, that the serving processes have not grown."""
    names = ("Ingress", "Director")
    memories = {name: ProcessMemory(*replica_pids("fuzz", name)) for name in names}

    def check(what: str) -> None:
        for name, memory in memories.items():
            memory.check(f"{name}, {what}", max_left_bytes=160 * MIB, max_peak_bytes=16 * _MAX_BODY_BYTES)

    return check


def test_generated_cases_are_answered_as_documented(
    held: HeldApp, api: LiveApi, check_memory: Callable[[str], None]
) -> None:
    sender = CaseSender.of(api, api.documented.document, held.jobs)
    for label, operation in sender.operations.items():
        is_large = label.startswith("POST /v1/videos") or label in _WAITING
        cases = itertools.islice(iterate_bounds(operation), 0, None, 60 if is_large and "{" not in label else 1)
        for case in cases:
            is_positive = case.meta.generation.mode is GenerationMode.POSITIVE
            if is_positive and label in _WAITING:
                continue
            kinds = ("queued", "unknown") if label.startswith("DELETE") or "cancel" in label else held.jobs.kinds
            for kind in kinds if is_positive and "{video_id}" in label else kinds[:1]:
                sender.send(case, kind)
    print(f"{sender.num_sent} cases")
    assert sender.num_sent > 300
    check_memory("cases of the document")


def test_hostile_bodies_are_answered_safely(fuzz: Fuzz, check_memory: Callable[[str], None]) -> None:
    fuzz.send_all(itertools.islice(select_small(broken_bodies.iterate_broken_forms()), 0, None, 6))
    fuzz.send_all(select_small(broken_bodies.iterate_broken_json()))
    fuzz.send_all(itertools.islice(select_large(), 0, None, 3))
    fuzz.send_odd_values(random.Random(0), 1, [Endpoint.VIDEOS])
    fuzz.send_mutated(random.Random(0), 500, [Endpoint.VIDEOS])
    print(dict(fuzz.statuses))
    check_memory("bodies")


def test_hostile_files_are_answered_safely(fuzz: Fuzz, check_memory: Callable[[str], None]) -> None:
    rng = random.Random(0)
    fuzz.send_damaged(rng, broken_files.stills(), IMAGE_FIELDS, 200)
    fuzz.send_damaged(rng, broken_files.clips(), ["video"], 20)
    good = {**broken_files.stills(), **broken_files.clips(), **broken_files.non_pictures()}
    for name, data in {**good, **broken_files.bombs(5), **fuzz.watch.lures.files()}.items():
        fuzz.send_file(name, data, rng.choice(MEDIA), is_json=rng.random() < 0.5)
    for text in fuzz.watch.lures.texts():
        body = json.dumps({"prompt": "a", rng.choice(MEDIA): text}).encode()
        assert fuzz.send(Sent.post(Endpoint.VIDEOS, broken_bodies.JSON, body), text) == 422
    print(dict(fuzz.statuses))
    assert fuzz.statuses[200] > 50
    check_memory("files")


def test_invalid_content_lengths_are_answered_safely(held: HeldApp, api: LiveApi) -> None:
    """The HTTP server refuses, or reads as many bytes as announced."""
    for sent in broken_bodies.iterate_bad_lengths(broken_bodies.form(broken_bodies.part(b"prompt", b"a"))):
        answer = api.call(sent)
        assert answer.status_code in (200, 400, 413, 422), (sent, answer.text)
        assert b"Traceback" not in answer.content
        if answer.status_code == 200:
            api.delete(answer)


def test_the_app_serves_after_hostile_requests(held: HeldApp) -> None:
    held.release()
    for job_id in held.running:
        held.jobs.wait(job_id, "completed")
    last = held.jobs.make()
    held.jobs.wait(last, "completed")
