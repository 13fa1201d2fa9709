"""JobRunner: claims jobs while it has room for them, runs them through the stages, and records how they end.

Each Director has one. The caller of an *attached* job waits here and gets every event as it comes; other jobs are
followed through the database.

A claim is a lease, renewed while the job runs. When a runner stops renewing it, another runner takes the job over and
resumes it from its last saved state. Later writes of the first runner about that job are rejected, and its pipeline is
stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cluster.envelope import TensorEnvelope
from cluster.errors import OverloadedError, ShuttingDown, StageFailed
from cluster.events import Event
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.request import ResolvedRequest
from deployments.config import JobsConfig
from deployments.director.admission import RequestCheck
from deployments.director.breaker import Breaker
from deployments.director.leases import RESTART_S, ClaimedJob, LeaseKeeper, StopReason
from deployments.director.pipeline import Pipeline
from deployments.director.progress import JobProgress, StageDeadlines, find_late_stages, find_lost_jobs
from deployments.director.recorder import SAVED_STATE, Recorder, Retrier, SavedStates, result_of
from deployments.errors import JobCancelled, JobsError, LeaseLost
from deployments.failures import JOBS_FAULT, MEDIA_FAULT, Blame, Explanation, explain_error, translate_error
from deployments.jobs.estimates import Speed, Throughput
from deployments.jobs.job import Job, JobState, Lane, Outcome, decode_request
from deployments.jobs.queue import ClaimRequest, Fault
from deployments.jobs.service import JobService
from deployments.jobs.store import Lease
from deployments.messages import FileStarted, Finished, RequestContext
from deployments.observability.logs import watch_request
from deployments.observability.metrics import QUEUE_WAIT_SECONDS, REQUEST_SECONDS, REQUESTS, TAKEOVERS, metrics
from deployments.threads import run_in_thread, start_task

logger = logging.getLogger("ray.serve")

# Seconds between two reports of a queue position to a waiting caller.
_POSITION_PERIOD_S = 1.0
# Seconds between two looks for stages that are lost.
_STAGES_PERIOD_S = 5.0
# Seconds after a failed claim, as the database may be away.
_PAUSE_S = 1.0
# Seconds that a write may take, its wait for others included, before /ready names the database.
_LONG_WRITE_S = 2.5
# Seconds for which a stopping runner waits for the database.
_RELEASE_S = 20.0


OnSaved = Callable[[int, TensorEnvelope], None]
MakePipeline = Callable[[ResolvedRequest, RequestContext, Job, TensorEnvelope | None, OnSaved], Pipeline]
"""Makes the pipeline of a claimed job: from its saved state, if any, and with a function that saves later ones."""


@dataclass(eq=False)
class _Caller:
    """The caller of an attached job, who waits here for its events."""

    context: RequestContext
    is_job_created: bool = False
    # Bounded by its steps and chunks. None: its job waits again.
    items: asyncio.Queue[Event | Exception | None] = field(default_factory=asyncio.Queue)
    is_job_running: bool = False
    is_complete: bool = False  # the last item is in the queue


class JobRunner:
    """The runner of one Director. Made and used inside one event loop.

    Args:
        model: name of the served model; other runners claim jobs of other models.
        deadlines: of the stages; one that is silent for long beyond them loses its jobs, which go back to the queue.
        make_pipeline: see :data:`MakePipeline`.
    """

    def __init__(
        self,
        jobs: JobService,
        model: str,
        config: JobsConfig,
        check: RequestCheck,
        deadlines: StageDeadlines,
        make_pipeline: MakePipeline,
    ) -> None:
        self.runner_id = uuid.uuid4().hex
        self._jobs = jobs
        self._store, self._files, self._media = jobs.store, jobs.files, jobs.media
        self._model, self._config = model, config
        self._check, self._deadlines, self._make_pipeline = check, deadlines, make_pipeline
        self._callers: dict[str, _Caller] = {}
        self._claimed: dict[str, ClaimedJob] = {}
        self._throughput: dict[Lane, tuple[Throughput, Throughput]] = {}  # of denoising, and of the rest
        self._wake = asyncio.Event()
        self._leases = LeaseKeeper(jobs.store, self.runner_id, config.lease_s, self._claimed, self._report_failure)
        probes = {MEDIA_FAULT: self._media.check, JOBS_FAULT: self._check_store}
        self.breaker = Breaker(probes, self._retry_postponed)
        self._is_draining = self._is_released = False
        self._tasks: set[asyncio.Task[Any]] = set()
        self._claiming = self._spawn(self._claim_jobs())
        self._spawn(self._leases.renew_forever())
        self._spawn(self._watch_stages())

    @property
    def num_in_hand(self) -> int:
        """Number of jobs that run here or whose callers wait here."""
        return len(self._claimed.keys() | self._callers.keys())

    def list_faults(self) -> list[str]:
        """Return what keeps jobs from being begun, and the stages that running jobs get no answer from."""
        late = find_late_stages(self._list_progress(), self._deadlines)
        faults = [*self.breaker.faults, *(f"{stage}: silent for {seconds:.0f} s" for stage, seconds in late.items())]
        # Not yet a fault of the breaker: no request is refused until a write has failed.
        if self._store.longest_write_s > _LONG_WRITE_S and not self.breaker.has_fault(JOBS_FAULT):
            faults.insert(0, JOBS_FAULT)
        return faults

    def _list_progress(self) -> list[JobProgress]:
        return [it.progress for it in self._claimed.values() if it.progress is not None]

    async def _watch_stages(self) -> None:
        """Stop the jobs in stages that are lost: calls of one without any process wait for a new one, without end."""
        while True:
            await asyncio.sleep(_STAGES_PERIOD_S)
            lost = find_lost_jobs(self._list_progress(), self._deadlines)
            for claimed in list(self._claimed.values()):
                if (progress := claimed.progress) in lost:
                    seconds = progress.silent_s(self._deadlines)
                    claimed.stop(
                        StopReason.STAGE_LOST, StageFailed(progress.stage, 1, f"no answer for {seconds:.0f} s")
                    )

    def wake(self) -> None:
        """Look for jobs now, because one was accepted."""
        self._wake.set()

    def drain(self) -> int:
        """Claim only attached jobs from now on; return the number of jobs in hand."""
        self._is_draining = True
        return self.num_in_hand

    async def release(self) -> None:
        """Claim no more jobs, give running ones back to the next runner, and stop attached ones.

        On return, waiting callers have their error, and their jobs are cancelled.
        """
        self._is_draining = self._is_released = True
        self.wake()
        waiting = {job_id: it for job_id, it in self._callers.items() if not (it.is_job_running or it.is_complete)}
        queued = [job_id for job_id, caller in waiting.items() if self._turn_away(caller)]
        claimed = list(self._claimed.values())
        for each in claimed:
            each.stop(StopReason.GIVEN_BACK if each.job.attached_to is None else StopReason.SHUT_DOWN)
        ending = [self._spawn(self._cancel_all(queued)), *(each.task for each in claimed if each.task is not None)]
        # Not for ever: while the database is away, jobs keep their leases, and the next runner claims them after those.
        await asyncio.wait(ending, timeout=_RELEASE_S)

    def _turn_away(self, caller: _Caller) -> bool:
        """Report the shutdown to a waiting caller; return whether its job exists and must be cancelled."""
        caller.items.put_nowait(ShuttingDown(RESTART_S))
        # Otherwise the job is about to be created, and is cancelled when the caller leaves.
        caller.is_complete = caller.is_job_created
        return caller.is_job_created

    async def _cancel_all(self, job_ids: Sequence[str]) -> None:
        await asyncio.wait([self._claiming])  # a claim of one of them may be under way; it gives that back
        await asyncio.gather(*map(self._cancel_queued, job_ids))

    def announce(self, job_id: str, context: RequestContext) -> None:
        """Announce an attached job before it is created: its events are for a caller here."""
        self._callers[job_id] = _Caller(context)

    def withdraw(self, job_id: str) -> None:
        """Withdraw :meth:`announce`: the job was not created."""
        self._callers.pop(job_id, None)

    def leave(self, job_id: str) -> None:
        """Stop the job of :meth:`announce`: its caller leaves."""
        caller = self._callers.pop(job_id, None)
        if caller is None or caller.is_complete:
            return
        if (claimed := self._claimed.get(job_id)) is not None:
            claimed.stop(StopReason.CALLER_LEFT)
        else:
            self._spawn(self._cancel_queued(job_id))

    async def follow(self, job: Job) -> AsyncGenerator[Event, None]:
        """Yield the events of an attached job that was created after :meth:`announce`; :meth:`leave` ends it.

        Raise DeadlineExceeded if the time is up, JobCancelled if its owner has cancelled it, and the job's failure.
        """
        caller = self._callers[job.job_id]
        caller.is_job_created = True
        self.wake()
        position: int | None = None
        while True:
            item = await self._next(caller)
            if item is None:
                found = None if caller.is_job_running else await run_in_thread(self._store.get, job.job_id)
                if caller.is_job_running or not caller.items.empty():
                    continue
                if found is None or found.state.is_final:
                    raise JobCancelled(job.job_id, "" if found is None else found.error_message)
                waits = (await run_in_thread(self._store.find_positions, [found])).get(job.job_id)
                if waits is not None and waits.position != position and not caller.is_job_running:
                    position = waits.position
                    yield waits
                continue
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Finished):
                return

    async def _next(self, caller: _Caller) -> Event | Exception | None:
        """Return the next event; None when it is time to report the queue position again."""
        if caller.is_job_running:
            return await caller.items.get()  # the pipeline keeps the deadline
        limit_s = min(_POSITION_PERIOD_S, caller.context.remaining_s("queue"))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                return await caller.items.get()
        return None

    # Claiming

    async def _claim_jobs(self) -> None:
        while not self._is_released:
            self._wake.clear()
            try:
                for lane in Lane:
                    while self._may_claim(lane) and await self._claim_next(lane):
                        pass
            except Exception as error:  # noqa: BLE001 - the database may be away: try again
                self._report_failure(error)
                await asyncio.sleep(_PAUSE_S)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.poll_s):
                    await self._wake.wait()

    def _may_claim(self, lane: Lane) -> bool:
        if not self.breaker.may_claim(len(self._claimed)):
            return False
        limits = {Lane.IMAGE: self._config.max_running_images, Lane.VIDEO: self._config.max_running_videos}
        return sum(each.job.lane == lane for each in self._claimed.values()) < limits[lane]

    async def _claim_next(self, lane: Lane) -> bool:
        """Claim and start the next job of a lane; return whether there may be another one."""
        in_hand = tuple(self._claimed)
        request = ClaimRequest(self.runner_id, self._model, lane, self._config, self._is_draining, in_hand)
        if (job := await run_in_thread(self._store.claim, request)) is None:
            return False
        _count_claim(job)
        # The runner may have been drained or released during the claim.
        if self._is_released or (self._is_draining and job.attached_to is None):
            await self._give_back(job)
            return False
        self._start(job)
        return True

    def _start(self, job: Job) -> None:
        claimed = self._claimed[job.job_id] = ClaimedJob(job)
        if (caller := self._callers.get(job.job_id)) is not None:
            caller.is_job_running = True
        elif job.attached_to is not None:
            claimed.stop(StopReason.CALLER_LEFT)
        claimed.task = self._spawn(self._run(claimed, caller))

    # Running

    async def _run(self, claimed: ClaimedJob, caller: _Caller | None) -> None:
        """Run one claimed job to its end. Raises nothing."""
        job = claimed.job
        recorder = Recorder(self._store, job, claimed.give_up)
        finished: Finished | None = None
        failure: Exception | None = None
        if claimed.stop_reason is None:
            claimed.is_interruptible = True
            try:
                async for event in self._process(claimed, caller):
                    recorder.note(event)
                    if claimed.progress is not None:
                        claimed.progress.note(event)
                    if isinstance(event, FileStarted | Finished):
                        claimed.media_id = event.media_id
                    if isinstance(event, Finished):
                        finished = event
                    elif caller is not None:
                        caller.items.put_nowait(event)
            except asyncio.CancelledError:
                pass  # by stop(), which has noted the reason
            except Exception as error:  # noqa: BLE001 - an error of a stage ends this job, and nothing else
                translated = translate_error(error, "director")
                failure = translated if isinstance(translated, Exception) else error
            claimed.is_interruptible = False
        has_ended = True
        try:
            has_ended = await self._end(claimed, recorder, finished, failure)
        except LeaseLost:
            claimed.stop(StopReason.LOST)
            failure = failure or claimed.stop_error
            await self._clean_up_lost(claimed)
        except Exception as error:
            logger.exception("the end of %s could not be recorded", job.job_id)
            failure = failure or error
        del self._claimed[job.job_id]
        self.wake()
        if caller is not None:
            # Only after the end is in the database: before, the job might still run again.
            caller.is_complete, caller.is_job_running = has_ended, False
            caller.items.put_nowait((failure or finished or claimed.stop_error) if has_ended else None)

    async def _process(self, claimed: ClaimedJob, caller: _Caller | None) -> AsyncIterator[Event]:
        """Yield the events of a job's pipeline, which resumes from the last saved state."""
        job, config = claimed.job, self._config
        if job.media_id:
            # The writer of an earlier run may have died silently: end its file for viewers.
            await run_in_thread(self._media.fail, job.media_id, "the job was taken over by another runner")
        own_context = RequestContext.new(job.request_id, config.run_timeout_s, job.job_id)
        context = own_context if caller is None else caller.context
        media = {name: await run_in_thread(self._files.get, job.job_id, name) for name in job.inputs}
        resolved = await self._check.resolve(context, decode_request(job.request, media))
        del media
        claimed.saved_states = saved_states = SavedStates(self._files, job.job_id, config.checkpoint_period_s)
        resume_from = await run_in_thread(saved_states.read)
        pipeline = self._make_pipeline(resolved, context, job, resume_from, saved_states.save_if_due)
        claimed.progress = JobProgress(has_picture=resolved.picture is not None)
        del resolved, resume_from
        assert job.started_s is not None, "it was claimed"
        events = watch_request(pipeline.events(), context, job.mode, job.started_s - job.created_s)
        async with aclosing(events) as watched:
            async for event in watched:
                yield event

    async def _end(
        self, claimed: ClaimedJob, recorder: Recorder, finished: Finished | None, failure: Exception | None
    ) -> bool:
        """Record the end of a run; return whether it is the job's end: otherwise another run follows."""
        if finished is None and claimed.stop_reason is StopReason.LOST:
            raise LeaseLost(claimed.job.job_id)
        if finished is None and claimed.stop_reason is StopReason.GIVEN_BACK:
            if claimed.saved_states is not None:
                await claimed.saved_states.write_last()
            await self._give_back(claimed.job)
            return False
        if claimed.stop_reason in (StopReason.DATABASE_AWAY, StopReason.UNRECORDABLE, StopReason.STAGE_LOST):
            failure = claimed.stop_error
        if finished is not None:  # a stop that came meanwhile is too late
            outcome = Outcome(JobState.COMPLETED, result=result_of(finished))
            self.breaker.report_success()
        elif failure is not None:
            explained = explain_error(failure)
            if explained.blame is not Blame.REQUEST:
                return await self._postpone(claimed, recorder, explained)
            if explained.needs_log:
                logger.error("%s failed", claimed.job.job_id, exc_info=failure)
            outcome = Outcome(JobState.FAILED, error_code=explained.code, error_message=explained.message)
        else:
            outcome = Outcome(JobState.CANCELLED, error_code="cancelled", error_message=str(claimed.stop_error))
        ended = await recorder.end(outcome, keep_media_s=self._media.keep_s)
        await self._clean_up_ended(claimed, ended)
        return True

    async def _postpone(self, claimed: ClaimedJob, recorder: Recorder, explained: Explanation) -> bool:
        """Put a job back after a fault that is not its own; return whether it has ended instead."""
        is_loss = explained.blame is Blame.STAGE
        logger.warning("%s goes back to the queue", claimed.job.job_id, exc_info=explained.error)
        if is_loss:
            self.breaker.report_loss(explained.code, explained.what)
        elif not isinstance(explained.error, OverloadedError | ShuttingDown):  # these pass by themselves
            self.breaker.report_fault(explained.code, explained.what)
        if claimed.saved_states is not None:
            await claimed.saved_states.write_last()
        fault = Fault(explained.what, explained.code, explained.message, counts_if_others_succeed=is_loss)
        job = await recorder.postpone(fault, self._config)
        if job.state.is_final:
            await self._clean_up_ended(claimed, job)
        return job.state.is_final

    def _report_failure(self, error: Exception) -> None:
        """Report an error of the database to the breaker, or log another one."""
        explained = explain_error(JobsError("no answer in time") if isinstance(error, TimeoutError) else error)
        if explained.code == JOBS_FAULT:
            self.breaker.report_fault(JOBS_FAULT, explained.what)
        else:
            logger.error("jobs cannot be claimed, or their leases renewed", exc_info=error)

    def _check_store(self) -> None:
        self._store.renew(self.runner_id, [], self._config.lease_s)

    def _retry_postponed(self) -> None:
        """Claim the jobs that waited for a fault to pass."""

        async def retry() -> None:
            with contextlib.suppress(JobsError):  # their pauses end by themselves
                await run_in_thread(self._store.retry_postponed, self._model)
            self.wake()

        self._spawn(retry())

    async def _give_back(self, job: Job) -> None:
        lease = Lease(job.job_id, job.lease)
        await Retrier().run(lambda: self._store.give_back(lease))

    async def _clean_up_ended(self, claimed: ClaimedJob, ended: Job) -> None:
        """Count a job that has ended, and remove the files that it leaves."""
        is_completed = ended.state is JobState.COMPLETED
        try:
            _count_end(ended)
            if claimed.saved_states is not None:
                await claimed.saved_states.finish_write()
            # A remix of a completed job needs its inputs; those of other jobs would only fill the disk.
            is_kept = is_completed and ended.attached_to is None
            await run_in_thread(self._files.remove, ended.job_id, SAVED_STATE if is_kept else None)
            if is_completed:
                await self._measure(claimed.job, ended)
        except Exception:  # the job has ended nevertheless
            logger.exception("what %s leaves could not be tidied up", ended.job_id)

    async def _clean_up_lost(self, claimed: ClaimedJob) -> None:
        """Remove the files of this run if another runner has the job by now, or it is deleted."""
        job_id = claimed.job.job_id
        try:
            if claimed.saved_states is not None:
                await claimed.saved_states.finish_write()
            now = await run_in_thread(self._store.get, job_id)
            if now is None:
                await run_in_thread(self._files.remove, job_id)
            if claimed.media_id and (now is None or now.media_id != claimed.media_id):
                await run_in_thread(self._media.remove, claimed.media_id)
        except Exception:  # sweeps remove the rest
            logger.exception("what %s leaves could not be tidied up", job_id)

    async def _measure(self, job: Job, ended: Job) -> None:
        """Record the speed of a completed job: ``job`` as claimed, ``ended`` as it ended."""
        assert job.started_s is not None, "it was claimed"
        assert ended.completed_s is not None, "it has ended"
        denoising, decoding = self._throughput.setdefault(job.lane, (Throughput(), Throughput()))
        decode_s: float = ended.result["stage_durations"].get("decode_encode", 0.0)
        latents_s = max(ended.completed_s - decode_s, job.started_s)
        # A resumed job counts with the work that was left when it was claimed.
        work = job.work * max(1 - job.step / job.num_steps, 1 / job.num_steps)
        work_per_s = denoising.add(work, job.started_s, latents_s)
        pixels_per_s = None
        if decode_s:
            pixels = job.num_frames * job.width * job.height
            pixels_per_s = decoding.add(pixels, latents_s, ended.completed_s)
        await run_in_thread(self._store.note_speed, self._model, job.lane, Speed(work_per_s, pixels_per_s))

    async def _cancel_queued(self, job_id: str) -> None:
        try:
            job = await run_in_thread(self._store.cancel, job_id)
            if job is not None and job.state.is_final:
                if job.attempts == 0:  # a job that ran is counted by its run
                    _count_end(job)
                await run_in_thread(self._jobs.remove_files, job)
        except Cosmos3Error:
            logger.exception("%s could not be cancelled", job_id)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[Any]:
        task = start_task(work)
        self._tasks.add(task)  # the loop itself does not keep it
        task.add_done_callback(self._tasks.discard)
        return task


def _count_claim(job: Job) -> None:
    assert job.started_s is not None, "it was claimed"
    if job.last_seq == 1:  # its first claim, counting also those given back
        metrics().record(QUEUE_WAIT_SECONDS, job.started_s - job.created_s, "jobs", job.lane, job.service_class)
    elif job.attempts > 1:
        metrics().record(TAKEOVERS, 1)


def _count_end(job: Job) -> None:
    metrics().record(REQUESTS, 1, job.mode, job.state)
    metrics().record(REQUEST_SECONDS, (job.completed_s or job.created_s) - job.created_s, job.mode, job.state)
