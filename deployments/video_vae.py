"""VideoVAE: latents -> frames, chunk by chunk, each made when there is a credit for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

from cluster.envelope import TensorEnvelope
from cluster.errors import OutOfMemory
from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.messages import ChunkDecoded, FrameChunk, RequestContext
from deployments.streams import in_time


class VideoVAE:
    """The decoder.

    Args:
        checkpoint: the checkpoint's directory.
        device: torch device string.
        dtype: name of the weights' dtype; None keeps what is stored.
        num_threads: torch's CPU threads.
        chunk_latents: latent frames per chunk, after the first.
    """

    def __init__(self, checkpoint: str, device: str, dtype: str | None, num_threads: int, chunk_latents: int) -> None:
        import torch

        from cosmos3_core.checkpoint.load import load_video_vae
        from cosmos3_core.device import DTYPES, resolve_device

        torch.set_num_threads(num_threads)
        self._device = resolve_device(device)
        self._vae = load_video_vae(
            CheckpointLayout.open(checkpoint),
            device=self._device,
            dtype=DTYPES[dtype] if dtype else None,
            with_encoder=False,
        )
        self._chunk_latents = chunk_latents

    async def decode(
        self, context: RequestContext, latents: TensorEnvelope, clips: Any, stream_id: str
    ) -> AsyncIterator[ChunkDecoded | FrameChunk]:
        """Decode a clip: a :class:`ChunkDecoded`, then its :class:`FrameChunk`, and so on.

        Args:
            context: of the request.
            latents: [1, C, T, H, W] fp32.
            clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
            stream_id: the clip's; a chunk is only made when it has a credit.

        Raises:
            DeadlineExceeded: the request's time is up.
            OutOfMemory: the clip does not fit.
        """
        chunks = self._vae.decode(latents.tensor(), chunk_latents=self._chunk_latents)
        index = 0
        while await in_time(context, "decode", clips.acquire.remote(stream_id, context.remaining_s("decode"))):
            frames = await asyncio.to_thread(_next_frames, chunks, self._device)
            if frames is None:
                return
            yield ChunkDecoded(index, time.time())
            yield FrameChunk(index, frames, os.getpid())
            index += 1


def _next_frames(chunks: Any, device: Any) -> TensorEnvelope | None:
    from cosmos3_core.device import forget_unused_memory, is_out_of_memory
    from cosmos3_core.media.pixels import to_uint8

    try:
        pixels = next(chunks, None)
        return None if pixels is None else TensorEnvelope.of_tensor(to_uint8(pixels))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0]
    forget_unused_memory(device)
    raise OutOfMemory(what)
