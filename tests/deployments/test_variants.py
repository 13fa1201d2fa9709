"""Variants of finished files over HTTP: made once on request, kept beside the clip, or refused."""

from __future__ import annotations

import asyncio
import io
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
import numpy as np
import PIL.Image
import pytest
from starlette.datastructures import Headers

from cosmos3_core.errors import MediaError
from cosmos3_core.media.probe import read_sound
from cosmos3_core.media.sound import SoundFormat
from cosmos3_core.media.thumbnail import write_thumbnail
from cosmos3_core.media.writer import ClipFormat, open_writer
from deployments.jobs.job import new_job_id
from deployments.media import variants as media_variants
from deployments.media.layout import new_media_id, read_record
from deployments.media.objects import DirectoryObjects
from deployments.media.store import MediaStore
from deployments.media.variants import MADE_VARIANTS, Variant, make_variant
from tests.api.content_answers import Answer, send_answer, variant_answer
from tests.deployments.clips import read
from tests.settling import run

DEADLINE_S = 60.0
RATE, NUM_SAMPLES = 16000, 6000
FRAMES = np.repeat(np.linspace(30, 220, 9).astype(np.uint8), 32 * 48 * 3).reshape(9, 32, 48, 3)
SOUND = 0.5 * np.sin(np.arange(NUM_SAMPLES, dtype=np.float32) / 10)[None].repeat(2, 0)
VARIANT = Variant("thumbnail", "image/webp", ".webp", write_thumbnail, ())


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path, max_bytes=1 << 30, keep_s=1000.0)


@pytest.fixture(params=["directory", "archive"])
def reading(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[MediaStore, MediaStore]]:
    """A store that makes clips and one that reads them; with an archive they share nothing else."""
    if request.param == "directory":
        store = MediaStore(tmp_path, max_bytes=1 << 30, keep_s=1000.0)
        yield store, store
        return
    url = f"memory://{uuid.uuid4().hex}"
    yield tuple(MediaStore(tmp_path / name, 1 << 30, 1000.0, url) for name in ("made", "read"))  # type: ignore[misc]
    fsspec.filesystem("memory").store.clear()


def make(store: MediaStore, kind: str, *, with_sound: bool = False, frames: np.ndarray = FRAMES) -> str:
    sound = SoundFormat(RATE, 2, NUM_SAMPLES) if with_sound or kind == "wav" else None
    clip_format = ClipFormat(kind, *frames.shape[1:3], 24.0, sound=sound)
    media_id = new_media_id(new_job_id())
    entry = store.create(media_id, clip_format.media_type, clip_format.suffix, is_live=False)
    with open_writer(entry.path, clip_format) as writer:
        if kind != "wav":
            writer.write(frames[:1] if clip_format.is_image else frames)
        if sound is not None:
            writer.write_sound(SOUND)
    entry.finish()
    return media_id


def open_image(answer: Answer) -> PIL.Image.Image:
    image = PIL.Image.open(io.BytesIO(answer.body))
    image.load()
    return image


def fetch(store: MediaStore, media_id: str, variant: str, method: str = "GET", **headers: str) -> Answer:
    async def ask() -> Answer:
        given = Headers({name.replace("_", "-"): value for name, value in headers.items()})
        return await send_answer(await variant_answer(store, media_id, variant, method, given))

    answer: Answer = run(ask())
    return answer


def record_variants(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the variants made from now on."""
    names: list[str] = []
    keep = media_variants._keep

    def count(objects: Any, record: Any, variant: Variant, path: Path) -> Any:
        names.append(variant.name)
        return keep(objects, record, variant, path)

    monkeypatch.setattr(media_variants, "_keep", count)
    return names


def test_a_clip_has_thumbnail_and_spritesheet(
    reading: tuple[MediaStore, MediaStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = record_variants(monkeypatch)
    media_id = make(reading[0], "mp4")
    store = reading[1]
    thumbnail, sheet = (fetch(store, media_id, name) for name in ("thumbnail", "spritesheet"))
    assert (thumbnail.status, thumbnail.headers["content-type"]) == (200, "image/webp")
    assert (open_image(thumbnail).format, open_image(thumbnail).size) == ("WEBP", (48, 32))
    assert (sheet.status, sheet.headers["content-type"]) == (200, "image/jpeg")
    assert (open_image(sheet).format, open_image(sheet).size) == ("JPEG", (144, 96))
    for answer, again in (
        (thumbnail, fetch(store, media_id, "thumbnail")),
        (sheet, fetch(store, media_id, "spritesheet")),
    ):
        assert again == answer
        assert answer.headers["content-length"] == str(len(answer.body))
    assert names == ["thumbnail", "spritesheet"], "each once"


def test_a_clip_with_sound_has_audio(reading: tuple[MediaStore, MediaStore], tmp_path: Path) -> None:
    media_id = make(reading[0], "mp4", with_sound=True)
    answer = fetch(reading[1], media_id, "audio")
    assert (answer.status, answer.headers["content-type"]) == (200, "audio/mp4")
    (tmp_path / "a.m4a").write_bytes(answer.body)
    record = reading[0].require(media_id)
    np.testing.assert_array_equal(read_sound(tmp_path / "a.m4a"), read_sound(reading[0].file_path(record)))


def test_a_wav_is_its_own_sound(store: MediaStore) -> None:
    media_id = make(store, "wav")
    answer = fetch(store, media_id, "audio")
    assert (answer.status, answer.headers["content-type"]) == (200, "audio/wav")
    assert answer.body == read(store, media_id)
    assert sorted(os.listdir(store.directory / media_id)) == ["begun.json", "clip.wav", "ended.json"]


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_image_has_a_thumbnail(store: MediaStore, kind: str) -> None:
    answer = fetch(store, make(store, kind), "thumbnail")
    assert (answer.status, open_image(answer).format, open_image(answer).size) == (200, "WEBP", (48, 32))


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("mp4", "audio"), ("png", "spritesheet"), ("png", "audio"), ("wav", "thumbnail"), ("wav", "spritesheet")]
    + [("mp4", name) for name in ("action", "", "../clip", "thumbnail.json", "Thumbnail")],
)
def test_a_variant_that_a_file_lacks_is_a_404(store: MediaStore, kind: str, variant: str) -> None:
    media_id = make(store, kind)
    before = sorted(os.listdir(store.directory / media_id))
    answer = fetch(store, media_id, variant)
    assert (answer.status, answer.code) == (404, "no_such_variant")
    assert sorted(os.listdir(store.directory / media_id)) == before


@pytest.mark.parametrize("variant", MADE_VARIANTS)
def test_variants_of_unfinished_files_are_refused(store: MediaStore, variant: str) -> None:
    media_id = new_media_id(new_job_id())
    store.create(media_id, "video/mp4", ".mp4", is_live=True)
    answer = fetch(store, media_id, variant)
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (409, "media_not_ready", "1")
    store.fail(media_id, "secret reason")
    answer = fetch(store, media_id, variant)
    assert (answer.status, answer.code) == (410, "media_failed")
    for unknown in (new_media_id(new_job_id()), "../x", ""):
        answer = fetch(store, unknown, variant)
        assert (answer.status, answer.code) == (410, "media_expired")


def test_variants_support_ranges_etags_and_head(store: MediaStore) -> None:
    media_id = make(store, "mp4")
    whole = fetch(store, media_id, "thumbnail", "HEAD")
    assert (whole.status, whole.body) == (200, b"")
    tag, size = whole.headers["etag"], int(whole.headers["content-length"])
    data = fetch(store, media_id, "thumbnail").body
    assert len(data) == size
    part = fetch(store, media_id, "thumbnail", range="bytes=5-9")
    assert (part.status, part.body, part.headers["content-range"]) == (206, data[5:10], f"bytes 5-9/{size}")
    assert fetch(store, media_id, "thumbnail", if_none_match=tag).status == 304
    assert fetch(store, media_id, "spritesheet", if_none_match=tag).status == 200
    beyond = fetch(store, media_id, "thumbnail", range=f"bytes={size}-")
    assert (beyond.status, beyond.code) == (416, "range_not_satisfiable")


def test_a_variant_counts_and_is_removed_with_its_clip(store: MediaStore) -> None:
    media_id = make(store, "mp4", with_sound=True)
    for variant in MADE_VARIANTS:
        fetch(store, media_id, variant)
    folder = store.directory / media_id
    assert len(os.listdir(folder)) == 3 + 2 * len(MADE_VARIANTS)
    num_bytes = sum(path.stat().st_size for path in folder.iterdir())
    assert MediaStore(store.directory, num_bytes, 1000.0).sweep(lambda _: {}, time.time()) == 0
    assert MediaStore(store.directory, num_bytes - 1, 1000.0).sweep(lambda _: {}, time.time()) == 1
    assert os.listdir(store.directory) == []
    assert fetch(store, media_id, "thumbnail").status == 410


def test_concurrent_requests_make_one_variant(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    names = record_variants(monkeypatch)
    media_id = make(store, "mp4")

    async def ask() -> set[bytes]:
        answers = (variant_answer(store, media_id, "spritesheet", "GET", Headers()) for _ in range(20))
        return {(await send_answer(response)).body for response in await asyncio.gather(*answers)}

    assert len(run(ask())) == 1
    assert names == ["spritesheet"]


def test_a_caller_with_a_stale_look_does_not_make_it_again(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first caller finds nothing, and continues only after the second has its file."""
    names = record_variants(monkeypatch)
    media_id = make(store, "mp4")
    looks = threading.Semaphore(1)
    has_looked, may_go_on = threading.Event(), threading.Event()
    find = media_variants.find_variant

    def find_and_wait(*arguments: Any) -> Any:
        found = find(*arguments)
        if looks.acquire(blocking=False):  # the very first look
            assert found is None
            has_looked.set()
            assert may_go_on.wait(DEADLINE_S)
        return found

    monkeypatch.setattr(media_variants, "find_variant", find_and_wait)

    async def ask() -> list[bytes]:
        early = asyncio.create_task(variant_answer(store, media_id, "spritesheet", "GET", Headers()))
        assert await asyncio.to_thread(has_looked.wait, DEADLINE_S)
        other = await send_answer(await variant_answer(store, media_id, "spritesheet", "GET", Headers()))
        may_go_on.set()
        return [other.body, (await send_answer(await early)).body]

    first, second = run(ask())
    assert first == second
    assert names == ["spritesheet"]


def test_processes_that_make_one_variant_agree(store: MediaStore) -> None:
    """The second finds the first one's record when it is about to write its own."""
    record = store.require(make(store, "mp4"))
    first: list[Any] = []

    def write(path: Path, source: BinaryIO) -> None:
        if not first:
            first.append(None)
            first[0] = make_variant(store, record, VARIANT)
        write_thumbnail(path, source)

    other = make_variant(store, record, Variant("thumbnail", "image/webp", ".webp", write, ()))
    assert other == first[0]
    kept = [name for name in os.listdir(store.directory / record.media_id) if name.startswith("thumbnail")]
    assert sorted(kept) == sorted(["thumbnail.json", other.file_name]), "the second one's is gone"


class Gate:
    """Blocks the making of variants."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.started, self.open = threading.Semaphore(0), threading.Event()
        self.most, self._at_once, self._lock = 0, 0, threading.Lock()
        make = media_variants.make_variant

        def wait(*arguments: Any) -> Any:
            with self._lock:
                self._at_once += 1
                self.most = max(self.most, self._at_once)
            self.started.release()
            assert self.open.wait(DEADLINE_S)
            with self._lock:
                self._at_once -= 1
            return make(*arguments)

        monkeypatch.setattr(media_variants, "make_variant", wait)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open.set()


def test_concurrent_variants_are_bounded_and_more_are_refused(
    store: MediaStore, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_variants, "_MAX_WAITING", 5)
    media_ids = [make(store, "png") for _ in range(6)]

    async def ask() -> list[int]:
        asking = [
            asyncio.create_task(variant_answer(store, media_id, "thumbnail", "GET", Headers()))
            for media_id in media_ids
        ]
        done, _ = await asyncio.wait(asking, return_when=asyncio.FIRST_COMPLETED)
        asking.remove(first := done.pop())
        refused = await send_answer(first.result())
        assert (refused.status, refused.code, refused.headers["retry-after"]) == (429, "overloaded", "5")
        gate.open.set()
        return [(await send_answer(await answer)).status for answer in asking]

    assert run(ask()) == [200] * 5
    assert gate.most <= 2
    assert media_variants._MAKER._making == {}


def test_a_long_wait_is_a_409_and_disconnecting_stops_nothing(
    store: MediaStore, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(media_variants, "_WAIT_S", 0.05)
    media_id = make(store, "png")
    answer = fetch(store, media_id, "thumbnail")
    assert (answer.status, answer.code, answer.headers["retry-after"]) == (409, "media_not_ready", "1")
    gate.open.set()
    monkeypatch.setattr(media_variants, "_WAIT_S", DEADLINE_S)
    assert fetch(store, media_id, "thumbnail").status == 200


@pytest.mark.parametrize(
    "remove", [MediaStore.remove, lambda store, media_id: store.sweep(lambda _: {}, time.time() + 1e6)]
)
def test_a_file_removed_while_waiting_is_a_410(
    store: MediaStore, gate: Gate, remove: Callable[[MediaStore, str], Any]
) -> None:
    media_id = make(store, "png")

    async def ask() -> Answer:
        asking = asyncio.create_task(variant_answer(store, media_id, "thumbnail", "GET", Headers()))
        assert await asyncio.to_thread(gate.started.acquire, timeout=DEADLINE_S)
        remove(store, media_id)
        gate.open.set()
        return await send_answer(await asking)

    answer: Answer = run(ask())
    assert (answer.status, answer.code) == (410, "media_expired")
    assert os.listdir(store.directory) == []


def test_a_file_removed_while_a_variant_is_made_leaves_nothing(store: MediaStore) -> None:
    record = store.require(make(store, "mp4"))

    def write(path: Path, source: BinaryIO) -> None:
        store.remove(record.media_id)
        write_thumbnail(path, source)

    with pytest.raises(FileNotFoundError, match="was removed"):
        make_variant(store, record, Variant("thumbnail", "image/webp", ".webp", write, ()))
    assert os.listdir(store.directory) == []


def test_a_damaged_file_is_an_error_and_leaves_nothing(store: MediaStore) -> None:
    media_id = new_media_id(new_job_id())
    entry = store.create(media_id, "video/mp4", ".mp4", is_live=False)
    entry.path.write_bytes(b"no mp4" * 100)
    entry.finish()
    for variant in MADE_VARIANTS:
        with pytest.raises(MediaError):
            fetch(store, media_id, variant)
    assert sorted(os.listdir(store.directory / media_id)) == ["begun.json", "clip.mp4", "ended.json"]


def test_a_full_disk_is_an_error_and_leaves_nothing(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    media_id = make(store, "mp4")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(DirectoryObjects, "create", full)
    with pytest.raises(MediaError, match="the thumbnail of .* cannot be written: .*No space left"):
        fetch(store, media_id, "thumbnail")
    monkeypatch.undo()
    assert not [name for name in os.listdir(store.directory / media_id) if name.startswith("thumbnail")]
    assert fetch(store, media_id, "thumbnail").status == 200


def test_a_variants_record_is_not_taken_for_a_clips(store: MediaStore) -> None:
    """A record is valid only under its own name."""
    media_id = make(store, "mp4")
    fetch(store, media_id, "thumbnail")
    record = read_record(store.objects, media_id, "thumbnail.json")
    assert record is not None
    assert record.file_name.startswith("thumbnail-")
    assert store.require(media_id).file_name == "clip.mp4"
