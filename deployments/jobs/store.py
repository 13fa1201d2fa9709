"""JobStore: the jobs of one database, shared by any number of processes.

Writes are durable when a method returns. A method may wait up to :data:`deployments.jobs.database.BUSY_S` for others:
call it in a thread. Each raises ``JobsError`` if the database fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, func, or_, select, tuple_, update

from cluster.events import QueuePosition
from cosmos3_core.errors import RequestError
from deployments.config import JobsConfig
from deployments.jobs import estimates, queue
from deployments.jobs.database import Database
from deployments.jobs.estimates import ClassLoad, QueueBound, RetryEstimator, Speed
from deployments.jobs.job import Job, JobEvent, JobState, Lane, NewJob, Outcome, Progress
from deployments.jobs.keys import KeyLimits, KeyStore
from deployments.jobs.queue import ClaimRequest, Fault
from deployments.jobs.rows import change_job, end_job, find_events, find_job, find_leased, job_of
from deployments.jobs.schema import JOBS, RUNNERS
from deployments.jobs.silence import SilenceWatch
from deployments.media.layout import is_job_id

# Ended jobs that one transaction deletes, with up to 10,000 events each, and that one sweep deletes.
_SWEPT_AT_ONCE, _MAX_SWEPT = 20, 1000
# Jobs that one query looks up.
_IDS_AT_ONCE = 500
_CANCELLED = Outcome(JobState.CANCELLED, error_code="cancelled", error_message="it was cancelled")


@dataclass(frozen=True)
class Lease:
    """A runner's hold on a job; ``lease`` is the id of its claim."""

    job_id: str
    lease: str


@dataclass(frozen=True)
class Page:
    """A page of an owner's jobs, in the requested order; ``has_more`` if others follow."""

    jobs: tuple[Job, ...]
    has_more: bool


class JobStore:
    """The jobs and API keys of one database; ``clock`` gives seconds since 1970, ``monotonic`` those of any start."""

    def __init__(
        self,
        database: Database,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] | None = None,
    ) -> None:
        self._database = database
        self._clock = clock
        self._watch = SilenceWatch(monotonic)
        self.keys = KeyStore(database, clock)

    @classmethod
    def open(cls, url: str, clock: Callable[[], float] = time.time) -> JobStore:
        """Open the store in a database, as :class:`deployments.jobs.database.Database`."""
        return cls(Database(url), clock)

    def close(self) -> None:
        """Close its connections."""
        self._database.close()

    @property
    def longest_write_s(self) -> float:
        """Seconds since the start of the first write that has not ended; 0 if there is none."""
        return self._database.longest_write_s

    # Accepting

    def create(
        self,
        new: NewJob,
        config: JobsConfig,
        key_limits: KeyLimits | None = None,
        retry_estimator: RetryEstimator | None = None,
    ) -> Job:
        """Accept a job and return it, or the earlier one if its idempotency key came with the same request before.

        Raises:
            OverloadedError: a bound of the queue is reached.
            IdempotencyConflict: its idempotency key came with another request before.
            RequestError: the class is unknown, or a text cannot be stored.
        """
        queue.check_storable(new, config)
        estimator = RetryEstimator() if retry_estimator is None else retry_estimator
        caller = new.owner, new.fingerprint

        def count_kept(bound: QueueBound) -> int:
            return estimator.count_kept(bound, caller)

        try:
            # First without the write lock: clients that keep trying a full queue must not block runners.
            with self._database.reading() as connection:
                if (earlier := queue.find_earlier(connection, new)) is not None:
                    return earlier
                queue.check_room(connection, new, config, key_limits, count_kept)
            with self._database.writing(is_queue=True) as connection:
                if (earlier := queue.find_earlier(connection, new)) is not None:
                    return earlier
                queue.check_room(connection, new, config, key_limits, count_kept)
                job = queue.enqueue(connection, new, config, self._clock())
        except queue.QueueFull as full:
            bound = full.bound
            with self._database.reading() as connection:
                wait_s = estimator.promise(
                    bound,
                    caller,
                    lambda num_before: estimates.estimate_retry_s(
                        connection, new.model, bound, self._clock(), num_before
                    ),
                )
            raise bound.make_error(wait_s) from None
        estimator.fulfil(caller)
        return job

    # Reading

    def find_ended(self, model: str, since_s: float, limit: int) -> Sequence[Job]:
        """Return the first jobs of a model that ended after a time, in the order of their ends."""
        ended = (JOBS.c.completed_s > since_s, JOBS.c.model == model)
        with self._database.reading() as connection:
            rows = connection.execute(select(JOBS).where(*ended).order_by(JOBS.c.completed_s).limit(limit)).all()
        return [job_of(row) for row in rows]

    def get(self, job_id: str, owner: str | None = None) -> Job | None:
        """Return a job; None if there is none of this id, or it is not the ``owner``'s (None = any owner)."""
        if not is_job_id(job_id):
            return None
        with self._database.reading() as connection:
            return find_job(connection, job_id, owner)

    def list(self, owner: str, *, after: str | None, limit: int, is_ascending: bool) -> Page:
        """Return a page of an owner's jobs in the order of their acceptance, without attached ones.

        Args:
            after: id of the job that precedes the page; None = the first page.
            is_ascending: the oldest first, else the newest.

        Raises:
            RequestError: there is no job ``after``.
        """
        place = tuple_(JOBS.c.created_s, JOBS.c.job_id)
        query = select(JOBS).where(JOBS.c.owner == owner, JOBS.c.attached_to.is_(None))
        order = (JOBS.c.created_s, JOBS.c.job_id)
        query = query.order_by(*(order if is_ascending else (column.desc() for column in order))).limit(limit + 1)
        with self._database.reading() as connection:
            if after is not None:
                last = find_job(connection, after, owner) if is_job_id(after) else None
                if last is None:
                    raise RequestError("after", after, "the id of a job, as long as it is kept")
                edge = tuple_(last.created_s, last.job_id)
                query = query.where(place > edge if is_ascending else place < edge)
            jobs = [job_of(row) for row in connection.execute(query)]
        return Page(tuple(jobs[:limit]), len(jobs) > limit)

    def find_events(self, cursors: Mapping[str, int], limit: int = 1000) -> Sequence[JobEvent]:
        """Return at most ``limit`` events of several jobs, each job's in order after the number in ``cursors``."""
        with self._database.reading() as connection:
            return find_events(connection, cursors, limit)

    def find_positions(self, jobs: Sequence[Job]) -> dict[str, QueuePosition]:
        """Return id -> position of those jobs that are still queued."""
        if all(job.state is not JobState.QUEUED for job in jobs):
            return {}
        with self._database.reading() as connection:
            return estimates.find_positions(connection, jobs, self._clock())

    def read_load(self, model: str) -> tuple[ClassLoad, ...]:
        """Return the load of a model by lane and class."""
        with self._database.reading() as connection:
            return estimates.read_load(connection, model)

    # Running

    def claim(self, request: ClaimRequest) -> Job | None:
        """Claim the next job for a runner under a new lease; None if there is none for it.

        A job whose lease has run out, and is not renewed while this store looks, comes first: its runner died. It is
        ended instead if it was attached to that runner, is being cancelled, or has lost as many runs as it may. Then
        the first queued job.
        """
        now_s = self._clock()
        with self._database.reading() as connection:
            work = queue.check_work(connection, request, self._watch, now_s)
        if not work.is_worth_a_claim:
            return None
        with self._database.writing(is_queue=True) as connection:
            return queue.claim_next(connection, request, work, now_s)

    def renew(self, runner: str, leases: Sequence[Lease], lease_s: float) -> tuple[set[str], set[str]]:
        """Renew a runner's leases; return the ids of the jobs that it has lost, and of those that it must stop."""
        now_s = self._clock()
        held = {lease.job_id: lease.lease for lease in leases}
        with self._database.writing() as connection:
            connection.execute(update(RUNNERS).where(RUNNERS.c.runner == runner).values(alive_s=now_s))
            renewed = queue.renew(connection, held, now_s + lease_s)
        return held.keys() - renewed.keys(), {job_id for job_id, is_cancelling in renewed.items() if is_cancelling}

    def record(self, lease: Lease, progress: Progress, events: Sequence[tuple[str, Mapping[str, Any]]]) -> int:
        """Record a job's progress, and the kind and data of its new events; return the number of its last event.

        Raise LeaseLost if the job is no longer the runner's.
        """
        changes = {name: value for name, value in vars(progress).items() if value is not None}
        with self._database.writing() as connection:
            job = find_leased(connection, lease.job_id, lease.lease)
            return change_job(connection, job, JobState.IN_PROGRESS, self._clock(), events, **changes).last_seq

    def finish(self, lease: Lease, outcome: Outcome, *, keep_media_s: float) -> Job:
        """End a job and keep its file for ``keep_media_s``; raise LeaseLost if another runner has the job."""
        with self._database.writing() as connection:
            job = find_leased(connection, lease.job_id, lease.lease)
            return end_job(connection, job, outcome, self._clock(), keep_media_s)

    def give_back(self, lease: Lease) -> None:
        """Requeue a claimed job at its place, or end a job being cancelled; raise LeaseLost if the lease is gone."""
        with self._database.writing(is_queue=True) as connection:
            job = find_leased(connection, lease.job_id, lease.lease)
            if job.is_cancelling:
                end_job(connection, job, _CANCELLED, self._clock())
                return
            queue.put_back(connection, job, self._clock())

    def postpone(self, lease: Lease, fault: Fault, config: JobsConfig) -> Job:
        """Requeue a claimed job at its place after a fault, with a pause that grows from fault to fault.

        It is ended instead if it is being cancelled, if its stage has lost as many runs of it as it may have while
        other jobs were completed, or if its faults have lasted for longer than ``max_fault_wait_s``.

        Raises:
            LeaseLost: the lease is gone.
        """
        with self._database.writing(is_queue=True) as connection:
            job = find_leased(connection, lease.job_id, lease.lease)
            if job.is_cancelling:
                return end_job(connection, job, _CANCELLED, self._clock())
            return queue.postpone(connection, job, fault, config, self._clock())

    def retry_postponed(self, model: str) -> None:
        """End the pauses of a model's jobs: their surroundings work again."""
        waiting = (JOBS.c.model == model, JOBS.c.state == JobState.QUEUED.value, JOBS.c.fault != "")
        with self._database.writing(is_queue=True) as connection:
            connection.execute(update(JOBS).where(*waiting).values(retry_at_s=0.0))

    # Ending

    def cancel(self, job_id: str, owner: str | None = None) -> Job | None:
        """End a queued job, or mark a running one for its runner to stop; return it as it is now, None as :meth:`get`.

        A job that has ended stays as it is.
        """
        if not is_job_id(job_id):
            return None
        with self._database.writing(is_queue=True) as connection:
            job = find_job(connection, job_id, owner, to_change=True)
            if job is None or job.state.is_final or job.is_cancelling:
                return job
            if job.state is JobState.QUEUED:
                return end_job(connection, job, _CANCELLED, self._clock())
            return change_job(connection, job, JobState.IN_PROGRESS, self._clock(), is_cancelling=True)

    def delete(self, job_id: str, owner: str | None = None) -> Job | None:
        """Delete a job with its events, and return it as it was, None as :meth:`get`. Its runner loses the lease."""
        if not is_job_id(job_id):
            return None
        with self._database.writing(is_queue=True) as connection:
            job = find_job(connection, job_id, owner, to_change=True)
            if job is not None:
                connection.execute(delete(JOBS).where(JOBS.c.job_id == job_id))  # its events go with it
        return job

    def find_folder_needs(self, job_ids: Sequence[str]) -> dict[str, float | None]:
        """Return for how many seconds more existing jobs need their folders; None if a job has not ended."""
        query = select(JOBS.c.job_id, JOBS.c.state, JOBS.c.expires_s)
        rows: list[Any] = []
        for first in range(0, len(job_ids), _IDS_AT_ONCE):
            some = query.where(JOBS.c.job_id.in_(job_ids[first : first + _IDS_AT_ONCE]))
            with self._database.reading() as connection:
                rows += connection.execute(some).all()
        now_s = self._clock()
        return {
            row.job_id: max((row.expires_s or 0.0) - now_s, 0.0) if JobState(row.state).is_final else None
            for row in rows
        }

    def find_media_ids(self) -> dict[str, str]:
        """Return try id -> media id of every job that has one."""
        query = select(JOBS.c.media_path).where(JOBS.c.media_path != "")
        with self._database.reading() as connection:
            return {media_id.partition("/")[2]: media_id for media_id in connection.execute(query).scalars()}

    def sweep(self, keep_s: float, max_kept: int | None = None) -> Sequence[Job]:
        """Delete and return jobs that ended longer than ``keep_s`` ago, and the oldest beyond ``max_kept``.

        At most 1000 at a time; their idempotency keys go with them.
        """
        swept: list[Job] = []
        before_s = self._clock() - keep_s
        while len(swept) < _MAX_SWEPT and (some := self._sweep_some(before_s, max_kept)):
            swept += some
        with self._database.writing(is_queue=True) as connection:
            connection.execute(delete(RUNNERS).where(RUNNERS.c.alive_s < before_s))
        return swept

    def _sweep_some(self, before_s: float, max_kept: int | None) -> Sequence[Job]:
        ended = JOBS.c.completed_s >= 0.0  # as IS NOT NULL, for which SQLite would read the whole table
        # A file stays until its expiry, however many jobs there are.
        is_spare = or_(JOBS.c.attached_to.is_not(None), JOBS.c.expires_s.is_(None), JOBS.c.expires_s < self._clock())
        # Several processes may sweep; each job is returned to one of them.
        with self._database.writing(is_queue=True) as connection:
            num_spare = 0
            if max_kept is not None:
                num_ended = connection.execute(select(func.count()).select_from(JOBS).where(ended)).scalar_one()
                num_spare = max(num_ended - max_kept, 0)
            old = select(JOBS.c.job_id).where(ended, JOBS.c.completed_s < before_s).limit(_SWEPT_AT_ONCE)
            ids = set(connection.execute(old).scalars())
            # Attached jobs, whose callers have left, come first, then the oldest.
            spare = (
                select(JOBS.c.job_id)
                .where(ended, is_spare)
                .order_by(JOBS.c.attached_to.is_(None), JOBS.c.completed_s)
                .limit(min(num_spare, _SWEPT_AT_ONCE))
            )
            ids |= set(connection.execute(spare).scalars())
            gone = connection.execute(delete(JOBS).where(JOBS.c.job_id.in_(ids)).returning(*JOBS.c))
            return sorted((job_of(row) for row in gone), key=lambda job: job.completed_s or 0.0)

    def fail_unserved(self, silent_s: float, own_model: str = "") -> int:
        """Fail jobs of models other than ``own_model`` that have had no runner for ``silent_s``; return how many."""
        since_s = self._clock() - silent_s
        served = select(RUNNERS.c.model).where(RUNNERS.c.alive_s >= since_s)
        # The caller serves its own model, even if a clock that jumped makes its own row look old.
        is_unserved = and_(JOBS.c.model.not_in(served), JOBS.c.model != own_model)
        unserved = (JOBS.c.completed_s.is_(None), JOBS.c.updated_s < since_s, is_unserved)
        with self._database.writing(is_queue=True) as connection:
            rows = connection.execute(select(JOBS).where(*unserved).limit(_SWEPT_AT_ONCE)).all()
            for row in rows:
                reason = f"the model {row.model} has not been served for {silent_s:g} s"
                outcome = Outcome(JobState.FAILED, error_code="not_served", error_message=reason)
                end_job(connection, job_of(row), outcome, self._clock())
        return len(rows)

    # Speed

    def note_speed(self, model: str, lane: Lane, speed: Speed) -> None:
        """Add a runner's speed in a lane to the average of all runners."""
        with self._database.writing() as connection:
            estimates.note_speed(connection, model, lane, speed, self._clock())
