"""AudioVAE: sound latents -> samples, one chunk for each credit."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import partial
from typing import Any

from cluster.envelope import TensorEnvelope
from cluster.rank import run_within_memory
from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.messages import RequestContext, SoundChunk, SoundDecoded
from deployments.observability.logs import watch_stage
from deployments.stages.streams import produce_on_credit
from deployments.threads import run_in_thread_or_exit


class AudioVAEDeployment:
    """Serve deployment that decodes sound."""

    def __init__(
        self, checkpoint: str, device: str, dtype: str | None, num_threads: int, chunk_timeout_s: float
    ) -> None:
        import torch

        from cosmos3_core.checkpoint.load import load_audio_vae
        from cosmos3_core.device import DTYPES, resolve_device

        self._run = partial(run_in_thread_or_exit, chunk_timeout_s)
        torch.set_num_threads(num_threads)
        self._device = resolve_device(device)
        self._vae = load_audio_vae(
            CheckpointLayout.open(checkpoint), device=self._device, dtype=DTYPES[dtype] if dtype else None
        )

    async def decode(
        self, context: RequestContext, latents: TensorEnvelope, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[SoundChunk | SoundDecoded]:
        """Decode a request's sound; yield a :class:`SoundChunk` and its :class:`SoundDecoded` in turns.

        Args:
            latents: [C, T] fp32.
            clips: the Director's :class:`cluster.clip_stream.ClipStreams`; each chunk takes a credit of the clip's.
            producer: names this decoder in the clip's stream.

        Raises:
            DeadlineExceeded: the request's time is up.
            OutOfMemory: the sound does not fit.
        """
        chunks = self._vae.decode(latents.tensor())

        async def next_chunk() -> TensorEnvelope | None:
            return await self._run(run_within_memory, self._device, lambda: _next_samples(chunks))

        numbered = produce_on_credit(context, clips, stream_id, producer, next_chunk)
        with watch_stage(context, "decode sound"):
            async with aclosing(numbered):
                async for index, samples in numbered:
                    yield SoundChunk(index, samples, os.getpid())
                    yield SoundDecoded(index, time.time(), os.getpid())


def _next_samples(chunks: Any) -> TensorEnvelope | None:
    samples = next(chunks, None)
    return None if samples is None else TensorEnvelope.of_tensor(samples)
