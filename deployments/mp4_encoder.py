"""Mp4Encoder: frames and sound -> a file. One call takes a whole clip, so that its chunks meet in one place."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from cosmos3_core.media.pixels import FrameHash
from cosmos3_core.media.writer import ClipFormat, MediaWriter, open_writer
from deployments.messages import (
    ChunkEncoded,
    ClipEncoded,
    EncoderReady,
    FrameChunk,
    MediaPart,
    RequestContext,
    SoundChunk,
)
from deployments.streams import in_time

_PART_BYTES = 1 << 20


class Mp4Encoder:
    """The encoder. Keeps nothing between clips."""

    async def encode(
        self, context: RequestContext, clip_format: ClipFormat, clips: Any, stream_id: str
    ) -> AsyncIterator[EncoderReady | ChunkEncoded | ClipEncoded | MediaPart]:
        """Take a clip's chunks from its stream and encode them.

        Yields:
            :class:`EncoderReady`, a :class:`ChunkEncoded` each, then :class:`ClipEncoded`, then the file in parts.

        Raises:
            StreamClosed: the clip was given up.
            DeadlineExceeded: the request's time is up.
            MediaError: the file could not be written.
        """
        yield EncoderReady(os.getpid())
        start_s = time.monotonic()
        digest, num_frames = FrameHash(), 0
        with tempfile.TemporaryDirectory(prefix="cosmos3-encode-") as directory:
            path = Path(directory) / "clip"
            with open_writer(path, clip_format) as writer:
                while boxed := await _next_chunk(context, clips, stream_id):
                    chunk: FrameChunk | SoundChunk = await in_time(context, "encode", boxed[0])
                    num_new = await asyncio.to_thread(_write, writer, digest, chunk)
                    num_frames += num_new
                    event = ChunkEncoded(chunk.index, num_new, chunk.pid, time.time(), os.getpid())
                    # Nothing may hold the chunk when its credit goes back: the credit stands for its memory.
                    del boxed, chunk
                    await in_time(context, "encode", clips.release.remote(stream_id))
                    if num_new:
                        yield event
                # Flushing x264 takes seconds at 720p; the other clip and Serve's questions go on meanwhile.
                await asyncio.to_thread(writer.close)
            data = await asyncio.to_thread(path.read_bytes)
        yield ClipEncoded(
            digest.hexdigest() if num_frames else "", num_frames, len(data), time.monotonic() - start_s, os.getpid()
        )
        for start in range(0, len(data), _PART_BYTES):
            yield MediaPart(data[start : start + _PART_BYTES])


async def _next_chunk(context: RequestContext, clips: Any, stream_id: str) -> list[Any]:
    left_s = context.remaining_s("encode")
    boxed: list[Any] = await in_time(context, "encode", clips.take.remote(stream_id, left_s))
    return boxed


def _write(writer: MediaWriter, digest: FrameHash, chunk: FrameChunk | SoundChunk) -> int:
    """Returns how many frames that were."""
    if isinstance(chunk, SoundChunk):
        writer.write_sound(chunk.samples.array())
        return 0
    frames = chunk.frames.array()
    writer.write(frames)
    digest.update(frames)
    return len(frames)
