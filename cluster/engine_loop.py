"""The leader's loop: it alone calls the ranks, a quantum of about a quarter second of steps at a time.

Every request is queued here, where its class is known, never in a router in front; :mod:`cluster.step_scheduler`
picks the next one. Between quanta a request keeps its state on every rank, within a bound: to make room it is parked,
its state with the leader, and resumed later. A cancelled request leaves at the next quantum, or between two layers of
a long step. Callers get the state of a running request periodically, and another gang can resume it. For a preview,
rank 0 returns colours between two quanta, and the leader encodes the file during the next one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from ray.exceptions import RayError

from cluster.envelope import TensorEnvelope
from cluster.errors import DeadlineExceeded, GangFailed, OutOfMemory, OverloadedError, PreviewFailed, StepAbandoned
from cluster.events import PreviewReady, PreviewsOff, QueuePosition, StepDone
from cluster.gang import Gang
from cluster.gang_meter import BusyClock, GangMeter
from cluster.layer_gate import abandon_step
from cluster.leader_loop import LeaderLoop
from cluster.logs import LogOrigin, log_event
from cluster.step_scheduler import StepScheduler, Urgency, urgency_of
from cluster.transformer_rank import StepReport
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.media.webp import MAX_FRAMES, MEDIA_TYPE, animate_webp
from cosmos3_core.preview import PreviewOrder
from cosmos3_core.prompt_ledger import PromptLedger, RequestMemory

logger = logging.getLogger("ray.serve")

_QUANTUM_S = 0.25
# A gang counts as hung when a quantum takes this many times as long as the last one, and longer than the floor.
_PATIENCE = 20
# Seconds that a step may go on after its caller has gone; then it is abandoned between two layers.
_ABANDON_AFTER_S = 1.0
# Saving states may take this share of a gang's time.
_SAVING_SHARE = 0.05


@dataclass(frozen=True)
class LoopSpec:
    """How a leader runs its gang.

    Attributes:
        max_jobs: bound on the requests of one lane, the running one included.
        max_held_bytes: bound on the memory that begun requests hold on each rank; one may always run.
        text_cache_bytes: bound on the memory of kept prompts on each rank.
        save_period_s: between two saved states of a running request.
        first_step_timeout_s: for beginning a request and its first step: its speed is unknown, and kernels may be
            compiled for its shape.
        quantum_timeout_s: least limit of any later quantum; slow steps get longer.
    """

    max_jobs: int
    max_held_bytes: int
    text_cache_bytes: int
    save_period_s: float
    first_step_timeout_s: float
    quantum_timeout_s: float


@dataclass(frozen=True)
class SavedState:
    """The state of a request after ``step`` steps, as bytes of :class:`cosmos3_core.sampler.state.DenoiseState`."""

    step: int
    state: TensorEnvelope


@dataclass(frozen=True)
class Denoised:
    """The last update: modality -> fp32 latents."""

    latents: dict[str, TensorEnvelope]


Update = QueuePosition | StepDone | PreviewReady | PreviewsOff | SavedState | Denoised
"""Events for the request's caller, and tensors for the stage that continues the request."""


@dataclass(eq=False)
class _Job:
    try_id: str
    request: DenoiseRequest
    deadline_s: float
    limit_s: float
    urgency: Urgency
    state: TensorEnvelope | None  # to resume from: saved by another gang, or parked by this one
    clean: TensorEnvelope | None  # latents of the frames that the request gives
    previews: PreviewOrder | None  # None as well once they have ended
    origin: LogOrigin | None
    start_s: float
    updates: asyncio.Queue[Update | Exception] = field(default_factory=asyncio.Queue)
    position: int | None = None
    caller_gone: asyncio.Event = field(default_factory=asyncio.Event)
    has_begun: bool = False
    step_s: float | None = None
    save_at_s: float = 0.0
    is_saved_state_consumed: bool = True
    preview_due_step: int = 1

    @property
    def lane(self) -> str:
        return self.urgency.name.lower()


class EngineLoop(LeaderLoop[_Job]):
    """Runs requests on a gang; ``request_memory`` is what they hold on a rank."""

    def __init__(
        self,
        gang: Gang,
        request_memory: RequestMemory,
        spec: LoopSpec,
        on_failure: Callable[[], None],
        meter: GangMeter | None = None,
    ) -> None:
        super().__init__(gang, on_failure)
        self._request_memory = request_memory
        self._spec = spec
        self._meter = meter or GangMeter()
        self._busy = BusyClock(self._now_s())
        self._scheduler: StepScheduler[_Job] = StepScheduler()
        self._ledger = PromptLedger(spec.text_cache_bytes, request_memory.bytes_per_text_token)
        self._pending_drops: tuple[str, ...] = ()
        self._wake = asyncio.Event()
        self._seconds_per_request = 0.0
        self._encoding: asyncio.Task[None] | None = None

    @property
    def num_jobs(self) -> int:
        """Number of requests, waiting or running."""
        return len(self._scheduler)

    async def submit(
        self,
        try_id: str,
        request: DenoiseRequest,
        limit_s: float,
        state: TensorEnvelope | None = None,
        clean: TensorEnvelope | None = None,
        previews: PreviewOrder | None = None,
        origin: LogOrigin | None = None,
    ) -> AsyncIterator[Update]:
        """Queue a request and follow it: positions, every step, saved states, previews, the latents last.

        Leaving the iterator early cancels the request at the next quantum.

        Args:
            try_id: unique among the gang's requests.
            limit_s: seconds that it may take from now on, waiting included.
            state: to resume from; that of a :class:`SavedState` of the same request.
            clean: latents of the frames that the request gives.
            previews: which previews to make; None for none. They are made one at a time, and none comes after the last
                step: one that is due while another is made waits for a later quantum, or is skipped.
            origin: names the request in the logs, also the ranks'.

        Raises:
            OverloadedError: the queue is full.
            GangFailed: the gang failed; the request may be tried elsewhere.
            DeadlineExceeded: the time is up.
            OutOfMemory: the request does not fit into the ranks' memory.
            Cosmos3Error: the ranks refused the request.
        """
        self._require_up()
        urgency = urgency_of(request)
        if (num_jobs := self._scheduler.count(urgency)) >= self._spec.max_jobs:
            what = f"requests for {urgency.name.lower()}s of one transformer gang"
            raise OverloadedError(what, self._spec.max_jobs, max(1.0, self._seconds_per_request * num_jobs))
        start_s = self._now_s()
        job = _Job(try_id, request, start_s + limit_s, limit_s, urgency, state, clean, previews, origin, start_s)
        if previews is not None:
            job.preview_due_step = previews.period_steps(request.num_inference_steps)
        self._scheduler.add(job, urgency, start_s)
        self._report_positions()
        self._wake.set()
        try:
            while True:
                update = await job.updates.get()
                if isinstance(update, Exception):
                    raise update
                job.is_saved_state_consumed |= isinstance(update, SavedState)
                yield update
                if isinstance(update, Denoised):
                    return
        finally:
            # Only a flag, and only the loop acts on it: a task that is being cancelled must not call the ranks.
            job.caller_gone.set()
            self._wake.set()

    async def _work(self) -> None:
        self._wake.clear()
        if (share := self._busy.share(self._now_s())) is not None:
            self._meter.set_busy_share(share)
        await self._drop_abandoned()
        job = self._running = self._scheduler.next(self._now_s())
        if job is None:
            await self._wait_idle(self._wake.wait(), self._spec.quantum_timeout_s)
            return
        start_s = self._now_s()
        if job.has_begun or await self._begin(job):
            await self._quantum(job)
        self._busy.add_work(start_s, self._now_s())
        self._scheduler.record_turn(job.urgency, start_s, self._now_s())

    async def _drop_abandoned(self) -> None:
        """Drop requests whose caller has left or died, and those past their deadline."""
        for job in list(self._scheduler):
            if job.caller_gone.is_set() or self._now_s() >= job.deadline_s:
                job.updates.put_nowait(DeadlineExceeded("denoise", job.limit_s))
                await self._remove(job)

    async def _begin(self, job: _Job) -> bool:
        """Have the ranks begin a request, or resume it from its state; return False if they refuse it."""
        await self._make_room_for(job)
        num_hits = self._ledger.num_kept(job.request.prompts)
        orders = self._ledger.admit(job.request.prompts)
        # Drop also what the ranks kept when they refused the last request.
        orders = replace(orders, drop=tuple(sorted({*orders.drop, *self._pending_drops} - orders.keep)))
        self._pending_drops = orders.drop
        start_s = self._now_s()
        try:
            await self._gang.call_or_refuse(
                "begin",
                job.try_id,
                job.request,
                orders,
                job.state,
                job.clean,
                job.origin,
                phase="begin",
                timeout_s=self._spec.first_step_timeout_s,
            )
        except GangFailed:
            raise
        except Cosmos3Error as error:
            self._refuse(job, error)
            return False
        self._meter.count_prompt_lookups(num_hits, len(job.request.prompts) - num_hits)
        if job.step_s is None:  # else it was parked
            self._meter.record_gang_wait(job.lane, start_s - job.start_s)
        self._log(job, "gang began", waited_s=start_s - job.start_s, is_resumed=job.state is not None)
        job.has_begun, job.state, self._pending_drops = True, None, ()
        job.save_at_s = start_s + self._spec.save_period_s
        return True

    async def _make_room_for(self, job: _Job) -> None:
        """Park begun requests, the least urgent and latest first, until the request fits."""
        memory = self._request_memory
        begun = [other for other in self._scheduler if other.has_begun]
        while begun and sum(memory.of(it.request) for it in (job, *begun)) > self._spec.max_held_bytes:
            parked = begun.pop()
            parked.state = await self._read_state(parked)
            await self._end_on_ranks(parked)
            parked.has_begun = False
            self._log(parked, "gang parked")

    async def _quantum(self, job: _Job) -> None:
        num_steps, timeout_s = 1, self._spec.first_step_timeout_s
        if job.step_s is not None:
            num_steps = max(1, round(_QUANTUM_S / max(job.step_s, 1e-6)))
            timeout_s = max(self._spec.quantum_timeout_s, _PATIENCE * job.step_s * num_steps)
        try:
            reports = await self._step(job, num_steps, timeout_s)
        except StepAbandoned as error:
            self._log(job, "gang left a step", layer=error.layer)
            return
        except OutOfMemory as error:
            self._refuse(job, error)
            return
        report = reports[0]
        last = report.steps[-1]
        if last.step == last.num_steps:
            job.previews = None  # one still being made is too late: the clip itself comes now
        for step in report.steps:
            job.updates.put_nowait(step)
        job.step_s = report.seconds / len(report.steps)
        self._meter.record_steps(job.lane, len(report.steps), report.seconds)
        if last.step == last.num_steps:
            job.updates.put_nowait(Denoised(await self._call_rank_0("latents", job)))
            await self._remove(job)
            self._seconds_per_request = job.step_s * last.num_steps
            return
        if job.previews is not None and last.step >= job.preview_due_step:
            await self._preview(job, job.previews, last)
        if (start_s := self._now_s()) >= job.save_at_s and job.is_saved_state_consumed:
            job.updates.put_nowait(SavedState(last.step, await self._read_state(job)))
            job.is_saved_state_consumed = False
            cost_s = self._now_s() - start_s
            job.save_at_s = self._now_s() + max(self._spec.save_period_s, cost_s / _SAVING_SHARE)

    async def _step(self, job: _Job, num_steps: int, timeout_s: float) -> list[StepReport]:
        """Run steps on all ranks; raise StepAbandoned if its caller went, or its time was up, during a long one."""
        call = asyncio.ensure_future(
            self._gang.call_or_refuse("step", job.try_id, num_steps, phase="step", timeout_s=timeout_s)
        )
        caller_gone = asyncio.ensure_future(job.caller_gone.wait())
        remaining_s = max(0.0, job.deadline_s - self._now_s())
        await asyncio.wait((call, caller_gone), timeout=remaining_s, return_when=asyncio.FIRST_COMPLETED)
        caller_gone.cancel()
        await asyncio.wait((call,), timeout=_ABANDON_AFTER_S)
        if not call.done():
            with contextlib.suppress(TimeoutError, RayError):  # the call of the step says why
                await abandon_step(self._gang.call_gates)
        return await call

    async def _preview(self, job: _Job, order: PreviewOrder, last: StepDone) -> None:
        """Make a due preview, unless another is being made; the gang waits only for rank 0's colours."""
        if self._encoding is not None and not self._encoding.done():
            return
        period_steps = order.period_steps(last.num_steps)
        job.preview_due_step = last.step - last.step % period_steps + period_steps
        try:
            colours = await self._gang.call_rank_0(
                "preview",
                job.try_id,
                order.preview_map,
                MAX_FRAMES,
                phase="step",
                timeout_s=self._spec.quantum_timeout_s,
                reraises=PreviewFailed,
            )
        except PreviewFailed as error:
            self._end_previews(job, error.reason)
            return
        self._encoding = asyncio.create_task(self._encode_preview(job, order, last, colours))

    async def _encode_preview(self, job: _Job, order: PreviewOrder, last: StepDone, colours: TensorEnvelope) -> None:
        try:
            frames = colours.array()
            webp = await asyncio.to_thread(animate_webp, frames, order.fps(len(frames)))
        except Exception as error:  # noqa: BLE001 - a preview fails no request
            self._end_previews(job, f"{type(error).__name__}: {error}")
            return
        if job.previews is not None:
            job.updates.put_nowait(PreviewReady(last.step, last.sigma, MEDIA_TYPE, webp, os.getpid()))

    @staticmethod
    def _end_previews(job: _Job, reason: str) -> None:
        if job.previews is not None:
            log_event(logger, "goes on without previews", job.origin, logging.WARNING, try_id=job.try_id, reason=reason)
            job.updates.put_nowait(PreviewsOff(reason, os.getpid()))
            job.previews = None

    async def _read_state(self, job: _Job) -> TensorEnvelope:
        """Read a begun request's state from one rank: all hold the same."""
        envelope: TensorEnvelope = await self._call_rank_0("read_state", job)
        return envelope

    async def _remove(self, job: _Job) -> None:
        self._unschedule(job)
        if job.has_begun:
            await self._end_on_ranks(job)

    def _refuse(self, job: _Job, error: Exception) -> None:
        """Reject a request with the ranks' error; they keep nothing of it."""
        job.updates.put_nowait(error)
        self._unschedule(job)

    def _unschedule(self, job: _Job) -> None:
        self._log(job, "gang ended", seconds=self._now_s() - job.start_s)
        self._scheduler.remove(job)
        self._report_positions()

    async def _end_on_ranks(self, job: _Job) -> None:
        await self._gang.call("end", job.try_id, phase="step", timeout_s=self._spec.quantum_timeout_s)

    async def _call_rank_0(self, method: str, job: _Job) -> Any:
        return await self._gang.call_rank_0(method, job.try_id, phase="step", timeout_s=self._spec.quantum_timeout_s)

    def _fail(self, error: GangFailed) -> None:
        origin = None if self._running is None else self._running.origin
        log_event(logger, "gang failed", origin, logging.ERROR, phase=error.phase, rank=error.rank, reason=error.reason)
        super()._fail(error)

    def _pop_all(self) -> list[_Job]:
        jobs = list(self._scheduler)
        for job in jobs:
            self._scheduler.remove(job)
        return jobs

    def _answer(self, item: _Job, error: Exception) -> None:
        item.updates.put_nowait(error)

    @staticmethod
    def _log(job: _Job, event: str, **fields: float) -> None:
        if job.origin is not None:
            log_event(logger, event, job.origin, stage="denoise", **fields)

    def _report_positions(self) -> None:
        for position, job in enumerate(self._scheduler):
            if not job.has_begun and job.position != position:
                job.position = position
                job.updates.put_nowait(QueuePosition(position, os.getpid()))

    @staticmethod
    def _now_s() -> float:
        return asyncio.get_running_loop().time()
