"""The leader's loop: one request after another, in quanta of about a quarter second of steps.

It alone calls the ranks. Requests wait in a bounded queue; a cancelled one leaves at the next quantum. When the gang
fails, every request gets the failure, and so does every later one: the leader's process ends and is rebuilt.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed, OverloadedError
from cluster.gang import Gang
from cluster.rank import StepReport
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import Cosmos3Error

_QUANTUM_S = 0.25
# A gang counts as hung when a quantum takes this many times what the last one took, and longer than the floor.
_PATIENCE = 20
_PATIENCE_FLOOR_S = 60.0


@dataclass(frozen=True)
class Queued:
    """A request waits; ``position`` others are before it."""

    position: int


@dataclass(eq=False)
class _Job:
    job_id: str
    request: DenoiseRequest
    deadline_s: float
    updates: asyncio.Queue[Queued | StepReport | TensorEnvelope | Exception] = field(default_factory=asyncio.Queue)
    is_cancelled: bool = False


class EngineLoop:
    """Runs requests on a gang. Start it inside the event loop that will use it.

    Args:
        gang: up and warm.
        max_jobs: requests it takes at once, the running one included.
        first_quantum_timeout_s: for beginning a request and its first step, when nothing is known of its speed.
    """

    def __init__(self, gang: Gang, *, max_jobs: int, first_quantum_timeout_s: float) -> None:
        self._gang = gang
        self._max_jobs = max_jobs
        self._first_quantum_timeout_s = first_quantum_timeout_s
        self._waiting: deque[_Job] = deque()
        self._running: _Job | None = None
        self._wake = asyncio.Event()
        self._seconds_per_request = 0.0
        self.failure: GangFailed | None = None
        # A context of its own: a task made inside a request would be cancelled with that request.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    @property
    def num_jobs(self) -> int:
        """Requests waiting or running."""
        return len(self._waiting) + (self._running is not None)

    async def submit(
        self, job_id: str, request: DenoiseRequest, deadline_s: float
    ) -> AsyncIterator[Queued | StepReport | TensorEnvelope]:
        """Queue a request and follow it: positions and step reports, the latents last.

        Leaving the iterator early cancels the request at the next quantum. So does its deadline (seconds since the
        epoch): whoever asked may have died without a word.

        Raises:
            OverloadedError: the queue is full.
            GangFailed: the gang failed; the request may be tried elsewhere.
            Cosmos3Error: what the ranks refused the request with.
        """
        if self.failure is not None:
            raise self.failure
        if self.num_jobs >= self._max_jobs:
            raise OverloadedError(
                "requests of one transformer gang", self._max_jobs, max(1.0, self._seconds_per_request * self.num_jobs)
            )
        job = _Job(job_id, request, deadline_s)
        self._waiting.append(job)
        self._tell_positions()
        self._wake.set()
        try:
            while True:
                update = await job.updates.get()
                if isinstance(update, Exception):
                    raise update
                yield update
                if isinstance(update, TensorEnvelope):
                    return
        finally:
            # Only a flag, and only the loop acts on it: whoever is being cancelled here must not call the ranks.
            job.is_cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)
                self._tell_positions()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while self.failure is None:
            while not self._waiting:
                self._wake.clear()
                await self._wake.wait()
            job = self._running = self._waiting.popleft()
            self._tell_positions()
            start_s = loop.time()
            try:
                await self._run_job(job)
                self._seconds_per_request = loop.time() - start_s
            except GangFailed as error:
                self._fail(error)
            except Cosmos3Error as error:
                job.updates.put_nowait(error)
                await self._forget(job)
            except Exception as error:  # noqa: BLE001 - our own bug; to wait for an answer for ever would hide it
                self._fail(GangFailed("step", f"the engine loop met {type(error).__name__}: {error}"))
            finally:
                self._running = None

    async def _run_job(self, job: _Job) -> None:
        timeout_s = self._first_quantum_timeout_s
        await self._gang.call("begin", job.job_id, job.request, phase="step", timeout_s=timeout_s)
        num_steps = 1
        while not job.is_cancelled and time.time() < job.deadline_s:
            reports = await self._gang.call("step", job.job_id, num_steps, phase="step", timeout_s=timeout_s)
            report: StepReport = reports[0]
            job.updates.put_nowait(report)
            if report.step == report.num_steps:
                latents = await self._gang.call("latents", job.job_id, phase="step", timeout_s=timeout_s)
                job.updates.put_nowait(latents[0])
                break
            step_s = report.seconds / num_steps
            num_steps = max(1, round(_QUANTUM_S / max(step_s, 1e-6)))
            timeout_s = max(_PATIENCE_FLOOR_S, _PATIENCE * step_s * num_steps)
        await self._gang.call("end", job.job_id, phase="step", timeout_s=timeout_s)

    async def _forget(self, job: _Job) -> None:
        """Have every rank drop a request that was refused: some may have begun it before another one said no."""
        try:
            await self._gang.call("end", job.job_id, phase="step", timeout_s=_PATIENCE_FLOOR_S)
        except GangFailed as error:
            self._fail(error)

    def _fail(self, error: GangFailed) -> None:
        self.failure = error
        for job in (self._running, *self._waiting):
            if job is not None:
                job.updates.put_nowait(error)
        self._waiting.clear()

    def _tell_positions(self) -> None:
        before = 1 if self._running is not None else 0
        for index, job in enumerate(self._waiting):
            job.updates.put_nowait(Queued(index + before))
