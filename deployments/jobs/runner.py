"""JobRunner: claims jobs while there is room for them, walks them through the stages, and writes down how they end.

One lives in each Director. It alone runs jobs, whoever asked for them: those whose caller waits here (*attached*) hand
every event on to the caller as it comes; the others are followed through the database.

A claim is a lease: it is renewed while the job runs, and where that stops, another runner takes the job over and goes
on from the last state that was left in the media store. Everything that this one still writes about the job is then
refused, and its walk is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import os
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ShuttingDown
from cosmos3_core.errors import Cosmos3Error
from deployments.errors import typed
from deployments.jobs.checkpoints import CHECKPOINT, Checkpoints
from deployments.jobs.cost import Throughput
from deployments.jobs.files import JobFiles
from deployments.jobs.job import Job, JobCancelled, JobsError, JobState, Lane, LeaseLost, Outcome
from deployments.jobs.recorder import Recorder, Tries, result_of
from deployments.jobs.request_codec import decoded
from deployments.jobs.runner_spec import MakeWalk, RunnerSpec, TellFailure
from deployments.jobs.store import JobStore, Lease
from deployments.logs import watched_request
from deployments.media_store import MediaStore
from deployments.messages import Event, FileStarted, Finished, QueuePosition, RequestContext
from deployments.metrics import metrics
from deployments.request_check import RequestCheck
from deployments.threads import in_thread

logger = logging.getLogger("ray.serve")

# Between two looks at where a caller's job stands in the queue.
_POSITION_PERIOD_S = 1.0
# Renewals in the time of a lease: two may fail.
_RENEWALS = 4
# Leases that pass before a runner that cannot renew them stops: a slow database is no reason to begin anew, and of two
# runners that have one job for a while one writes it down.
_PATIENCE = 2
# Between two looks whether the owner of a running job has cancelled it.
_LOOK_S = 0.5
# After an error of the loop's own: a database that is away, say.
_PAUSE_S = 1.0
_RESTART_S = 30.0
# Why runs are stopped.
_LOST = "it was deleted, or another runner has it"
_AWAY = "the database of jobs cannot be used"
_GIVEN_BACK = "given back"
_SHUT_DOWN = "the app is being stopped"
_LEFT = "its caller has left"
_CANCELLED = "cancelled by its owner"


@dataclass(eq=False)
class _Caller:
    """Who waits for an attached job."""

    context: RequestContext
    # A request has as many events as steps and chunks, which are bounded.
    items: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    has_begun: bool = False
    has_ended: bool = False


@dataclass(eq=False)
class _Run:
    job: Job
    task: asyncio.Task[None] | None = None
    # Between the begin and the end nothing is interrupted.
    is_walking: bool = False
    # Why it was stopped from outside; None while it goes on by itself.
    stopped: str | None = None
    checkpoints: Checkpoints | None = None
    # Of the file that this run has begun.
    media_id: str = ""

    @property
    def old_media_id(self) -> str:
        """Of the file that an earlier run of the job has begun."""
        return self.job.media_id


class JobRunner:
    """See the module. Inside one event loop, which it has to be made in.

    Args:
        store: of jobs.
        files: of jobs.
        media: where results are.
        check: of requests.
        make_walk: see :class:`MakeWalk`.
        tell_failure: see :class:`TellFailure`.
        is_told: whether that says all there is; else it belongs into the log.
        spec: how it works.
    """

    def __init__(
        self,
        store: JobStore,
        files: JobFiles,
        media: MediaStore,
        check: RequestCheck,
        make_walk: MakeWalk,
        tell_failure: TellFailure,
        is_told: Callable[[BaseException], bool],
        spec: RunnerSpec,
    ) -> None:
        self.runner_id = uuid.uuid4().hex
        self._store, self._files, self._media = store, files, media
        self._check, self._make_walk, self._tell_failure = check, make_walk, tell_failure
        self._is_told = is_told
        self._spec = spec
        self._patience_s = _PATIENCE * spec.lease_s
        self._callers: dict[str, _Caller] = {}
        self._runs: dict[str, _Run] = {}
        self._throughput: dict[Lane, Throughput] = {}
        self._wake = asyncio.Event()
        self._renewer = ThreadPoolExecutor(1, thread_name_prefix="leases")
        self._is_draining = self._is_released = False
        # Contexts of their own: a task made inside a request would be cancelled with that request.
        self._alive: set[asyncio.Task[Any]] = set()
        for loop in (self._claim_loop(), self._renew_loop()):
            self._detached(loop)

    @property
    def num_in_hand(self) -> int:
        """Jobs that run here, and those that callers wait for."""
        return len(self._runs.keys() | self._callers.keys())

    def nudge(self) -> None:
        """A job has come."""
        self._wake.set()

    def drain(self) -> int:
        """Claim nothing from now on but what callers wait for; returns how many jobs are still in hand."""
        self._is_draining = True
        return self.num_in_hand

    async def release(self) -> None:
        """Give back what runs and nobody waits for, to be gone on with by the next runner; stop the rest."""
        self._is_draining = self._is_released = True
        self.nudge()
        for caller in self._callers.values():
            if not caller.has_begun:
                caller.items.put_nowait(ShuttingDown(_RESTART_S))
        runs = list(self._runs.values())
        for run in runs:
            self._stop(run, _GIVEN_BACK if run.job.attached_to is None else _SHUT_DOWN)
        await asyncio.gather(*(run.task for run in runs if run.task is not None), return_exceptions=True)

    def expect(self, job_id: str, context: RequestContext) -> None:
        """Say before an attached job is created that its events are for a caller here."""
        self._callers[job_id] = _Caller(context)

    def unexpect(self, job_id: str) -> None:
        """The job of :meth:`expect` was not created."""
        self._callers.pop(job_id, None)

    def forget(self, job_id: str) -> None:
        """The caller of :meth:`expect` leaves: what is left of the job is not done."""
        caller = self._callers.pop(job_id, None)
        if caller is None or caller.has_ended:
            return
        if (run := self._runs.get(job_id)) is not None:
            self._stop(run, _LEFT)
        else:
            self._detached(self._cancel_queued(job_id))

    async def follow(self, job: Job) -> AsyncGenerator[Event, None]:
        """The events of an attached job, after :meth:`expect` and its creation; to be ended by :meth:`forget`.

        Raises:
            DeadlineExceeded: the time is up.
            JobCancelled: its owner has cancelled it.
            Exception: what the job failed with.
        """
        caller = self._callers[job.job_id]
        self.nudge()
        position: int | None = None
        while True:
            item = await self._next(caller)
            if item is None:  # it waits, and it is time to look where
                found = None if caller.has_begun else await in_thread(self._store.get, job.job_id)
                if caller.has_begun:
                    continue
                if found is None or found.state.is_final:
                    raise JobCancelled(job.job_id, "" if found is None else found.error_message)
                before, position = position, (await in_thread(self._store.ahead, found)).num_jobs
                if position != before and not caller.has_begun:
                    yield QueuePosition(position, os.getpid())
                continue
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Finished):
                return

    async def _next(self, caller: _Caller) -> Event | Exception | None:
        """The next event; None where none came and it is time to look at the queue again."""
        if caller.has_begun:
            return await caller.items.get()  # the walk keeps the deadline
        limit_s = min(_POSITION_PERIOD_S, caller.context.remaining_s("queue"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                return await caller.items.get()
        return None

    # Claiming

    async def _claim_loop(self) -> None:
        while not self._is_released:
            self._wake.clear()
            try:
                for lane, max_running in self._spec.max_running.items():
                    while sum(run.job.lane == lane for run in self._runs.values()) < max_running:
                        if (job := await in_thread(self._claim, lane)) is None:
                            break
                        # It may have been claimed just before.
                        if self._is_released or (self._is_draining and job.attached_to is None):
                            await in_thread(self._store.give_back, Lease(job.job_id, job.lease))
                            break
                        self._begin(job)
            except Exception:  # the database is away, say: what is wrong now may be right in a moment
                logger.exception("jobs cannot be claimed")
                await asyncio.sleep(_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._spec.poll_s):
                    await self._wake.wait()

    def _claim(self, lane: Lane) -> Job | None:
        spec = self._spec
        return self._store.claim(
            self.runner_id,
            spec.model,
            lane,
            spec.limits,
            spec.lease_s,
            spec.max_attempts,
            only_attached=self._is_draining,
            in_hand=tuple(self._runs),
        )

    def _begin(self, job: Job) -> None:
        run = self._runs[job.job_id] = _Run(job)
        if (caller := self._callers.get(job.job_id)) is not None:
            caller.has_begun = True
        elif job.attached_to is not None:
            run.stopped = _LEFT
        assert job.started_s is not None, "it was claimed"
        if job.attempts == 1 and job.step == 0:  # not given back
            metrics().waited_in_queue(job.lane, job.service_class, job.started_s - job.created_s)
        elif job.attempts > 1:
            metrics().taken_over()
        run.task = self._detached(self._run(run, caller))

    # Running

    async def _run(self, run: _Run, caller: _Caller | None) -> None:
        """One claimed job, to its end, whatever that is. Raises nothing."""
        job = run.job
        recorder = Recorder(self._store, job, lambda error: self._stop(run, _reason(error)), self._patience_s)
        finished: Finished | None = None
        failure: Exception | None = None
        if run.stopped is None:
            run.is_walking = True
            try:
                async for event in self._walk(run, caller):
                    recorder.note(event)
                    if isinstance(event, FileStarted):
                        run.media_id = event.media_id
                    if isinstance(event, Finished):
                        finished = event
                    elif caller is not None:
                        caller.items.put_nowait(event)
            except asyncio.CancelledError:
                pass  # by _stop, which has said why
            except Exception as error:  # noqa: BLE001 - whatever a stage raised ends the job, and nothing else
                meaning = typed(error, "director")
                failure = meaning if isinstance(meaning, Exception) else error
            run.is_walking = False
        try:
            await self._end(run, recorder, finished, failure)
        except LeaseLost:
            run.stopped = run.stopped or _LOST
            failure = failure or _why(run)
            await self._tidy_lost(run)
        except Exception as error:
            logger.exception("the end of %s could not be written down", job.job_id)
            failure = failure or error
        del self._runs[job.job_id]
        self.nudge()
        if caller is not None:
            # What the database does not know is not told: the file might be made once more.
            caller.has_ended = True
            caller.items.put_nowait(failure or finished or _why(run))

    async def _walk(self, run: _Run, caller: _Caller | None) -> AsyncIterator[Event]:
        job = run.job
        if run.old_media_id:
            # Its writer may have died without a word: whoever watches it is told.
            await in_thread(self._media.fail, run.old_media_id, "the job was taken over by another runner")
        context = (
            RequestContext.new(job.request_id, self._spec.run_timeout_s, job.job_id)
            if caller is None
            else caller.context
        )
        media = {name: await in_thread(self._files.get, job.job_id, name) for name in job.inputs}
        resolved = await self._check.resolved(context, decoded(job.request, media))
        del media
        run.checkpoints = checkpoints = Checkpoints(self._files, job.job_id, self._spec.checkpoint_period_s)
        begin_from = await in_thread(checkpoints.read)
        walk = self._make_walk(resolved, context, job, begin_from, checkpoints.offer)
        del resolved, begin_from
        assert job.started_s is not None, "it was claimed"
        events = watched_request(walk.events(), context, job.mode, job.started_s - job.created_s)
        try:
            async with aclosing(events) as watched:
                async for event in watched:
                    yield event
        finally:
            await checkpoints.settle()

    async def _end(self, run: _Run, recorder: Recorder, finished: Finished | None, failure: Exception | None) -> None:
        job, lease = run.job, Lease(run.job.job_id, run.job.lease)
        if finished is None and run.stopped in (_LOST, _AWAY):
            raise LeaseLost(job.job_id)
        if finished is None and run.stopped == _GIVEN_BACK:
            if run.checkpoints is not None:
                await run.checkpoints.write_last()
            await Tries(self._patience_s).of(lambda: self._store.give_back(lease))
            return
        if finished is not None:  # whoever wanted it stopped came too late
            outcome = Outcome(JobState.COMPLETED, result=result_of(finished))
        elif failure is not None:
            code, message = self._tell_failure(failure)
            if not self._is_told(failure):
                logger.error("%s failed", job.job_id, exc_info=failure)
            outcome = Outcome(JobState.FAILED, error_code=code, error_message=message)
        else:
            outcome = Outcome(JobState.CANCELLED, error_code="cancelled", error_message=str(_why(run)))
        ended = await recorder.end(outcome, keep_media_s=self._spec.keep_media_s)
        try:
            _tell_end(ended)
            if finished is not None:
                await self._measure(job)
            # Inputs stay for a remix of what was made; of anything else they would fill the disk for nothing.
            is_kept = finished is not None and job.attached_to is None
            await in_thread(self._files.remove, job.job_id, CHECKPOINT if is_kept else None)
        except Exception:  # the job has ended all the same, and its caller is told so
            logger.exception("what %s leaves could not be tidied up", job.job_id)

    async def _tidy_lost(self, run: _Run) -> None:
        """What a run leaves whose job is another runner's, or gone."""
        job_id = run.job.job_id
        try:
            now = await in_thread(self._store.get, job_id)
            if now is None:
                await in_thread(self._files.remove, job_id)
            if run.media_id and (now is None or now.media_id != run.media_id):
                await in_thread(self._media.remove, run.media_id)
        except Exception:  # it expires
            logger.exception("what %s leaves could not be tidied up", job_id)

    async def _measure(self, job: Job) -> None:
        assert job.started_s is not None, "it was claimed"
        throughput = self._throughput.setdefault(job.lane, Throughput())
        # Of one that was gone on with, what was left of it when it was claimed.
        work = job.work * max(1 - job.step / job.num_steps, 1 / job.num_steps)
        work_per_s = throughput.finished(work, job.started_s, time.time())
        await in_thread(self._store.note_rate, self._spec.model, job.lane, work_per_s)

    # Leases, and the end of what nobody wants

    async def _renew_loop(self) -> None:
        spec, loop = self._spec, asyncio.get_running_loop()
        renewed_s = time.monotonic()
        while True:
            # More often while something runs: cancellations are found here as well.
            await asyncio.sleep(min(spec.lease_s / _RENEWALS, _LOOK_S if self._runs else spec.lease_s))
            runs = dict(self._runs)
            leases = [Lease(run.job.job_id, run.job.lease) for run in runs.values()]
            asked_s = time.monotonic()
            lost: set[str] = set()
            cancelling: set[str] = set()
            try:
                # In a thread of its own: it must not wait behind files that are written.
                renewing = loop.run_in_executor(self._renewer, self._store.renew, self.runner_id, leases, spec.lease_s)
                async with asyncio.timeout(max(renewed_s + self._patience_s - asked_s, 0.1)):
                    lost, cancelling = await asyncio.shield(renewing)
                renewed_s = asked_s
            except Exception:  # late, or whatever the database raised
                logger.exception("leases of jobs cannot be renewed")
            if time.monotonic() - renewed_s > self._patience_s:
                lost = set(runs)  # what another runner has had for a while is not run here as well
            for job_id in lost:
                self._lost(job_id)
            for job_id in cancelling:
                if (run := self._runs.get(job_id)) is not None:
                    self._stop(run, _CANCELLED)

    def _lost(self, job_id: str) -> None:
        if (run := self._runs.get(job_id)) is not None:
            self._stop(run, _LOST)

    def _stop(self, run: _Run, reason: str) -> None:
        if run.stopped is None:
            run.stopped = reason
            if run.is_walking and run.task is not None:
                run.task.cancel()

    async def _cancel_queued(self, job_id: str) -> None:
        try:
            job = await in_thread(self._store.cancel, job_id)
            if job is not None and job.state.is_final:
                _tell_end(job)
                await in_thread(self._files.remove, job_id)
        except Cosmos3Error:
            logger.exception("%s could not be cancelled", job_id)

    def _detached(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._alive.add(task)  # the loop itself does not keep it
        task.add_done_callback(self._alive.discard)
        return task


def _tell_end(job: Job) -> None:
    metrics().request_ended(job.mode, job.state, (job.completed_s or job.created_s) - job.created_s)


def _reason(error: JobsError) -> str:
    """Why a run is stopped of which nothing can be written down."""
    return _LOST if isinstance(error, LeaseLost) else _AWAY


def _why(run: _Run) -> Exception:
    """What the caller of a job that was stopped is told."""
    if run.stopped == _SHUT_DOWN:
        return ShuttingDown(_RESTART_S)
    if run.stopped == _AWAY:
        return JobsError(f"{_AWAY}, and {run.job.job_id} was given up")
    return JobCancelled(run.job.job_id, run.stopped or "its walk ended without a result")
