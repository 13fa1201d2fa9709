"""Mp4Encoder: frames and sound -> a file in the media store, which can be read while it grows.

One call takes a whole clip, so that its chunks meet in one place.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from typing import Any

from cosmos3_core.media.pixels import FrameHash
from cosmos3_core.media.writer import ClipFormat, MediaWriter, open_writer
from deployments.failures import summarize_error
from deployments.media.store import MediaEntry, MediaSpec
from deployments.messages import ChunkEncoded, ClipEncoded, FileStarted, FrameChunk, RequestContext, SoundChunk
from deployments.observability.logs import watch_stage
from deployments.stages.streams import wait_within
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

_SWEEP_PERIOD_S = 60.0


class Mp4Encoder:
    """The encoder. Keeps nothing between clips; keeps the media store within its bounds.

    Args:
        media: of the store where files go.
    """

    async def __init__(self, media: MediaSpec) -> None:  # type: ignore[misc] # Serve awaits it
        self._media = media.open()
        # A task of no request.
        self._sweeper = asyncio.get_running_loop().create_task(self._sweep(), context=contextvars.Context())

    async def encode(
        self, context: RequestContext, clip_format: ClipFormat, media_id: str, clips: Any, stream_id: str
    ) -> AsyncIterator[FileStarted | ChunkEncoded | ClipEncoded]:
        """Take a clip's chunks from its stream and encode them.

        Args:
            context: of the request.
            clip_format: what to make.
            media_id: of the file, which is made here.
            clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
            stream_id: the clip's.

        Yields:
            :class:`FileStarted`, a :class:`ChunkEncoded` each, then :class:`ClipEncoded`: the file is whole.

        Raises:
            StreamClosed: the clip was given up.
            DeadlineExceeded: the request's time is up.
            MediaError: the file could not be written.
        """
        start_s = time.monotonic()
        with watch_stage(context, "encode") as watch:
            try:
                entry = await run_in_thread(self._create, media_id, clip_format)
                digest, num_frames = FrameHash(), 0
                async with _opened(entry, clip_format) as writer:
                    yield FileStarted(media_id, clip_format.media_type, os.getpid())
                    while boxed := await _next_chunk(context, clips, stream_id):
                        chunk: FrameChunk | SoundChunk = await wait_within(context, "encode", boxed[0])
                        num_new = await run_in_thread(_write, writer, digest, chunk)
                        num_frames += num_new
                        event = ChunkEncoded(chunk.index, num_new, chunk.pid, time.time(), os.getpid())
                        # Nothing may hold the chunk when its credit goes back: the credit stands for its memory.
                        del boxed, chunk
                        await wait_within(context, "encode", clips.release.remote(stream_id))
                        if num_new:
                            yield event
                record = await run_in_thread(entry.finish)
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

    async def _sweep(self) -> None:
        """Remove what is too old or too much, now and from time to time."""
        while True:
            try:
                await asyncio.to_thread(self._media.sweep, time.time())
            except Exception:  # what is wrong now may be right in a minute
                logger.exception("the media store could not be swept")
            await asyncio.sleep(_SWEEP_PERIOD_S)


@asynccontextmanager
async def _opened(entry: MediaEntry, clip_format: ClipFormat) -> AsyncIterator[MediaWriter]:
    """The writer, closed at the end and given up after an exception.

    All in threads: x264 takes seconds at 720p to be flushed, and to be given up. The other clip and Serve's questions
    go on meanwhile.
    """
    with_writer = ExitStack()  # knows of a writer that was opened for somebody who was cancelled meanwhile

    def enter() -> MediaWriter:
        return with_writer.enter_context(open_writer(entry.path, clip_format, live=entry.live_path))

    try:
        yield await run_in_thread(enter)
    except BaseException as error:
        await run_in_thread(with_writer.__exit__, type(error), error, error.__traceback__)
        raise
    await run_in_thread(with_writer.close)


async def _next_chunk(context: RequestContext, clips: Any, stream_id: str) -> list[Any]:
    left_s = context.remaining_s("encode")
    boxed: list[Any] = await wait_within(context, "encode", clips.take.remote(stream_id, left_s))
    return boxed


def _write(writer: MediaWriter, digest: FrameHash, chunk: FrameChunk | SoundChunk) -> int:
    """Returns how many frames that were."""
    if isinstance(chunk, SoundChunk):
        writer.write_sound(chunk.samples.array())
        return 0
    frames = chunk.frames()
    writer.write(frames)
    digest.update(frames)
    return len(frames)
