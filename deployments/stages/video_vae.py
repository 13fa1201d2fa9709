"""VideoVAE: given images and clips -> latents; latents -> frames, one chunk for each credit.

One replica leads one gang of ranks, which split every frame between them. The leader holds no weights and touches no
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
from cosmos3_core.media.child_reader import read_clip_in_child
from cosmos3_core.preview import PreviewMap
from deployments.messages import ChunkDecoded, FrameChunk, PictureEncoded, RequestContext
from deployments.observability.logs import make_origin, watch_stage
from deployments.stages.gang_leader import GangLeader
from deployments.stages.streams import produce_on_credit, wait_within


@dataclass(frozen=True)
class CallLimits:
    """Time limits of one call to the gang; a gang that does not answer in time counts as hung.

    Attributes:
        first_timeout_s: for a clip's first two chunks (kernels may be compiled for their size), for encoding, and for
            fitting the preview map.
        timeout_s: for any later chunk.
    """

    first_timeout_s: float
    timeout_s: float


class VideoVAEDeployment(GangLeader):
    """Serve deployment that leads a gang of video VAE ranks."""

    async def __init__(self, spec: GangSpec, limits: CallLimits) -> None:  # type: ignore[misc] # Serve awaits it
        self._limits = limits
        self._gang = await Gang.start(spec)
        self._calls = GangCalls(self._gang, self._exit_soon)

    async def encode(
        self, context: RequestContext, picture: PictureCondition
    ) -> AsyncIterator[PictureEncoded | TensorEnvelope]:
        """Encode a request's image or clip; yield :class:`PictureEncoded`, then the envelope of its fp32 latents.

        Raise RequestError if the media is damaged or larger than allowed, and DeadlineExceeded, OutOfMemory and
        GangFailed as :meth:`decode`.
        """
        start_s = time.monotonic()
        with watch_stage(context, "condition") as watch:
            read = partial(read_clip_in_child, limit_s=context.remaining_s("condition"))
            frames = await asyncio.to_thread(read_picture, picture, read=read)
            call = self._calls.call(
                "encode",
                replace(picture, media=b""),
                TensorEnvelope.of_array(frames),
                make_origin(context),
                phase="encode",
                timeout_s=self._limits.first_timeout_s,
            )
            latents: TensorEnvelope = (await wait_within(context, "condition", call))[0]
            watch.finish()
            yield PictureEncoded(time.monotonic() - start_s, latents.shape[2], os.getpid())
            yield latents

    async def preview_map(self, context: RequestContext) -> AsyncIterator[PreviewMap]:
        """Yield the map from this VAE's latents to preview colours. Rank 0 fits it at its start, or now.

        Raise PreviewFailed if the map cannot be fitted, and DeadlineExceeded and GangFailed as :meth:`decode`.
        """
        call = self._calls.call_rank_0("preview_map", phase="previews", timeout_s=self._limits.first_timeout_s)
        preview_map: PreviewMap = await wait_within(context, "previews", call)
        yield preview_map

    async def decode(
        self, context: RequestContext, latents: TensorEnvelope, clips: Any, stream_id: str, producer: str
    ) -> AsyncIterator[FrameChunk | ChunkDecoded]:
        """Decode a clip; yield a :class:`FrameChunk` and its :class:`ChunkDecoded` in turns.

        Args:
            latents: [1, C, T, H, W] fp32.
            clips: the Director's :class:`cluster.clip_stream.ClipStreams`; each chunk takes a credit of the clip's.
            producer: names this decoder in the clip's stream.

        Raises:
            DeadlineExceeded: the request's time is up.
            OutOfMemory: the clip does not fit into the ranks' memory.
            GangFailed: the gang died and is being rebuilt; the clip may be decoded by another. :class:`GangLost` if it
                died while this clip waited for a credit.
        """
        clip_id = f"{stream_id}/{producer}"
        num_chunks = 0

        async def next_chunk() -> list[ChunkStrip] | None:
            nonlocal num_chunks
            # The second chunk is the first one of the later chunks' shape.
            timeout_s = self._limits.first_timeout_s if num_chunks < 2 else self._limits.timeout_s
            num_chunks += 1
            strips = await self._calls.call("next_strip", clip_id, phase="decode", timeout_s=timeout_s)
            return None if strips[0] is None else strips

        origin = make_origin(context)
        with watch_stage(context, "decode"):
            try:
                beginning = self._calls.call(
                    "begin", clip_id, latents, origin, phase="decode", timeout_s=self._limits.timeout_s
                )
                await wait_within(context, "decode", beginning)
                chunks = produce_on_credit(context, clips, stream_id, producer, next_chunk, self._calls.wait_while_up)
                async with aclosing(chunks):
                    async for index, strips in chunks:
                        yield FrameChunk(index, tuple(strip.frames for strip in strips), strips[0].axis, strips[0].pid)
                        yield ChunkDecoded(index, time.time(), os.getpid())
            finally:
                self._calls.post("end", clip_id, phase="decode", timeout_s=self._limits.timeout_s)

    @property
    def _failure(self) -> GangFailed | None:
        return self._calls.failure
