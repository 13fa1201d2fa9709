"""The encoder between a clip's stream and the media store, without Ray: files, failures, cancellation."""

from __future__ import annotations

import asyncio
import contextvars
import pickle
import threading
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
import pytest

from cluster.clip_stream import ClipStreams
from cluster.envelope import TensorEnvelope
from cluster.errors import DeadlineExceeded, StreamClosed
from cosmos3_core.errors import ClosedError
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.probe import read_frames
from cosmos3_core.media.writer import ClipFormat
from deployments.config import MediaConfig
from deployments.failures import Blame, explain_error
from deployments.jobs.job import new_job_id
from deployments.media.layout import DONE, FAILED, new_media_id
from deployments.media.store import MediaStore
from deployments.messages import ChunkEncoded, ClipEncoded, FileStarted, FrameChunk, RequestContext
from deployments.stages import mp4_encoder
from deployments.stages.mp4_encoder import Mp4Encoder
from deployments.threads import run_in_thread
from tests.serve_fakes import Handle
from tests.settling import run

FORMAT = ClipFormat("mp4", height=32, width=48, fps=24, lossless=True)


async def fetch(chunk: FrameChunk) -> FrameChunk:
    return chunk


class Bench:
    """An encoder, a store and one clip's stream with two strips a chunk."""

    def __init__(self, directory: Path, num_chunks: int) -> None:
        self.media_id = new_media_id(new_job_id())
        self.config = MediaConfig(directory=directory, max_bytes=10**9, keep_s=3600)
        self.store, self.clips = MediaStore.of(self.config), ClipStreams(1)
        self.encoder = cast(Any, Mp4Encoder).__new__(Mp4Encoder)
        self.chunks = [np.full((2, 32, 48, 3), 40 * index, np.uint8) for index in range(num_chunks)]

    async def post_all(self) -> None:
        await self.encoder.__init__(self.config, 60.0)
        await self.clips.open("clip", window=len(self.chunks) + 1)
        for index, frames in enumerate(self.chunks):
            assert await self.clips.acquire("clip", "p", 5)
            strips = tuple(TensorEnvelope.of_array(part) for part in np.split(frames, 2, axis=2))
            await self.clips.post("clip", "p", [fetch(FrameChunk(index, strips, 2, 7))])

    def encode(self, limit_s: float = 30) -> Any:
        context = RequestContext.new("r", limit_s)
        return self.encoder.encode(context, FORMAT, self.media_id, Handle(self.clips), "clip")

    @property
    def state(self) -> str:
        record = self.store.find(self.media_id)
        assert record is not None
        return record.state


def test_a_clips_chunks_become_its_file(tmp_path: Path) -> None:
    async def body() -> None:
        bench = Bench(tmp_path, 3)
        await bench.post_all()
        await bench.clips.complete("clip")
        events = [event async for event in bench.encode()]
        assert [type(event) for event in events] == [FileStarted, *[ChunkEncoded] * 3, ClipEncoded]
        assert (events[0].media_id, events[0].media_type) == (bench.media_id, "video/mp4")
        assert [(event.num_frames, event.decoded_by) for event in events[1:4]] == [(2, 7)] * 3
        assert (events[-1].num_frames, bench.state) == (6, DONE)
        record = bench.store.find(bench.media_id)
        assert record is not None
        assert events[-1].num_bytes == record.num_bytes == bench.store.file_path(record).stat().st_size
        shown = np.stack(list(read_frames(bench.store.file_path(record)))).astype(int)
        assert np.abs(shown - np.concatenate(bench.chunks)).max() <= 2
        assert bench.store.live_path(record).stat().st_size > 0

    run(body())


def test_a_request_past_its_deadline_leaves_a_failed_file(tmp_path: Path) -> None:
    async def body() -> None:
        bench = Bench(tmp_path, 1)
        await bench.post_all()
        with pytest.raises(DeadlineExceeded):
            async for _ in bench.encode(limit_s=0.5):
                pass
        assert bench.state == FAILED

    run(body())


def test_a_clip_without_room_fails_as_a_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A retry on another encoder would meet the same; see tests/director/test_retries.py."""

    def fail(*_: Any) -> None:
        raise av.error.MemoryError(12, "Cannot allocate memory")

    monkeypatch.setattr(Mp4Writer, "_mux_video", fail)

    async def body() -> None:
        bench = Bench(tmp_path, 1)
        await bench.post_all()
        with pytest.raises(MemoryError) as caught:
            async for _ in bench.encode():
                pass
        explained = explain_error(pickle.loads(pickle.dumps(caught.value)))
        assert (explained.code, explained.blame, bench.state) == ("out_of_memory", Blame.REQUEST, FAILED)
        assert "encoding stopped at frame 0" in explained.message

    run(body())


def test_cancellation_waits_for_the_writers_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Closing an encoder in the middle of its work would crash the process."""
    entered, gate, order = threading.Event(), threading.Event(), []
    write = mp4_encoder._write

    def hold(writer: Any, *arguments: Any) -> int:
        entered.set()
        assert gate.wait(30)
        monkeypatch.setattr(writer, "abort", lambda: order.append("closed"))
        num_new = write(writer, *arguments)
        order.append("written")
        return num_new

    monkeypatch.setattr(mp4_encoder, "_write", hold)

    async def body() -> None:
        bench = Bench(tmp_path, 1)
        await bench.post_all()

        async def all_of_it() -> None:
            async for _ in bench.encode():
                pass

        encoding = asyncio.create_task(all_of_it())
        await asyncio.to_thread(entered.wait, 30)
        for _ in range(2):
            encoding.cancel()
            await asyncio.sleep(0.05)
        assert not encoding.done()
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await encoding
        assert order == ["written", "closed"]
        assert bench.state == FAILED

    run(body())


def test_encoding_does_not_block_the_event_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: dict[str, bool] = {}

    def note(name: str, work: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            threads[name] = threading.current_thread() is threading.main_thread()
            return work(*arguments, **named)

        return call

    def open_noting(*arguments: Any, **named: Any) -> Any:
        writer: Any = open_writer(*arguments, **named)
        for name in ("write", "close", "abort"):
            monkeypatch.setattr(writer, name, note(name, getattr(writer, name)))
        return writer

    open_writer = mp4_encoder.open_writer
    monkeypatch.setattr(mp4_encoder, "open_writer", note("open", open_noting))

    async def body(*, is_given_up: bool) -> None:
        bench = Bench(tmp_path, 1)
        await bench.post_all()
        if not is_given_up:
            await bench.clips.complete("clip")
        with pytest.raises(StreamClosed) if is_given_up else nullcontext():
            async for event in bench.encode():
                if is_given_up and isinstance(event, ChunkEncoded):
                    await bench.clips.close("clip", "it was given up")

    for is_given_up, last in ((False, "close"), (True, "abort")):
        threads.clear()
        run(body(is_given_up=is_given_up))
        assert threads.items() >= dict.fromkeys(("open", "write", last), False).items()
        assert not any(threads.values())


@pytest.mark.parametrize("when", ["create", "open"])
def test_cancellation_during_the_start_leaves_a_failed_file(
    when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entered, gate, writers = threading.Event(), threading.Event(), []

    def hold(work: Any) -> Any:
        def call(*arguments: Any, **named: Any) -> Any:
            entered.set()
            assert gate.wait(30)
            writers.append(work(*arguments, **named))
            return writers[0]

        return call

    async def body() -> None:
        bench = Bench(tmp_path, 0)
        await bench.post_all()
        if when == "create":
            monkeypatch.setattr(bench.encoder._media, "create", hold(bench.encoder._media.create))
        else:
            monkeypatch.setattr(mp4_encoder, "open_writer", hold(mp4_encoder.open_writer))
        beginning = asyncio.create_task(anext(bench.encode()))
        await asyncio.to_thread(entered.wait, 30)
        beginning.cancel()
        await asyncio.sleep(0.02)
        gate.set()
        with pytest.raises(asyncio.CancelledError):
            await beginning
        assert bench.state == FAILED
        if when == "open":
            with pytest.raises(ClosedError):
                writers[0].write(np.zeros((1, 32, 48, 3), np.uint8))

    run(body())


def test_the_store_is_swept_periodically_despite_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept, times = threading.Event(), []
    whose: list[str | None] = []
    asked = contextvars.ContextVar[str | None]("asked", default=None)

    def sweep(store: Any, find_needs: None, now_s: float) -> int:
        assert find_needs is None, "it has no database"
        times.append(now_s)
        whose.append(asked.get())
        if len(times) == 2:
            raise OSError("away for a moment")
        if len(times) == 4:
            swept.set()
        return 0

    monkeypatch.setattr(MediaStore, "sweep", sweep)
    monkeypatch.setattr(mp4_encoder, "_SWEEP_PERIOD_S", 0.05)

    async def body() -> None:
        asked.set("the caller's")
        bench = Bench(tmp_path, 0)
        await bench.encoder.__init__(bench.config, 60.0)
        await asyncio.sleep(0.2)
        assert times == [], "without an archive the Directors sweep, which know what is needed"
        archived = bench.config.model_copy(update={"archive": f"file://{tmp_path}/archive"})
        await bench.encoder.__init__(archived, 60.0)
        assert await asyncio.to_thread(swept.wait, 30)

    run(body())
    assert all(later - earlier >= 0.04 for earlier, later in pairwise(times))
    assert set(whose) == {None}


def test_work_in_a_thread_returns_or_raises() -> None:
    async def body() -> None:
        assert await run_in_thread(divmod, 7, 2) == (3, 1)
        with pytest.raises(ZeroDivisionError):
            await run_in_thread(divmod, 7, 0)

    run(body())
