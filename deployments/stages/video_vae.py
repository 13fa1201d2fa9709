"""VideoVAE: given pictures -> latents; latents -> frames, chunk by chunk, each made when there is a credit for it.

One replica is the leader of one gang of ranks, which split every frame between them. It holds no weights and touches no
GPU.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed
from cluster.gang import Gang, GangSpec
from cluster.gang_calls import GangCalls
from cluster.video_vae_rank import ChunkStrip
from cosmos3_core.conditioning.picture import PictureCondition, read_picture
from cosmos3_core.media.apart import read_clip_apart
from cosmos3_core.preview import PreviewMap
from deployments.messages import ChunkDecoded, FrameChunk, PictureEncoded, RequestContext
from deployments.observability.logs import origin_of, watch_stage
from deployments.stages.credits import produce_on_credit
from deployments.stages.gang_leader import GangLeader
from deployments.stages.streams import wait_within


@dataclass(frozen=True)
class VAECalls:
    """How long a gang may take for one call; a silent one then counts as hung.

    Attributes:
        first_timeout_s: for a clip's first two chunks, compiling for their size included, for encoding, and for fitting
            the map of previews.
        timeout_s: for any later chunk.
    """

    first_timeout_s: float
    timeout_s: float


class VideoVAE(GangLeader):
    """The leader.

    Args:
        spec: of the gang.
        limits: of its calls.
    """

    async def __init__(self, spec: GangSpec, limits: VAECalls) -> None:  # type: ignore[misc] # Serve awaits it
        self._limits = limits
        self._gang = await Gang.start(spec)
        self._calls = GangCalls(self._gang, self._end_soon)

    async def encode(
        self, context: RequestContext, picture: PictureCondition
    ) -> AsyncIterator[PictureEncoded | TensorEnvelope]:
        """Encode what a request gives: a :class:`PictureEncoded`, then the latents' envelope, fp32.

        Raises:
            RequestError: the media is damaged, or larger than allowed.
            DeadlineExceeded: the request's time is up.
            OutOfMemory: it does not fit.
            GangFailed: the gang died; it is being rebuilt, and the picture may be encoded by another.
        """
        start_s = time.monotonic()
        with watch_stage(context, "condition") as watch:
            read = partial(read_clip_apart, limit_s=context.remaining_s("condition"))
            frames = await asyncio.to_thread(read_picture, picture, read=read)
            asked = self._calls.ask(
                "encode",
                replace(picture, media=b""),
                TensorEnvelope.of_array(frames),
                origin_of(context),
                phase="encode",
                timeout_s=self._limits.first_timeout_s,
            )
            latents: TensorEnvelope = (await wait_within(context, "condition", asked))[0]
            watch.finish()
            yield PictureEncoded(time.monotonic() - start_s, latents.shape[2], os.getpid())
            yield latents

    async def preview_map(self, context: RequestContext) -> AsyncIterator[PreviewMap]:
        """The map of previews of this VAE's latents, one item; rank 0 has it since its start, or tries once more.

        Raises:
            DeadlineExceeded: the call came too late, or waited too long.
            PreviewFailed: it cannot be made.
            GangFailed: the gang died; it is being rebuilt.
        """
        asked = self._calls.first("preview_map", phase="previews", timeout_s=self._limits.first_timeout_s)
        preview_map: PreviewMap = await wait_within(context, "previews", asked)
        yield preview_map

    async def decode(
        self, context: RequestContext, latents: TensorEnvelope, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[FrameChunk | ChunkDecoded]:
        """Decode a clip: a :class:`FrameChunk`, then its :class:`ChunkDecoded`, and so on.

        Args:
            context: of the request.
            latents: [1, C, T, H, W] fp32.
            clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
            stream_id: the clip's; a chunk is only made when it has a credit.
            producer: this decoder's name in it.

        Raises:
            DeadlineExceeded: the request's time is up.
            OutOfMemory: the clip does not fit.
            GangFailed: the gang died; it is being rebuilt, and the clip may be decoded by another. :class:`GangLost`
                where it was at work for somebody else, while this clip waited for a credit too.
        """
        clip_id = f"{stream_id}/{producer}"
        num_made = 0

        async def next_chunk() -> list[ChunkStrip] | None:
            nonlocal num_made
            # The second chunk is the first of the shape that all the others have.
            timeout_s = self._limits.first_timeout_s if num_made < 2 else self._limits.timeout_s
            num_made += 1
            strips = await self._calls.ask("next_strip", clip_id, phase="decode", timeout_s=timeout_s)
            return None if strips[0] is None else strips

        whose = origin_of(context)
        with watch_stage(context, "decode"):
            try:
                begun = self._calls.ask(
                    "begin", clip_id, latents, whose, phase="decode", timeout_s=self._limits.timeout_s
                )
                await wait_within(context, "decode", begun)
                made = produce_on_credit(context, clips, stream_id, producer, next_chunk, self._calls.while_up)
                async with aclosing(made):
                    async for index, strips in made:
                        yield FrameChunk(index, tuple(strip.frames for strip in strips), strips[0].axis, strips[0].pid)
                        yield ChunkDecoded(index, time.time(), os.getpid())
            finally:
                self._calls.tell("end", clip_id, phase="decode", timeout_s=self._limits.timeout_s)

    @property
    def _failure(self) -> GangFailed | None:
        return self._calls.failure
