"""Hostile bodies and files: each is accepted or refused in one shape, reveals no internals, and costs bounded memory.

`make test` sends a fixed part of the corpus; the long tier all of it, and more drawn with a printed seed.
"""

from __future__ import annotations

import gc
import io
import itertools
import json
import random
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import av
import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.api.field_types import MEDIA
from deployments.api.fields import Endpoint
from tests.api.hostile import broken_bodies, broken_files
from tests.api.hostile.broken_bodies import JSON, MULTIPART, form, part
from tests.api.hostile.byte_api import ByteApi, Sent
from tests.api.hostile.fuzzing import IMAGE_FIELDS, Fuzz, select_large, select_small
from tests.api.hostile.lure_watch import Watch
from tests.api.process_memory import MIB, ProcessMemory

_MAX_BODY_BYTES = 16 * MIB
# Bounds for this process: what one body of the largest size may take while it is read, and what all may leave, which
# is what threads' allocators keep for the next ones: 90 MiB after 140 large bodies, and no more after 200.
_PEAK_BYTES = 16 * _MAX_BODY_BYTES
_LEFT_BYTES = 160 * MIB


# Each one starts a process that reads it.
_SLOW = (
    *("an mp4 of boxes", "an mp4 with a huge box", "mov of references"),
    *("mkv that begins with a playlist", "ts that begins with a playlist"),
)

_ANY = {"allowed_extensions": "ALL", "extension_picky": "0"}

Check = Callable[[str], None]


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    watch = Watch(tmp_path_factory.mktemp("lure"))
    yield watch
    watch.close()


@pytest.fixture(scope="module")
def api(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, layout: CheckpointLayout, watch: Watch
) -> Iterator[ByteApi]:
    bounds = {"max_body_bytes": _MAX_BODY_BYTES, "max_bodies_bytes": 2 * _MAX_BODY_BYTES}
    api = ByteApi(tmp_path_factory.mktemp("fuzz"), empty_database, layout, canary=watch.canary, http=bounds)
    yield api
    api.close()


@pytest.fixture
def fuzz(api: ByteApi, watch: Watch) -> Fuzz:
    return Fuzz(api, watch)


@pytest.fixture
def check_memory(api: ByteApi) -> Check:
    """Return a check, called with the number of requests, that memory taken and left is bounded."""
    api.delete_jobs()
    gc.collect()
    memory = ProcessMemory()

    def check(what: str) -> None:
        api.delete_jobs()
        gc.collect()
        memory.check(what, max_left_bytes=_LEFT_BYTES, max_peak_bytes=_PEAK_BYTES)

    return check


def test_the_watch_reports_every_access(watch: Watch) -> None:
    host, _, port = watch.lures.address.partition(":")
    with pytest.raises(AssertionError), watch.expect_no_access("a file"):
        Path(watch.lures.path).read_bytes()
    assert not watch.was_accessed(), "it was reported once"
    with pytest.raises(av.FFmpegError):
        av.open(watch.lures.path)
    assert watch.was_accessed(), "the watch notices what FFmpeg opens by itself"
    with pytest.raises(AssertionError), watch.expect_no_access("a port"), socket.create_connection((host, int(port))):
        pass
    with pytest.raises(av.FFmpegError):
        av.open(f"tcp://{watch.lures.address}", timeout=0.1)
    assert watch.was_accessed()


@pytest.mark.parametrize(("name", "demuxer", "options"), [("m3u8", "hls", _ANY), ("ffconcat", "concat", {"safe": "0"})])
def test_a_careless_reader_takes_the_lures(name: str, demuxer: str, options: dict[str, str], watch: Watch) -> None:
    """It reads from memory, as ours does."""
    data = io.BytesIO(watch.lures.files()[name])
    with pytest.raises(av.FFmpegError):
        av.open(data, "r", format=demuxer, options=options, timeout=0.2)
    assert watch.was_accessed()


def test_broken_forms_are_refused_safely(fuzz: Fuzz, check_memory: Check) -> None:
    num_forms = fuzz.send_all(itertools.islice(select_small(broken_bodies.iterate_broken_forms()), 0, None, 6))
    check_memory(f"{num_forms} forms")


def test_broken_lengths_are_refused_safely(fuzz: Fuzz) -> None:
    for sent in broken_bodies.iterate_bad_lengths(form(part(b"prompt", b"a"))):
        fuzz.send(sent, "length")


def test_broken_json_is_refused_safely(fuzz: Fuzz, check_memory: Check) -> None:
    num_bodies = fuzz.send_all(select_small(broken_bodies.iterate_broken_json()))
    check_memory(f"{num_bodies} JSON bodies")


def test_large_bodies_are_answered_safely(fuzz: Fuzz, check_memory: Check) -> None:
    """Bodies of ten megabytes, and of very many parts, fields and values."""
    fuzz.send_all(itertools.islice(select_large(), 0, None, 8))
    check_memory("some large bodies")


def test_odd_values_are_answered_safely(fuzz: Fuzz) -> None:
    fuzz.send_odd_values(random.Random(0), 1)


def test_mutated_bodies_are_answered_safely(fuzz: Fuzz) -> None:
    fuzz.send_mutated(random.Random(0), 60)


@pytest.mark.parametrize("is_json", [False, True])
@pytest.mark.parametrize("field", ["image", "input_reference"])
def test_whole_pictures_are_accepted(field: str, is_json: bool, fuzz: Fuzz) -> None:
    for name, data in broken_files.stills().items():
        assert fuzz.send_file(name, data, field, is_json=is_json) == 200, name


def test_whole_clips_are_accepted(fuzz: Fuzz) -> None:
    assert fuzz.send_file("mkv", broken_files.clips()["mkv"], "video", is_json=True) == 200


def test_damaged_pictures_are_answered_safely(fuzz: Fuzz, check_memory: Check) -> None:
    fuzz.send_damaged(random.Random(0), broken_files.stills(), IMAGE_FIELDS, 25)
    check_memory(f"25 pictures, {fuzz.accepted.total()} of which have a header that can be read")
    assert 2 < fuzz.accepted.total() < 23


def test_damaged_clips_are_answered_safely(fuzz: Fuzz) -> None:
    fuzz.send_damaged(random.Random(0), broken_files.clips(), ["video"], 2)


def test_bombs_are_answered_safely(fuzz: Fuzz, check_memory: Check) -> None:
    for name, data in broken_files.bombs(1).items():
        if name not in _SLOW:
            fuzz.send_file(name, data, "input_reference")
    check_memory("bombs")


def test_files_that_are_neither_picture_nor_clip_are_refused(fuzz: Fuzz) -> None:
    for name, data in broken_files.non_pictures().items():
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
    lures = {name: data for name, data in fuzz.watch.lures.files().items() if name not in _SLOW}
    accepted = {name for name, data in lures.items() if fuzz.send_file(name, data, "input_reference") == 200}
    # These begin like a picture or a clip, and are accepted as one.
    assert accepted <= {name for name in lures if re.match("png|jpeg|avi|mp4", name)}
    assert fuzz.send_file("m3u8", lures["m3u8"], "video") == 422, "the reader of clips does not take it either"


# The long tier


@pytest.fixture
def rng(seed: int) -> random.Random:
    return random.Random(seed)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_broken_forms(fuzz: Fuzz, check_memory: Check) -> None:
    num_forms = sum(
        fuzz.send_all(select_small(broken_bodies.iterate_broken_forms()), endpoint) for endpoint in Endpoint
    )
    check_memory(f"{num_forms} forms")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_large_bodies(fuzz: Fuzz, check_memory: Check) -> None:
    num_bodies = sum(fuzz.send_all(select_large(), endpoint) for endpoint in Endpoint)
    check_memory(f"{num_bodies} large bodies")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_odd_values(fuzz: Fuzz, check_memory: Check, rng: random.Random) -> None:
    fuzz.send_odd_values(rng, 12)
    check_memory("odd values")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_mutated_bodies(fuzz: Fuzz, check_memory: Check, rng: random.Random) -> None:
    fuzz.send_mutated(rng, 10_000)
    check_memory("10000 bodies")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_pictures(fuzz: Fuzz, check_memory: Check, rng: random.Random) -> None:
    files = {**broken_files.stills(), **{name: it for name, it in broken_files.clips().items() if "animated" in name}}
    fuzz.send_damaged(rng, files, IMAGE_FIELDS, 5000)
    check_memory(f"5000 pictures, {fuzz.accepted.total()} of which were accepted")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_many_damaged_clips(fuzz: Fuzz, check_memory: Check, rng: random.Random) -> None:
    fuzz.send_damaged(rng, broken_files.clips(), ["video", "video_reference", "input_reference"], 200)
    check_memory(f"200 clips, {fuzz.accepted.total()} of which were accepted")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_file_in_every_field(fuzz: Fuzz, check_memory: Check) -> None:
    lures = fuzz.watch.lures.files()
    files = {
        **lures,
        **broken_files.bombs(10),
        **broken_files.non_pictures(),
        **broken_files.stills(),
        **broken_files.clips(),
    }
    for name, data in files.items():
        for field in MEDIA:
            for is_json in (False, True):
                fuzz.send_file(name, data, field, is_json=is_json)
    check_memory(f"{len(files)} files in every field")
