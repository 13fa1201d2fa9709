"""Transformer: one replica is the leader of one gang of ranks. It holds no weights and touches no GPU."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator

from cluster.engine_loop import EngineLoop, Queued
from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed
from cluster.gang import Gang, GangSpec
from cluster.rank import StepReport
from cosmos3_core.denoise_request import DenoiseRequest
from deployments.messages import LatentsReady, QueuePosition, RequestContext, StepsDone

# Long enough for the failures to reach their callers before the process ends.
_LAST_WORDS_S = 0.2


class Transformer:
    """The leader.

    Args:
        spec: of the gang.
        max_jobs: requests that one gang takes at once, the running one included.
    """

    async def __init__(self, spec: GangSpec, max_jobs: int) -> None:  # type: ignore[misc] # Serve awaits it
        self._gang = await Gang.start(spec)
        self._loop = EngineLoop(self._gang, max_jobs=max_jobs, first_quantum_timeout_s=spec.start_timeout_s)

    async def denoise(
        self, context: RequestContext, request: DenoiseRequest
    ) -> AsyncIterator[QueuePosition | StepsDone | LatentsReady | TensorEnvelope]:
        """Denoise a request: positions and steps, then :class:`LatentsReady`, then the latents' envelope.

        Raises:
            OverloadedError: this gang's queue is full.
            GangFailed: the gang died; it is being rebuilt, and the request may be tried on another.
            RequestError: the request's fault.
        """
        job_id = f"{context.request_id}/{context.attempt}"
        start_s = time.monotonic()
        try:
            async for update in self._loop.submit(job_id, request, context.deadline_s):
                match update:
                    case Queued(position):
                        yield QueuePosition(position, os.getpid())
                    case StepReport():
                        yield StepsDone(update.step, update.num_steps, update.sigma, update.pid)
                    case TensorEnvelope():
                        ranks = tuple(info.pid for info in self._gang.infos)
                        yield LatentsReady(time.monotonic() - start_s, os.getpid(), ranks)
                        yield update
        except GangFailed:
            asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
            raise

    async def check_health(self) -> None:
        """Serve's question. A failed gang answers by its end; this is the second net.

        Raises:
            GangFailed: the gang is gone.
        """
        if self._loop.failure is not None:
            raise self._loop.failure
