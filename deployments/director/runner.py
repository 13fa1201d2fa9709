"""JobRunner: claims jobs while there is room for them, runs them through the stages, and writes down how they end.

One lives in each Director. It alone runs jobs, whoever asked for them: those whose caller waits here (*attached*) hand
every event on to the caller as it comes; the others are followed through the database.

A claim is a lease: it is renewed while the job runs, and where that stops, another runner takes the job over and goes
on from the last state that was left in the media store. Everything that this one still writes about the job is then
refused, and its pipeline is stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import logging
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import ShuttingDown
from cosmos3_core.errors import Cosmos3Error
from deployments.director.leases import Leases
from deployments.director.recorder import Recorder, Tries, result_of
from deployments.director.request_check import RequestCheck
from deployments.director.run import RESTART_S, Run, Stop
from deployments.director.runner_spec import DescribeFailure, MakePipeline, RunnerSpec
from deployments.director.saved_states import CHECKPOINT, SavedStates
from deployments.errors import JobCancelled, LeaseLost
from deployments.failures import translate_error
from deployments.jobs.cost import Throughput
from deployments.jobs.job import Job, JobState, Lane, Outcome
from deployments.jobs.request_codec import decoded
from deployments.jobs.service import JobService
from deployments.jobs.store import Lease
from deployments.messages import Event, FileStarted, Finished, RequestContext
from deployments.observability.logs import watch_request
from deployments.observability.metrics import metrics
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

# Between two looks at where a caller's job stands in the queue.
_POSITION_PERIOD_S = 1.0
# After an error of the loop's own: a database that is away, say.
_PAUSE_S = 1.0


@dataclass(eq=False)
class _Caller:
    """Who waits for an attached job."""

    context: RequestContext
    # From then on its job is there.
    is_following: bool = False
    # A request has as many events as steps and chunks, which are bounded.
    items: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    has_begun: bool = False
    has_ended: bool = False


class JobRunner:
    """See the module. Inside one event loop, which it has to be made in.

    Args:
        jobs: with their files.
        check: of requests.
        make_pipeline: see :class:`MakePipeline`.
        tell_failure: see :class:`DescribeFailure`.
        is_told: whether that says all there is; else it belongs into the log.
        spec: how it works.
    """

    def __init__(
        self,
        jobs: JobService,
        check: RequestCheck,
        make_pipeline: MakePipeline,
        tell_failure: DescribeFailure,
        is_told: Callable[[BaseException], bool],
        spec: RunnerSpec,
    ) -> None:
        self.runner_id = uuid.uuid4().hex
        self._jobs = jobs
        self._store, self._files, self._media = jobs.store, jobs.files, jobs.media
        self._check, self._make_pipeline, self._tell_failure = check, make_pipeline, tell_failure
        self._is_told = is_told
        self._spec = spec
        self._callers: dict[str, _Caller] = {}
        self._runs: dict[str, Run] = {}
        self._throughput: dict[Lane, Throughput] = {}
        self._wake = asyncio.Event()
        self._leases = Leases(jobs.store, self.runner_id, spec.lease_s, self._runs)
        self._is_draining = self._is_released = False
        # Contexts of their own: a task made inside a request would be cancelled with that request.
        self._alive: set[asyncio.Task[Any]] = set()
        self._claiming = self._detached(self._claim_loop())
        self._detached(self._leases.keep())

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
        """Give back what runs and nobody waits for, to be gone on with by the next runner; stop the rest.

        Nothing is begun any more. Callers who wait are told, and their jobs are cancelled when this has returned.
        """
        self._is_draining = self._is_released = True
        self.nudge()
        waiting = [job_id for job_id, caller in self._callers.items() if not (caller.has_begun or caller.has_ended)]
        queued = [job_id for job_id in waiting if self._shut_out(self._callers[job_id])]
        runs = list(self._runs.values())
        for run in runs:
            run.stop(Stop.GIVEN_BACK if run.job.attached_to is None else Stop.SHUT_DOWN)
        tasks = [run.task for run in runs if run.task is not None]
        await asyncio.gather(self._cancel_all(queued), *tasks, return_exceptions=True)

    def _shut_out(self, caller: _Caller) -> bool:
        """Tell a caller who waits of the shutdown; returns whether its job is there, to be cancelled."""
        caller.items.put_nowait(ShuttingDown(RESTART_S))
        # Else it is about to be created, and is cancelled when the caller leaves.
        caller.has_ended = caller.is_following
        return caller.is_following

    async def _cancel_all(self, job_ids: Sequence[str]) -> None:
        await asyncio.wait([self._claiming])  # it may have claimed one, and gives it back then
        await asyncio.gather(*map(self._cancel_queued, job_ids))

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
            run.stop(Stop.LEFT)
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
        caller.is_following = True
        self.nudge()
        position: int | None = None
        while True:
            item = await self._next(caller)
            if item is None:  # it waits, and it is time to look where
                found = None if caller.has_begun else await run_in_thread(self._store.get, job.job_id)
                if caller.has_begun or not caller.items.empty():
                    continue
                if found is None or found.state.is_final:
                    raise JobCancelled(job.job_id, "" if found is None else found.error_message)
                waits = (await run_in_thread(self._store.queue_positions, [found])).get(job.job_id)
                if waits is not None and waits.position != position and not caller.has_begun:
                    position = waits.position
                    yield waits
                continue
            if isinstance(item, Exception):
                raise item
            yield item
            if isinstance(item, Finished):
                return

    async def _next(self, caller: _Caller) -> Event | Exception | None:
        """The next event; None where none came and it is time to look at the queue again."""
        if caller.has_begun:
            return await caller.items.get()  # the pipeline keeps the deadline
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
                        if (job := await run_in_thread(self._claim, lane)) is None:
                            break
                        _tell_claim(job)
                        # It may have been claimed just before.
                        if self._is_released or (self._is_draining and job.attached_to is None):
                            await self._give_back(job)
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
        run = self._runs[job.job_id] = Run(job)
        if (caller := self._callers.get(job.job_id)) is not None:
            caller.has_begun = True
        elif job.attached_to is not None:
            run.stop(Stop.LEFT)
        run.task = self._detached(self._run(run, caller))

    # Running

    async def _run(self, run: Run, caller: _Caller | None) -> None:
        """One claimed job, to its end, whatever that is. Raises nothing."""
        job = run.job
        recorder = Recorder(self._store, job, run.cannot_be_written, self._leases.patience_s)
        finished: Finished | None = None
        failure: Exception | None = None
        if run.stopped is None:
            run.is_walking = True
            try:
                async for event in self._walk(run, caller):
                    recorder.note(event)
                    if isinstance(event, FileStarted | Finished):
                        run.media_id = event.media_id
                    if isinstance(event, Finished):
                        finished = event
                    elif caller is not None:
                        caller.items.put_nowait(event)
            except asyncio.CancelledError:
                pass  # by whoever stopped it, and has said why
            except Exception as error:  # noqa: BLE001 - whatever a stage raised ends the job, and nothing else
                meaning = translate_error(error, "director")
                failure = meaning if isinstance(meaning, Exception) else error
            run.is_walking = False
        try:
            await self._end(run, recorder, finished, failure)
        except LeaseLost:
            run.stop(Stop.LOST)
            failure = failure or run.why()
            await self._tidy_lost(run)
        except Exception as error:
            logger.exception("the end of %s could not be written down", job.job_id)
            failure = failure or error
        del self._runs[job.job_id]
        self.nudge()
        if caller is not None:
            # What the database does not know is not told: the file might be made once more.
            caller.has_ended = True
            caller.items.put_nowait(failure or finished or run.why())

    async def _walk(self, run: Run, caller: _Caller | None) -> AsyncIterator[Event]:
        job = run.job
        if job.media_id:
            # An earlier run's, whose writer may have died without a word: whoever watches it is told.
            await run_in_thread(self._media.fail, job.media_id, "the job was taken over by another runner")
        context = (
            RequestContext.new(job.request_id, self._spec.run_timeout_s, job.job_id)
            if caller is None
            else caller.context
        )
        media = {name: await run_in_thread(self._files.get, job.job_id, name) for name in job.inputs}
        resolved = await self._check.resolve(context, decoded(job.request, media))
        del media
        run.checkpoints = checkpoints = SavedStates(self._files, job.job_id, self._spec.checkpoint_period_s)
        begin_from = await run_in_thread(checkpoints.read)
        pipeline = self._make_pipeline(resolved, context, job, begin_from, checkpoints.offer)
        del resolved, begin_from
        assert job.started_s is not None, "it was claimed"
        events = watch_request(pipeline.events(), context, job.mode, job.started_s - job.created_s)
        async with aclosing(events) as watched:
            async for event in watched:
                yield event

    async def _end(self, run: Run, recorder: Recorder, finished: Finished | None, failure: Exception | None) -> None:
        if finished is None and run.is_out_of_hand:
            raise LeaseLost(run.job.job_id)
        if finished is None and run.stopped is Stop.GIVEN_BACK:
            if run.checkpoints is not None:
                await run.checkpoints.write_last()
            await self._give_back(run.job)
            return
        if finished is not None:  # whoever wanted it stopped came too late
            outcome = Outcome(JobState.COMPLETED, result=result_of(finished))
        elif failure is not None:
            code, message = self._tell_failure(failure)
            if not self._is_told(failure):
                logger.error("%s failed", run.job.job_id, exc_info=failure)
            outcome = Outcome(JobState.FAILED, error_code=code, error_message=message)
        else:
            outcome = Outcome(JobState.CANCELLED, error_code="cancelled", error_message=str(run.why()))
        ended = await recorder.end(outcome, keep_media_s=self._spec.keep_media_s)
        await self._tidy_ended(run, ended)

    async def _give_back(self, job: Job) -> None:
        lease = Lease(job.job_id, job.lease)
        await Tries(self._leases.patience_s).of(lambda: self._store.give_back(lease))

    async def _tidy_ended(self, run: Run, ended: Job) -> None:
        """Count a job that has ended, and remove what it leaves."""
        is_completed = ended.state is JobState.COMPLETED
        try:
            _tell_end(ended)
            if run.checkpoints is not None:
                await run.checkpoints.settle()
            # Inputs stay for a remix of what was made; of anything else they would fill the disk for nothing.
            is_kept = is_completed and ended.attached_to is None
            await run_in_thread(self._files.remove, ended.job_id, CHECKPOINT if is_kept else None)
            if is_completed:
                await self._measure(run.job, ended)
        except Exception:  # the job has ended all the same, and its caller is told so
            logger.exception("what %s leaves could not be tidied up", ended.job_id)

    async def _tidy_lost(self, run: Run) -> None:
        """Remove what a run leaves whose job is another runner's, or gone."""
        job_id = run.job.job_id
        try:
            if run.checkpoints is not None:
                await run.checkpoints.settle()
            now = await run_in_thread(self._store.get, job_id)
            if now is None:
                await run_in_thread(self._files.remove, job_id)
            if run.media_id and (now is None or now.media_id != run.media_id):
                await run_in_thread(self._media.remove, run.media_id)
        except Exception:  # what nobody removes expires
            logger.exception("what %s leaves could not be tidied up", job_id)

    async def _measure(self, job: Job, ended: Job) -> None:
        """Enter how fast a job was done; it is given as it was claimed, and as it ended."""
        assert job.started_s is not None, "it was claimed"
        assert ended.completed_s is not None, "it has ended"
        throughput = self._throughput.setdefault(job.lane, Throughput())
        # Of one that was gone on with, what was left of it when it was claimed.
        work = job.work * max(1 - job.step / job.num_steps, 1 / job.num_steps)
        work_per_s = throughput.finished(work, job.started_s, ended.completed_s)
        await run_in_thread(self._store.note_rate, self._spec.model, job.lane, work_per_s)

    async def _cancel_queued(self, job_id: str) -> None:
        try:
            job = await run_in_thread(self._store.cancel, job_id)
            if job is not None and job.state.is_final:
                if job.attempts == 0:  # a run tells its own end
                    _tell_end(job)
                await run_in_thread(self._jobs.remove_files, job)
        except Cosmos3Error:
            logger.exception("%s could not be cancelled", job_id)

    def _detached(self, work: Any) -> asyncio.Task[Any]:
        task = asyncio.get_running_loop().create_task(work, context=contextvars.Context())
        self._alive.add(task)  # the loop itself does not keep it
        task.add_done_callback(self._alive.discard)
        return task


def _tell_claim(job: Job) -> None:
    assert job.started_s is not None, "it was claimed"
    if job.last_seq == 1:  # its first claim; what was given back has had one before
        metrics().record_queue_wait(job.lane, job.service_class, job.started_s - job.created_s)
    elif job.attempts > 1:
        metrics().count_takeover()


def _tell_end(job: Job) -> None:
    metrics().record_request(job.mode, job.state, (job.completed_s or job.created_s) - job.created_s)
