"""Mp4Encoder: frames and sound -> a file in the media store, readable while it grows.

One call encodes a whole clip, so that all its chunks reach the same replica.
"""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from functools import partial
from typing import Any

from cosmos3_core.media.output import MediaWriter
from cosmos3_core.media.pixels import FrameHash
from cosmos3_core.media.writer import ClipFormat, open_writer
from deployments.config import MediaConfig
from deployments.failures import summarize_error
from deployments.media.store import MediaEntry, MediaStore
from deployments.messages import ChunkEncoded, ClipEncoded, FileStarted, FrameChunk, RequestContext, SoundChunk
from deployments.observability.logs import watch_stage
from deployments.stages.streams import wait_within
from deployments.threads import repeat_in_thread, run_in_thread, run_in_thread_or_exit, start_task

_SWEEP_PERIOD_S = 60.0


class Mp4Encoder:
    """Serve deployment that encodes clips, without state between them. With an archive it also sweeps its directory."""

    async def __init__(self, media: MediaConfig, chunk_timeout_s: float) -> None:  # type: ignore[misc] # Serve awaits it
        self._run = partial(run_in_thread_or_exit, chunk_timeout_s)
        self._media = MediaStore.of(media)
        if self._media.archive is None:
            return  # the Directors sweep the directory: they know what unfinished jobs need
        self._sweeper = start_task(repeat_in_thread(self._sweep, _SWEEP_PERIOD_S))

    async def encode(
        self, context: RequestContext, clip_format: ClipFormat, media_id: str, clips: Any, stream_id: str
    ) -> AsyncIterator[FileStarted | ChunkEncoded | ClipEncoded]:
        """Take a clip's chunks from its stream in ``clips``, and encode them to the file ``media_id``.

        Yields:
            :class:`FileStarted`, a :class:`ChunkEncoded` for each chunk of frames, and :class:`ClipEncoded` at the end.

        Raises:
            StreamClosed: the Director gave the clip up.
            DeadlineExceeded: the request's time is up.
            MediaError: the file could not be written.
        """
        start_s = time.monotonic()
        with watch_stage(context, "encode") as watch:
            try:
                entry = await self._run(self._create, media_id, clip_format)
                digest, num_frames = FrameHash(), 0
                async with _open_in_thread(self._run, entry, clip_format) as writer:
                    yield FileStarted(media_id, clip_format.media_type, os.getpid())
                    while boxed := await _next_chunk(context, clips, stream_id):
                        chunk: FrameChunk | SoundChunk = await wait_within(context, "encode", boxed[0])
                        num_new = await self._run(_write, writer, digest, chunk)
                        num_frames += num_new
                        event = ChunkEncoded(chunk.index, num_new, chunk.pid, time.time(), os.getpid())
                        # Drop the chunk before its credit goes back: the credit stands for its memory.
                        del boxed, chunk
                        await wait_within(context, "encode", clips.release_chunk.remote(stream_id))
                        if num_new:
                            yield event
                record = await self._run(entry.finish)
            except BaseException as error:
                await run_in_thread(self._media.fail, media_id, summarize_error(error))
                raise
            frames_sha256 = digest.hexdigest() if num_frames else ""
            seconds = time.monotonic() - start_s
            watch.finish(num_frames=num_frames, num_bytes=record.num_bytes)
            yield ClipEncoded(media_id, frames_sha256, num_frames, record.num_bytes, seconds, os.getpid())

    def _create(self, media_id: str, clip_format: ClipFormat) -> MediaEntry:
        is_live = clip_format.has_live_file
        return self._media.create(media_id, clip_format.media_type, clip_format.suffix, is_live=is_live)

    def _sweep(self) -> None:
        self._media.sweep(None, time.time())


@asynccontextmanager
async def _open_in_thread(
    run: Callable[..., Awaitable[Any]], entry: MediaEntry, clip_format: ClipFormat
) -> AsyncIterator[MediaWriter]:
    """Open the writer; close it at the end, or abandon its file after an exception.

    ``run`` calls all of it in threads: x264 takes seconds to flush a 720p clip, and the event loop must serve another
    clip and Serve's health checks meanwhile.
    """
    with_writer = ExitStack()  # also closes a writer that was opened while this task was cancelled

    def enter() -> MediaWriter:
        return with_writer.enter_context(open_writer(entry.path, clip_format, live=entry.live_path))

    try:
        yield await run(enter)
    except BaseException as error:
        await run(with_writer.__exit__, type(error), error, error.__traceback__)
        raise
    await run(with_writer.close)


async def _next_chunk(context: RequestContext, clips: Any, stream_id: str) -> list[Any]:
    left_s = context.remaining_s("encode")
    boxed: list[Any] = await wait_within(context, "encode", clips.take.remote(stream_id, left_s))
    return boxed


def _write(writer: MediaWriter, digest: FrameHash, chunk: FrameChunk | SoundChunk) -> int:
    """Write a chunk; return its number of frames, 0 for sound."""
    if isinstance(chunk, SoundChunk):
        writer.write_sound(chunk.samples.array())
        return 0
    frames = chunk.frames()
    writer.write(frames)
    digest.update(frames)
    return len(frames)
