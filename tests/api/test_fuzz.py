"""Bodies and files of ill will: each is accepted or refused in one shape, says nothing of the inside, and is no burden.

In `make test` a part of the corpus, always the same; in the long tier all of it, and more drawn with a seed that is
printed.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import random
import re
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import av
import PIL.Image
import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.media.kinds import STILL, kind_of
from deployments.api.fields import MEDIA, Endpoint
from tests.api import hostile_bodies, hostile_media
from tests.api.accepting_api import AcceptingApi, Sent
from tests.api.hostile_bodies import JSON, MULTIPART, Body, form, part
from tests.api.known_jobs import png
from tests.api.lure_watch import Watch

SEED = "COSMOS3_TEST_SEED"
"""The variable that repeats a run of the long tier."""

IMAGE_FIELDS = ("image", "image_reference", "input_reference", "input_references")

_MIB = 2**20
_MAX_BODY_BYTES = 16 * _MIB
_SMALL_BYTES = 300_000
# Of a process: what a body of the largest size may take while it is read, and what may be left of all of them.
_PEAK_BYTES = 16 * _MAX_BODY_BYTES
_LEFT_BYTES = 64 * _MIB


class Memory:
    """Of this process, from now on."""

    def __init__(self) -> None:
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self._begun = self._now()

    @staticmethod
    def _now() -> dict[str, int]:
        lines = (line.partition(":") for line in Path("/proc/self/status").read_text().splitlines())
        return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in ("RssAnon", "VmHWM")}

    def check(self, what: str) -> None:
        """It is bounded, while bodies are read and when they are gone."""
        gc.collect()
        now = self._now()
        left, peak = (now[name] - self._begun[name] for name in ("RssAnon", "VmHWM"))
        print(f"{what}: {left / _MIB:.1f} MiB more than before, {peak / _MIB:.1f} MiB more at the peak")
        assert left < _LEFT_BYTES
        assert peak < _PEAK_BYTES


class Fuzz:
    """Sends what is to be sent, and judges the answers.

    Args:
        api: that is asked.
        watch: on what nobody may touch.

    Attributes:
        statuses: how many answers of each.
        accepted: names of files that were accepted.
    """

    def __init__(self, api: AcceptingApi, watch: Watch) -> None:
        self.api, self.watch = api, watch
        self.statuses: Counter[int] = Counter()
        self.accepted: Counter[str] = Counter()

    def send(self, sent: Sent, what: object) -> int:
        """The status of a request, once it was found harmless."""
        with self.watch.untouched((what, sent)):
            answer = self.api.answer(sent)
        self.api.documented.check(answer)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            self._check_accepted()
        if len(self.api.director.asked) > 100:
            self.api.tidy()
        return answer.status_code

    def send_all(self, bodies: Iterable[Body], path: str = Endpoint.VIDEOS) -> int:
        """Send them one by one; returns how many they were."""
        return sum(self.send(Sent.post(path, kind, body), what) > 0 for what, kind, body in bodies)

    def send_file(self, name: str, data: bytes, field: str, *, is_json: bool = False) -> int:
        """The status of a request with a file."""
        kind, body = hostile_media.body_with(data, field, f"{name}.mp4", is_json=is_json)
        status = self.send(Sent.post(Endpoint.VIDEOS, kind, body), (name, field))
        self.accepted[name] += status == 200
        return status

    def _check_accepted(self) -> None:
        """What was accepted can be read, by those who did not check it."""
        request, _ = self.api.director.asked[-1]
        for data in (request.image, request.video):
            if data is None:
                continue
            assert isinstance(data, bytes)
            if kind_of(data).category == STILL:
                with PIL.Image.open(io.BytesIO(data)) as picture:
                    assert min(picture.size) > 0
            else:
                with av.open(io.BytesIO(data), "r", options={"protocol_whitelist": "none"}) as clip:
                    assert next(clip.decode(video=0)).width > 0


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory: pytest.TempPathFactory, empty_database: Path, layout: CheckpointLayout) -> Iterator[Fuzz]:
    directory = tmp_path_factory.mktemp("fuzz")
    watch = Watch(directory)
    bounds = {"max_body_bytes": _MAX_BODY_BYTES, "max_bodies_bytes": 2 * _MAX_BODY_BYTES}
    api = AcceptingApi(directory, empty_database, layout, canary=watch.canary, http=bounds)
    yield Fuzz(api, watch)
    api.close()
    watch.close()


@pytest.fixture
def memory(fuzz: Fuzz) -> Memory:
    fuzz.api.tidy()
    return Memory()


def test_the_watch_sees_who_touches(fuzz: Fuzz) -> None:
    watch, (host, _, port) = fuzz.watch, fuzz.watch.lures.address.partition(":")
    with pytest.raises(AssertionError), watch.untouched("a file"):
        Path(watch.lures.path).read_bytes()
    assert not watch.touched(), "it was told once"
    with pytest.raises(av.FFmpegError):
        av.open(watch.lures.path)
    assert watch.touched(), "by FFmpeg, which asks nobody"
    with pytest.raises(AssertionError), watch.untouched("a port"), socket.create_connection((host, int(port))):
        pass
    with pytest.raises(av.FFmpegError):
        av.open(f"tcp://{watch.lures.address}", timeout=0.1)
    assert watch.touched()


def small(bodies: Iterable[Body]) -> Iterator[Body]:
    return (it for it in bodies if len(it[2]) < _SMALL_BYTES)


def large() -> Iterator[Body]:
    bodies = itertools.chain(hostile_bodies.broken_forms(), hostile_bodies.broken_json())
    return (it for it in bodies if len(it[2]) >= _SMALL_BYTES)


def test_broken_forms(fuzz: Fuzz, memory: Memory) -> None:
    num_forms = fuzz.send_all(small(hostile_bodies.broken_forms()))
    memory.check(f"{num_forms} forms")


def test_broken_lengths(fuzz: Fuzz) -> None:
    for sent in hostile_bodies.lengths(form(part(b"prompt", b"a"))):
        fuzz.send(sent, "length")


def test_broken_json(fuzz: Fuzz, memory: Memory) -> None:
    num_bodies = fuzz.send_all(small(hostile_bodies.broken_json()))
    memory.check(f"{num_bodies} JSON bodies")


def test_large_bodies(fuzz: Fuzz, memory: Memory) -> None:
    """Some of ten megabytes, and of very many parts, fields and values."""
    fuzz.send_all(itertools.islice(large(), 0, None, 4))
    memory.check("some large bodies")


def send_odd_values(fuzz: Fuzz, rng: random.Random, num_values: int) -> None:
    for endpoint in Endpoint:
        fuzz.send_all(hostile_bodies.odd_values(endpoint, rng, num_values), endpoint)


def send_mutated(fuzz: Fuzz, rng: random.Random, num_bodies: int) -> None:
    """Forms, and half as much JSON, with accidents, that come in pieces."""
    good = hostile_bodies.good_form(png())
    jsons = [b'{"prompt": "a", "size": "64x32"}']
    jsons += [body for _, _, body in small(hostile_bodies.broken_json())][:20]
    for index in range(num_bodies):
        kind, body = (JSON, rng.choice(jsons)) if index % 3 == 2 else (MULTIPART, good)
        sent = Sent.post(rng.choice(tuple(Endpoint)), kind, hostile_bodies.mutated(body, rng))
        fuzz.send(hostile_bodies.in_pieces(sent, rng), f"number {index}")


def send_damaged(fuzz: Fuzz, rng: random.Random, files: Mapping[str, bytes], fields: Sequence[str], count: int) -> None:
    for index in range(count):
        name, data = hostile_media.damaged(files, rng)
        fuzz.send_file(f"{name} {index}", data, rng.choice(fields), is_json=rng.random() < 0.5)


def test_odd_values(fuzz: Fuzz) -> None:
    send_odd_values(fuzz, random.Random(0), 1)


def test_mutated_bodies(fuzz: Fuzz) -> None:
    send_mutated(fuzz, random.Random(0), 200)


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize("field", ["image", "input_reference"])
def test_whole_pictures_are_accepted(field: str, is_json: bool, fuzz: Fuzz) -> None:
    for name, data in hostile_media.stills().items():
        assert fuzz.send_file(name, data, field, is_json=is_json) == 200, name


def test_whole_clips_are_accepted(fuzz: Fuzz) -> None:
    clips = hostile_media.clips()
    assert fuzz.send_file("mp4", clips["mp4"], "video") == 200
    assert fuzz.send_file("mkv", clips["mkv"], "video", is_json=True) == 200


def test_damaged_pictures(fuzz: Fuzz, memory: Memory) -> None:
    fuzz.accepted.clear()
    send_damaged(fuzz, random.Random(0), hostile_media.stills(), IMAGE_FIELDS, 60)
    memory.check(f"60 pictures, {fuzz.accepted.total()} of which have a header that can be read")
    assert 5 < fuzz.accepted.total() < 55


def test_damaged_clips(fuzz: Fuzz) -> None:
    send_damaged(fuzz, random.Random(0), hostile_media.clips(), ["video"], 4)


def test_bombs(fuzz: Fuzz, memory: Memory) -> None:
    for name, data in hostile_media.bombs(1).items():
        fuzz.send_file(name, data, "input_reference")
    memory.check("bombs")


def test_files_that_are_neither(fuzz: Fuzz) -> None:
    for name, data in hostile_media.others().items():
        for is_json in (False, True):
            assert fuzz.send_file(name, data, "input_reference", is_json=is_json) == 422, name


def test_texts_in_place_of_files_lead_nowhere(fuzz: Fuzz) -> None:
    for text, field in zip(fuzz.watch.lures.texts(), itertools.cycle(("image", "input_reference")), strict=False):
        for value in (text, {"image_url": text}, [{"image_url": {"url": text}}]):
            body = json.dumps({"prompt": "a", field: value}).encode()
            assert fuzz.send(Sent.post(Endpoint.VIDEOS, JSON, body), text) == 422
        body = form(part(b"prompt", b"a"), part(b"video", text.encode()))
        assert fuzz.send(Sent.post(Endpoint.VIDEOS, MULTIPART, body), text) == 422


def test_files_that_refer_to_others_lead_nowhere(fuzz: Fuzz) -> None:
    lures = fuzz.watch.lures.files()
    accepted = {name for name, data in lures.items() if fuzz.send_file(name, data, "input_reference") == 200}
    # Those have a picture or a clip in front, and are taken for that.
    assert accepted <= {name for name in lures if re.match("png|jpeg|avi|mp4", name)}
    assert fuzz.send_file("m3u8", lures["m3u8"], "video") == 422, "the reader of clips does not take it either"


# The long tier


@pytest.fixture
def rng() -> random.Random:
    seed = int(os.environ.get(SEED, random.SystemRandom().randrange(2**32)))
    print(f"{SEED}={seed} repeats this")
    return random.Random(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_large_bodies(fuzz: Fuzz, memory: Memory) -> None:
    num_bodies = sum(fuzz.send_all(large(), endpoint) for endpoint in Endpoint)
    memory.check(f"{num_bodies} large bodies")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_odd_values(fuzz: Fuzz, memory: Memory, rng: random.Random) -> None:
    send_odd_values(fuzz, rng, 12)
    memory.check("odd values")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutated_bodies(fuzz: Fuzz, memory: Memory, rng: random.Random) -> None:
    send_mutated(fuzz, rng, 10_000)
    memory.check("10000 bodies")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_pictures(fuzz: Fuzz, memory: Memory, rng: random.Random) -> None:
    files = {**hostile_media.stills(), **{name: it for name, it in hostile_media.clips().items() if "animated" in name}}
    send_damaged(fuzz, rng, files, IMAGE_FIELDS, 5000)
    memory.check("5000 pictures")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_clips(fuzz: Fuzz, memory: Memory, rng: random.Random) -> None:
    send_damaged(fuzz, rng, hostile_media.clips(), ["video", "video_reference", "input_reference"], 200)
    memory.check("200 clips")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_file_in_every_field(fuzz: Fuzz, memory: Memory) -> None:
    lures = fuzz.watch.lures.files()
    files = {
        **lures,
        **hostile_media.bombs(10),
        **hostile_media.others(),
        **hostile_media.stills(),
        **hostile_media.clips(),
    }
    for name, data in files.items():
        for field in MEDIA:
            for is_json in (False, True):
                fuzz.send_file(name, data, field, is_json=is_json)
    memory.check(f"{len(files)} files in every field")
