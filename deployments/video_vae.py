"""VideoVAE: given pictures -> latents; latents -> frames, chunk by chunk, each made when there is a credit for it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

from cluster.envelope import TensorEnvelope
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.media.apart import read_clip_apart
from cosmos3_core.preview import PreviewMap
from deployments.credits import made_on_credit
from deployments.messages import ChunkDecoded, FrameChunk, PictureEncoded, RequestContext
from deployments.on_device import within_memory


class VideoVAE:
    """Encoder and decoder.

    Args:
        checkpoint: the checkpoint's directory.
        device: torch device string.
        dtype: name of the weights' dtype; None keeps what is stored.
        num_threads: torch's CPU threads.
        chunk_latents: latent frames per chunk, after the first; None: as the VAE chooses by the size of the frames.
    """

    def __init__(
        self, checkpoint: str, device: str, dtype: str | None, num_threads: int, chunk_latents: int | None
    ) -> None:
        import torch

        from cosmos3_core.checkpoint.load import load_video_vae
        from cosmos3_core.device import DTYPES, resolve_device

        torch.set_num_threads(num_threads)
        self._device = resolve_device(device)
        self._vae = load_video_vae(
            CheckpointLayout.open(checkpoint),
            device=self._device,
            dtype=DTYPES[dtype] if dtype else None,
        )
        self._chunk_latents = chunk_latents

    async def encode(
        self, context: RequestContext, picture: PictureCondition
    ) -> AsyncIterator[PictureEncoded | TensorEnvelope]:
        """Encode what a request gives: a :class:`PictureEncoded`, then the latents' envelope, fp32.

        Raises:
            RequestError: the media is damaged, or larger than allowed.
            DeadlineExceeded: the request's time is up.
            OutOfMemory: it does not fit.
        """
        start_s = time.monotonic()
        left_s = context.remaining_s("condition")
        latents = await asyncio.to_thread(within_memory, self._device, lambda: self._encode(picture, left_s))
        yield PictureEncoded(time.monotonic() - start_s, latents.shape[2], os.getpid())
        yield latents

    def _encode(self, picture: PictureCondition, limit_s: float) -> TensorEnvelope:
        from cosmos3_core.conditioning.clean import clean_latents

        read = partial(read_clip_apart, limit_s=limit_s)
        return TensorEnvelope.of_tensor(clean_latents(self._vae, picture, read=read))

    async def preview_map(self, context: RequestContext, cache_dir: str | None) -> AsyncIterator[PreviewMap]:
        """The map of previews of this VAE's latents, one item; fitted beside whatever is being decoded.

        Args:
            context: of the call.
            cache_dir: where this node keeps such maps; None: nowhere.

        Raises:
            DeadlineExceeded: the call came too late.
            OutOfMemory: the pictures that it is fitted to do not fit.
            CapabilityError: the VAE encodes no pictures.
        """
        from cosmos3_core.preview_fit import cached_preview_map

        context.remaining_s("previews")
        path = None if cache_dir is None else Path(cache_dir)
        yield await asyncio.to_thread(within_memory, self._device, lambda: cached_preview_map(self._vae, path))

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
        made = made_on_credit(context, clips, stream_id, self._device, lambda: _next_frames(chunks))
        async with aclosing(made):
            async for index, frames in made:
                yield ChunkDecoded(index, time.time())
                yield FrameChunk(index, frames, os.getpid())


def _next_frames(chunks: Any) -> TensorEnvelope | None:
    from cosmos3_core.media.pixels import to_uint8

    pixels = next(chunks, None)
    return None if pixels is None else TensorEnvelope.of_tensor(to_uint8(pixels))
