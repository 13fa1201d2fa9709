"""Mp4Encoder: frames -> a file. One call takes a whole clip, so that its chunks meet in one place."""

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
from deployments.messages import ChunkEncoded, ClipEncoded, FrameChunk, MediaPart, RequestContext

_PART_BYTES = 1 << 20


class Mp4Encoder:
    """The encoder. Keeps nothing between clips."""

    async def encode(
        self, context: RequestContext, clip_format: ClipFormat, clips: Any, stream_id: str
    ) -> AsyncIterator[ChunkEncoded | ClipEncoded | MediaPart]:
        """Take a clip's chunks from its stream and encode them.

        Yields:
            A :class:`ChunkEncoded` each, then :class:`ClipEncoded`, then the file in parts.

        Raises:
            StreamClosed: the clip was given up.
            DeadlineExceeded: the request's time is up.
            MediaError: the file could not be written.
        """
        start_s = time.monotonic()
        digest, num_frames = FrameHash(), 0
        with tempfile.TemporaryDirectory(prefix="cosmos3-encode-") as directory:
            path = Path(directory) / "clip"
            with open_writer(path, clip_format) as writer:
                while boxed := await clips.take.remote(stream_id, context.remaining_s("encode")):
                    chunk: FrameChunk = await boxed[0]
                    frames = chunk.frames.array()
                    await asyncio.to_thread(_write, writer, digest, frames)
                    num_frames += len(frames)
                    event = ChunkEncoded(chunk.index, len(frames), chunk.pid, time.time(), os.getpid())
                    # Nothing may hold the chunk when its credit goes back: the credit stands for its memory.
                    del boxed, chunk, frames
                    await clips.release.remote(stream_id)
                    yield event
            data = await asyncio.to_thread(path.read_bytes)
        yield ClipEncoded(digest.hexdigest(), num_frames, len(data), time.monotonic() - start_s, os.getpid())
        for start in range(0, len(data), _PART_BYTES):
            yield MediaPart(data[start : start + _PART_BYTES])


def _write(writer: MediaWriter, digest: FrameHash, frames: Any) -> None:
    writer.write(frames)
    digest.update(frames)
