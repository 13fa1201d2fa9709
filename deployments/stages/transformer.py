"""Transformer: denoises latents. One replica leads one gang of ranks; it holds no weights and touches no GPU."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator

from cluster.engine_loop import Denoised, EngineLoop, LoopSpec, SavedState
from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed
from cluster.events import PreviewReady, PreviewsOff, QueuePosition, StepDone
from cluster.gang import Gang, GangSpec
from cluster.transformer_rank import TransformerLoaded
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.preview import PreviewOrder
from deployments.messages import LatentsReady, RequestContext, StateSaved
from deployments.observability.logs import make_origin, watch_stage
from deployments.observability.metrics import metrics
from deployments.stages.gang_leader import GangLeader


class Transformer(GangLeader):
    """Serve deployment that leads a gang of transformer ranks."""

    async def __init__(self, spec: GangSpec, loop: LoopSpec) -> None:  # type: ignore[misc] # Serve awaits it
        self._gang = await Gang.start(spec)
        loaded = self._gang.loaded
        assert isinstance(loaded, TransformerLoaded)
        self._loop = EngineLoop(self._gang, loaded.request_memory, loop, self._exit_soon, metrics())

    async def denoise(
        self,
        context: RequestContext,
        request: DenoiseRequest,
        state: TensorEnvelope | None = None,
        clean: TensorEnvelope | None = None,
        previews: PreviewOrder | None = None,
    ) -> AsyncIterator[
        QueuePosition | StepDone | PreviewReady | PreviewsOff | StateSaved | LatentsReady | TensorEnvelope
    ]:
        """Denoise a request; yield positions and steps, then :class:`LatentsReady`, then the latents' envelopes.

        ``clean`` holds the latents of the frames that the request gives. With ``previews`` a :class:`PreviewReady`
        follows some of the steps, until a :class:`PreviewsOff` says that no more will come.

        A :class:`StateSaved` and its envelope come periodically. Any gang resumes the request from that envelope, given
        as ``state``.

        Raises:
            OverloadedError: this gang's queue is full.
            GangFailed: the gang died and is being rebuilt; the request may be retried on another.
            DeadlineExceeded: the request's time is up.
            OutOfMemory: the request does not fit into the ranks' memory.
            RequestError: a value of the request cannot be used.
        """
        start_s = time.monotonic()
        pid = os.getpid()
        left_s = context.remaining_s("denoise")
        job = context.try_id, request, left_s, state, clean, previews
        with watch_stage(context, "denoise") as watch:
            async for update in self._loop.submit(*job, make_origin(context)):
                match update:
                    case SavedState(step, envelope):
                        yield StateSaved(step, envelope.num_bytes, pid)
                        yield envelope
                    case Denoised(latents):
                        watch.finish(num_steps=request.num_inference_steps)
                        ranks = tuple(info.pid for info in self._gang.infos)
                        yield LatentsReady(time.monotonic() - start_s, tuple(latents), pid, ranks)
                        for envelope in latents.values():
                            yield envelope
                    case event:
                        yield event

    @property
    def _failure(self) -> GangFailed | None:
        return self._loop.failure
