"""Files of the media store over HTTP: complete, in ranges, while they grow; failures break the connection."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from starlette.datastructures import Headers

from cosmos3_core.errors import MediaError
from deployments.api import content
from deployments.api.content import PartsResponse, read_finished, read_live
from deployments.jobs.job import new_job_id
from deployments.media.layout import MediaRecord, new_media_id
from deployments.media.store import MediaEntry, MediaStore
from tests.api.content_answers import content_answer
from tests.observability.recording import RecordingMetrics
from tests.settling import run

DATA = bytes(range(256)) * 4 + b"end"
SIZE = len(DATA)
PART_BYTES = 256 * 1024
DEADLINE_S = 60.0


@pytest.fixture
def store(tmp_path: Path) -> MediaStore:
    return MediaStore(tmp_path, max_bytes=1 << 30, keep_s=1000.0)


class Clip:
    """A clip and its writer."""

    def __init__(self, store: MediaStore, *, is_live: bool = True) -> None:
        self.store, self.media_id = store, new_media_id(new_job_id())
        self.entry: MediaEntry = store.create(self.media_id, "video/mp4", ".mp4", is_live=is_live)

    @property
    def record(self) -> MediaRecord:
        return self.store.require(self.media_id)

    def grow(self, data: bytes) -> None:
        assert self.entry.live_path is not None
        with self.entry.live_path.open("ab") as file:
            file.write(data)

    def finish(self, data: bytes = DATA) -> None:
        self.entry.path.write_bytes(data)
        self.entry.finish()


class Viewer:
    """One request for a clip and its answer.

    Args:
        clip: the requested clip.
        on_part: called with everything received, after each part and before the next is read.
        headers: request headers.
    """

    def __init__(
        self,
        clip: Clip,
        on_part: Callable[[bytes], Awaitable[None]] | None = None,
        *,
        method: str = "GET",
        media_id: str | None = None,
        **headers: str,
    ) -> None:
        self.status, self.headers, self.body = 0, Headers(), b""
        self.parts: list[int] = []
        self.is_whole = False
        self._on_part = on_part
        self._asked = clip.store, media_id or clip.media_id, method
        self._given = Headers({name.replace("_", "-"): value for name, value in headers.items()})

    async def watch(self) -> None:
        response = await content_answer(*self._asked, self._given)
        await response({"type": "http", "asgi": {"spec_version": "2.4"}}, self._receive, self._send)

    async def _receive(self) -> Any:
        await asyncio.sleep(DEADLINE_S)

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status, self.headers = message["status"], Headers(raw=message["headers"])
            return
        self.body += message.get("body", b"")
        self.parts.append(len(message.get("body", b"")))
        self.is_whole = not message.get("more_body", False)
        if self._on_part is not None and not self.is_whole:
            await self._on_part(self.body)


def fetch(clip: Clip, **asked: Any) -> Viewer:
    viewer = Viewer(clip, **asked)
    run(viewer.watch())
    assert viewer.is_whole
    return viewer


def fetch_error(clip: Clip, **asked: Any) -> tuple[int, str, Headers]:
    viewer = fetch(clip, **asked)
    error = json.loads(viewer.body)["error"]
    assert error["message"]
    return viewer.status, error["code"], viewer.headers


# Finished files


def test_sent_bytes_of_files_are_counted(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = RecordingMetrics()
    monkeypatch.setattr(content, "metrics", lambda: recording)
    clip = Clip(store)
    clip.finish()
    fetch(clip)
    fetch(clip, range="bytes=10-29")
    fetch(clip, method="HEAD")
    assert sum(value for (value,) in recording.values_of("cosmos3_sent_bytes")) == len(DATA) + 20


def test_a_finished_file_is_sent_whole(store: MediaStore) -> None:
    clip = Clip(store)
    clip.finish()
    viewer = fetch(clip)
    assert (viewer.status, viewer.body) == (200, DATA)
    assert viewer.headers["content-type"] == "video/mp4"
    assert viewer.headers["content-length"] == str(SIZE)
    assert viewer.headers["accept-ranges"] == "bytes"
    assert viewer.headers["etag"] == clip.record.etag


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=5-9", 5, 10),
        ("bytes=1000-", 1000, SIZE),
        ("bytes=0-", 0, SIZE),
        ("bytes=-3", SIZE - 3, SIZE),
        ("bytes=-99999", 0, SIZE),
        (f"bytes=0-{SIZE - 1}", 0, SIZE),
        (f"bytes=10-{10**17}", 10, SIZE),
        (f"bytes={SIZE - 1}-", SIZE - 1, SIZE),
    ],
)
def test_a_range_is_a_206(store: MediaStore, asked: str, start: int, end: int) -> None:
    clip = Clip(store)
    clip.finish()
    viewer = fetch(clip, range=asked)
    assert (viewer.status, viewer.body) == (206, DATA[start:end])
    assert viewer.headers["content-range"] == f"bytes {start}-{end - 1}/{SIZE}"
    assert viewer.headers["content-length"] == str(end - start)
    assert viewer.headers["etag"] == clip.record.etag


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", f"bytes={SIZE}-{SIZE + 5}", "bytes=-0", "bytes=99999-"])
def test_an_unsatisfiable_range_is_a_416(store: MediaStore, asked: str) -> None:
    clip = Clip(store)
    clip.finish()
    status, code, headers = fetch_error(clip, range=asked)
    assert (status, code, headers["content-range"]) == (416, "range_not_satisfiable", f"bytes */{SIZE}")


NO_RANGES = ["bytes=-", "bytes=9-5", "bytes=a-b", "bytes 1-2", "lines=1-2", "bytes=²-3", "bytes= 1-2", "bytes=--1"]
SEVERAL = ["bytes=1-2,5-6"]
LONG = ["bytes=" + "1" * 5000 + "-", "bytes=" + "0" * 100_000 + "-1"]


@pytest.mark.parametrize("asked", [*NO_RANGES, *SEVERAL, *LONG], ids=lambda value: value[:20])
def test_an_invalid_or_multiple_range_gets_the_whole_file(store: MediaStore, asked: str) -> None:
    clip = Clip(store)
    clip.finish()
    viewer = fetch(clip, range=asked)
    assert (viewer.status, viewer.body) == (200, DATA)
    assert "content-range" not in viewer.headers


def test_a_matching_etag_is_a_304(store: MediaStore) -> None:
    clip = Clip(store)
    clip.finish()
    etag = clip.record.etag
    for known in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        for method in ("GET", "HEAD"):
            viewer = fetch(clip, method=method, if_none_match=known, range="bytes=0-4")
            assert (viewer.status, viewer.body, viewer.headers["etag"]) == (304, b"", etag)
    assert fetch(clip, if_none_match='"other"').status == 200
    assert fetch(clip, if_none_match=clip.record.live_etag).status == 200


def test_if_range_with_another_etag_gets_the_whole_file(store: MediaStore) -> None:
    clip = Clip(store)
    clip.finish()
    assert fetch(clip, range="bytes=0-4", if_range=clip.record.etag).status == 206
    for other in (clip.record.live_etag, f"W/{clip.record.etag}", "Wed, 21 Oct 2015 07:28:00 GMT"):
        viewer = fetch(clip, range="bytes=0-4", if_range=other)
        assert (viewer.status, viewer.body) == (200, DATA)


@pytest.mark.parametrize("state", ["begun", "growing", "done", "known", "failed", "not live", "no such"])
def test_head_has_the_headers_of_get(store: MediaStore, state: str) -> None:
    clip, given = Clip(store, is_live=state != "not live"), Headers()
    if state == "growing":
        clip.grow(b"0123456789")
    if state in ("done", "known"):
        clip.finish()
        given = Headers({"if-none-match": clip.record.etag} if state == "known" else {"x": "y"})
    if state == "failed":
        store.fail(clip.media_id, "why")
    media_id = "0" * 32 if state == "no such" else clip.media_id
    get, head = (run(content_answer(store, media_id, method, given)) for method in ("GET", "HEAD"))
    assert (head.status_code, dict(head.headers)) == (get.status_code, dict(get.headers))
    assert ("content-length" in get.headers) == (state not in ("begun", "growing", "known"))
    if state in ("begun", "growing", "done"):
        viewer = fetch(clip, method="HEAD")
        assert (viewer.status, viewer.body, dict(viewer.headers)) == (200, b"", dict(get.headers))
    if state == "done":
        assert dict(fetch(clip, method="HEAD", range="bytes=0-4").headers) == dict(get.headers)


def test_a_large_file_is_sent_in_bounded_parts(store: MediaStore) -> None:
    clip, data = Clip(store), DATA * 1000
    clip.finish(data)
    viewer = fetch(clip)
    assert viewer.body == data
    assert max(viewer.parts) == PART_BYTES
    viewer = fetch(clip, range="bytes=5-600000")
    assert viewer.body == data[5:600_001]
    assert max(viewer.parts) == PART_BYTES


def test_a_truncated_file_breaks_the_connection(store: MediaStore) -> None:
    clip = Clip(store)
    clip.finish()
    clip.entry.path.write_bytes(DATA[:-1])
    viewer = Viewer(clip)
    with pytest.raises(MediaError, match=f"has {SIZE - 1} bytes; {SIZE} are to be read"):
        run(viewer.watch())
    assert not viewer.is_whole


@pytest.mark.parametrize("media_id", ["0" * 32, "no id", "..", "%2e%2e/etc/passwd", "é" * 32])
def test_an_unknown_id_is_a_410(store: MediaStore, media_id: str) -> None:
    assert fetch_error(Clip(store), media_id=media_id)[:2] == (410, "media_expired")


def test_a_failed_file_is_a_410(store: MediaStore) -> None:
    clip = Clip(store)
    store.fail(clip.media_id, "OSError: /a/secret/place")
    viewer = fetch(clip)
    assert (viewer.status, json.loads(viewer.body)["error"]["code"]) == (410, "media_failed")
    assert b"secret" not in viewer.body


def test_an_unfinished_file_without_a_live_file_is_a_409(store: MediaStore) -> None:
    clip = Clip(store, is_live=False)
    status, code, headers = fetch_error(clip)
    assert (status, code, headers["retry-after"]) == (409, "media_not_ready", "1")
    clip.finish()
    assert fetch(clip).body == DATA


# Growing files


def test_each_fragment_is_sent_as_soon_as_it_is_written(store: MediaStore) -> None:
    """Each fragment, and the end, is written only after the previous one has arrived."""
    clip = Clip(store)
    fragments = [b"%d" % index * 1000 for index in range(5)]

    async def next_fragment(body: bytes) -> None:
        assert body == b"".join(fragments[: len(body) // 1000])
        if len(body) == 5000:
            clip.finish()
        else:
            clip.grow(fragments[len(body) // 1000])

    async def work() -> None:
        viewer = Viewer(clip, next_fragment)
        watching = asyncio.create_task(viewer.watch())
        while not viewer.status:
            await asyncio.sleep(0)
        assert viewer.headers["content-type"] == "video/mp4"
        assert "content-length" not in viewer.headers
        assert viewer.headers["etag"] == clip.record.live_etag
        assert viewer.headers["cache-control"] == "no-store", "a cache would take what is there for the whole"
        clip.grow(fragments[0])
        await watching
        assert viewer.is_whole
        assert viewer.body == b"".join(fragments), "to its end, although the finished one is there"

    run(work())
    assert fetch(clip).body == DATA


def test_earlier_fragments_are_sent_at_once_in_bounded_parts(store: MediaStore) -> None:
    clip, data = Clip(store), DATA * 1000

    async def end(body: bytes) -> None:
        if body == data:
            clip.finish()

    clip.grow(data)
    viewer = Viewer(clip, end)
    run(viewer.watch())
    assert viewer.body == data
    assert max(viewer.parts) == PART_BYTES


def test_bytes_written_just_before_the_end_are_sent(store: MediaStore) -> None:
    """They are written, and the clip completes, between two looks at the file."""
    clip = Clip(store)

    async def end(body: bytes) -> None:
        if body == b"first":
            clip.grow(b" last")
            clip.finish()

    clip.grow(b"first")
    viewer = Viewer(clip, end)
    run(viewer.watch())
    assert (viewer.body, viewer.is_whole) == (b"first last", True)


def test_a_slow_viewer_delays_neither_writer_nor_viewers(store: MediaStore) -> None:
    clip = Clip(store)
    may_go_on = asyncio.Event()

    async def wait(body: bytes) -> None:
        await may_go_on.wait()

    async def work() -> None:
        slow, fast = Viewer(clip, wait), Viewer(clip)
        tasks = [asyncio.create_task(viewer.watch()) for viewer in (slow, fast)]
        clip.grow(b"a" * 1000)
        while not (slow.body and fast.body):
            await asyncio.sleep(0.001)
        clip.grow(b"b" * 1000)
        clip.finish()
        await tasks[1]
        assert (len(fast.body), len(slow.body)) == (2000, 1000)
        may_go_on.set()
        await tasks[0]
        assert fast.body == slow.body == b"a" * 1000 + b"b" * 1000

    run(work())


@pytest.mark.parametrize("how", ["fail", "remove"])
def test_a_failed_clip_breaks_the_connection(store: MediaStore, how: str) -> None:
    clip = Clip(store)

    async def break_off(body: bytes) -> None:
        if how == "fail":
            store.fail(clip.media_id, "the encoder died")
        else:
            shutil.rmtree(store.directory / clip.media_id)

    clip.grow(b"half")
    viewer = Viewer(clip, break_off)
    said = "failed while it was read: the encoder died" if how == "fail" else "was removed while it was read"
    with pytest.raises(MediaError, match=said):
        run(viewer.watch())
    assert (viewer.body, viewer.is_whole) == (b"half", False)


def test_a_clip_that_stopped_growing_breaks_the_connection(tmp_path: Path) -> None:
    store = MediaStore(tmp_path, max_bytes=1 << 20, keep_s=0.2)
    clip = Clip(store)
    grown_s = []

    async def grow_once(body: bytes) -> None:
        if body == b"a":
            await asyncio.sleep(0.15)
            clip.grow(b"b")
        else:
            grown_s.append(time.monotonic())

    clip.grow(b"a")
    viewer = Viewer(clip, grow_once)
    with pytest.raises(MediaError, match=r"has not grown for 0\.2 s; its writer is gone"):
        run(viewer.watch())
    assert (viewer.body, viewer.is_whole) == (b"ab", False)
    assert time.monotonic() - grown_s[0] > 0.15


def test_a_viewer_of_a_completed_clip_without_live_file_is_disconnected(store: MediaStore) -> None:
    clip = Clip(store)
    record = clip.record
    clip.finish()
    with pytest.raises(FileNotFoundError):
        run(anext(read_live(store, record)))


@pytest.mark.parametrize(("asked", "end"), [("bytes=2-4", 5), ("bytes=2-9", 10), ("bytes=2-99", 10)])
def test_a_range_within_a_growing_file_is_a_206(store: MediaStore, asked: str, end: int) -> None:
    clip = Clip(store)
    clip.grow(b"0123456789")
    for condition in ({}, {"if_range": clip.record.live_etag}):
        viewer = fetch(clip, range=asked, **condition)
        assert (viewer.status, viewer.body) == (206, b"0123456789"[2:end])
        assert viewer.headers["content-range"] == f"bytes 2-{end - 1}/*"
        assert viewer.headers["cache-control"] == "no-store"
        assert viewer.headers["content-length"] == str(end - 2)


@pytest.mark.parametrize(
    "asked",
    [
        {"range": "bytes=0-"},
        {"range": "bytes=5-"},
        {"range": "bytes=-5"},
        {"range": "bytes=2-4", "if_range": '"x"'},
        {"range": "bytes=10-12"},  # no byte of it is written yet
    ],
)
def test_an_unservable_range_of_a_growing_file_gets_the_whole_stream(store: MediaStore, asked: dict[str, str]) -> None:
    """Browsers ask for bytes=0- first."""
    clip = Clip(store)

    async def end(body: bytes) -> None:
        clip.finish()

    clip.grow(b"0123456789")
    viewer = Viewer(clip, end, **asked)
    run(viewer.watch())
    assert (viewer.status, viewer.body) == (200, b"0123456789")


def test_a_range_of_an_empty_growing_file_gets_the_whole_stream(store: MediaStore) -> None:
    """Some players request the first two bytes first."""
    clip = Clip(store)
    viewer = Viewer(clip, range="bytes=0-1")

    async def body() -> None:
        watching = asyncio.create_task(viewer.watch())
        while not viewer.status:
            await asyncio.sleep(0.001)
        clip.grow(b"0123456789")
        clip.finish()
        await watching

    run(body())
    assert (viewer.status, viewer.body) == (200, b"0123456789")


def test_a_disconnected_viewer_leaves_no_file_open(store: MediaStore) -> None:
    clip = Clip(store)

    async def leave(is_begun: bool) -> list[str]:
        closed: list[str] = []
        came = asyncio.Event()

        async def parts() -> AsyncGenerator[bytes, None]:
            try:
                async for part in read_live(store, clip.record):
                    yield part
            finally:
                closed.append("parts")

        async def send(message: Any) -> None:
            if message.get("body") or not is_begun:
                came.set()
                await asyncio.sleep(DEADLINE_S)

        async def receive() -> Any:
            await asyncio.sleep(DEADLINE_S)

        response = PartsResponse(parts(), {}, "video/mp4", on_end=lambda: closed.append("ended"))
        watching = asyncio.ensure_future(response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send))
        clip.grow(b"a")
        await came.wait()
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        return list(closed)  # before anything else could close them

    assert run(leave(is_begun=True)) == ["ended", "parts"]
    assert run(leave(is_begun=False)) == ["ended"]


@pytest.mark.parametrize("is_taken", [True, False], ids=["taken", "left"])
def test_a_file_that_is_swept_while_it_is_sent_is_sent_whole(store: MediaStore, is_taken: bool) -> None:
    clip, data = Clip(store), DATA * 1000
    clip.finish(data)

    async def work() -> None:
        begun = open_files()
        parts = read_finished(store, clip.record)
        body = await anext(parts)
        assert len(body) == PART_BYTES
        assert open_files() == begun + 1
        assert store.sweep(lambda _: {}, time.time() + 2000) == 1
        if is_taken:
            assert body + b"".join([part async for part in parts]) == data
        else:
            await parts.aclose()
        assert open_files() == begun

    run(work())


def test_a_cancelled_read_leaves_no_file_open(store: MediaStore, monkeypatch: pytest.MonkeyPatch) -> None:
    clip, entered, gate = Clip(store), threading.Event(), threading.Event()
    clip.finish()
    read: list[bytes] = []
    read_at = content._read_at

    def read_late(*arguments: Any) -> bytes:
        entered.set()
        assert gate.wait(DEADLINE_S)
        read.append(read_at(*arguments))
        return read[0]

    monkeypatch.setattr(content, "_read_at", read_late)

    async def work() -> None:
        begun = open_files()
        viewer = Viewer(clip)
        watching = asyncio.create_task(viewer.watch())
        await asyncio.to_thread(entered.wait, DEADLINE_S)
        watching.cancel()
        await asyncio.sleep(0.02)
        gate.set()
        await asyncio.gather(watching, return_exceptions=True)
        assert (read, viewer.body, open_files()) == ([DATA], b"", begun)

    run(work())


def open_files() -> int:
    """List the media files that this process has open."""
    paths = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.exists() or path.is_symlink()]
    return sum("/clip.mp4" in path for path in paths)
