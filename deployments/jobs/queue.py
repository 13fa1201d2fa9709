"""The queue: its bounds, the order of its jobs, and which job a runner claims next.

The order is weighted fair queueing by a self-clocked virtual time (Golestani 1994). Jobs of one owner and class in a
lane are a flow. A new job is given the place

    max(virtual time, place of its flow's last queued job) + its work / its class's share,

and the job with the lowest place is begun next, whose place is the lane's virtual time from then on. So each class gets
its share of the work, and the owners of a class get equal parts. An owner who sends many jobs waits behind its own, and
one who sends none saves nothing up. Jobs behind a cancelled one keep their places.

Every change of a job's order or state happens under the queue lock (``Database.writing(is_queue=True)``); leases are
renewed without it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, exists, func, not_, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from deployments.config import JobsConfig
from deployments.errors import IdempotencyConflict
from deployments.jobs.estimates import QueueBound
from deployments.jobs.job import Job, JobState, Lane, NewJob, Outcome
from deployments.jobs.keys import KeyLimits
from deployments.jobs.rows import change_job, end_job, insert_job, job_of, upsert
from deployments.jobs.schema import API_KEYS, IN_PROGRESS, JOBS, LANES, QUEUE_ORDER, QUEUED, RUNNERS
from deployments.jobs.silence import SilenceWatch

# Most attached jobs of dead runners that one claim ends.
_MAX_ABANDONED = 100
# Times in a lease that a runner is noted as alive.
_NOTES_PER_LEASE = 4
# A suspect must show a sign of life in this share of a lease: runners note themselves four times in one.
_PATIENCE = 0.5
# The same for leases of running jobs, which are renewed twice a second.
_LONGEST_PATIENCE_S = 3.0
# Tolerated difference of clocks.
_MAX_SKEW_S = 2.0
# Leases and runners that are looked at in one claim.
_MAX_SUSPECTS = 1000
# A job's pauses after faults of its surroundings: the first, twice as long each time, up to the longest.
_FIRST_PAUSE_S, MAX_PAUSE_S, _MAX_DOUBLINGS = 1.0, 60.0, 10

# Frequent queries are built once: building one takes as long as running it.


# Accepting


class QueueFull(Exception):
    """A bound of the queue is reached; the store adds when to retry."""

    def __init__(self, bound: QueueBound) -> None:
        super().__init__(bound)
        self.bound = bound


def check_storable(new: NewJob, config: JobsConfig) -> None:
    """Raise RequestError if a text cannot be stored, or there is no such class."""
    checks.choice("service_class", new.service_class, tuple(config.classes))
    assert new.work > 0, "every job has some"
    assert new.num_steps > 0, "every job has some"
    for name in ("prompt", "request_id", "idempotency_key", "owner"):
        text = getattr(new, name) or ""
        if "\0" in text:
            raise RequestError(name, text, "a text without the character NUL")
        try:
            text.encode()
        except UnicodeEncodeError:
            raise RequestError(name, text, "valid Unicode; this has half of a surrogate pair") from None


def find_earlier(connection: Connection, new: NewJob) -> Job | None:
    """Return the earlier job of an idempotency key; raise IdempotencyConflict if that was another request."""
    if new.idempotency_key is None:
        return None
    query = select(JOBS).where(JOBS.c.owner == new.owner, JOBS.c.idempotency_key == new.idempotency_key)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.fingerprint != new.fingerprint:
        raise IdempotencyConflict(new.idempotency_key)
    return job_of(row)


def check_room(
    connection: Connection,
    new: NewJob,
    config: JobsConfig,
    key_limits: KeyLimits | None,
    count_kept: Callable[[QueueBound], int],
) -> None:
    """Raise QueueFull if the queue of a model's lane, or the owner's part of it, has no room for another job.

    ``count_kept`` returns how many places of a bound are kept for others.
    """
    parameters = {"model": new.model, "lane": new.lane.value, "owner": new.owner}

    def check(bound: QueueBound) -> None:
        num_queued = connection.execute(_query_count(bound.owner is not None), parameters).scalar_one()
        if num_queued + count_kept(bound) >= bound.limit:
            raise QueueFull(bound)

    check(QueueBound(new.lane, None, config.max_queued))
    own_limit = None if key_limits is None else key_limits.max_queued
    if own_limit is None and new.owner:
        own_limit = config.max_queued_per_key
    if own_limit is not None:
        check(QueueBound(new.lane, new.owner, own_limit))


@cache
def _query_count(is_own: bool) -> Select[Any]:
    queued = select(func.count()).select_from(JOBS).where(*_in_lane(QUEUED))
    return queued.where(JOBS.c.owner == bindparam("owner")) if is_own else queued


def enqueue(connection: Connection, new: NewJob, config: JobsConfig, now_s: float) -> Job:
    """Insert a job at its place in the order."""
    if new.attached_to is not None:
        note_runner(connection, new.attached_to, new.model, now_s)
    # Jobs of the flow that have begun lie at or before the virtual time.
    flow = {"model": new.model, "lane": new.lane.value, "service_class": new.service_class, "owner": new.owner}
    last = connection.execute(_query_last_place(), flow).scalar_one() or 0.0
    begin = max(_read_virtual_time(connection, new.model, new.lane), last)
    return insert_job(connection, new, begin + new.work / config.classes[new.service_class], now_s)


@cache
def _query_last_place() -> Select[Any]:
    """Build the query for the last place of a flow; null if it has no queued job."""
    flow = (JOBS.c[name] == bindparam(name) for name in ("service_class", "owner"))
    return select(func.max(JOBS.c.queue_order)).where(*_in_lane(QUEUED), *flow)


def note_runner(connection: Connection, runner: str, model: str, now_s: float) -> None:
    """Note that a runner is alive."""
    upsert(connection, RUNNERS, runner=runner, model=model, alive_s=now_s)


def _read_virtual_time(connection: Connection, model: str, lane: Lane) -> float:
    query = select(LANES.c.virtual_time).where(LANES.c.model == model, LANES.c.lane == lane.value)
    return connection.execute(query).scalar_one_or_none() or 0.0


# Claiming


@dataclass(frozen=True)
class ClaimRequest:
    """A runner's request for its next job.

    Attributes:
        runner, model: id of the runner, and name of the model that it serves.
        lane: has room for another job.
        config: a runner that is silent for longer than its ``lease_s`` counts as dead.
        only_attached: claim only jobs whose callers wait at this runner.
        in_hand: ids of jobs that it runs and may renew late.
    """

    runner: str
    model: str
    lane: Lane
    config: JobsConfig
    only_attached: bool = False
    in_hand: tuple[str, ...] = ()

    def query_parameters(self, now_s: float) -> dict[str, Any]:
        """Return the parameters of the queries below."""
        return {
            "runner": self.runner,
            "model": self.model,
            "lane": self.lane.value,
            "now_s": now_s,
            "in_hand": sorted(self.in_hand),
            "silent_since_s": now_s - self.config.lease_s,
            "fresh_since_s": now_s - self.config.lease_s / _NOTES_PER_LEASE,
            "latest_lease_s": now_s + self.config.lease_s + _MAX_SKEW_S,
            "latest_s": now_s + _MAX_SKEW_S,
            "latest_retry_s": now_s + MAX_PAUSE_S,
        }


@dataclass(frozen=True)
class ClaimableWork:
    """The work that a claim may find.

    Attributes:
        is_alive_noted: the runner was noted as alive not long ago.
        dead_runners: runners that queued jobs are attached to and that are silent.
        dead_leases: leases of running jobs that are silent -> their ``lease_until_s`` as it was read. A claim takes
            over only those whose time is still the same.
        has_queued: there are queued jobs, and no lease that has run out is still being looked at.
    """

    is_alive_noted: bool
    dead_runners: tuple[str, ...]
    dead_leases: Mapping[str, float]
    has_queued: bool

    @property
    def is_worth_a_claim(self) -> bool:
        """Whether there is anything to write."""
        return bool(self.dead_runners or self.dead_leases or self.has_queued or not self.is_alive_noted)


def check_work(connection: Connection, claim: ClaimRequest, watch: SilenceWatch, now_s: float) -> ClaimableWork:
    """Check for claimable work without taking the write lock: runners do so twice a second."""
    parameters = claim.query_parameters(now_s)
    found = connection.execute(_query_work(claim.only_attached), parameters).one()
    is_alive_noted, has_suspect_runners, has_suspect_leases, has_queued = found
    runners: dict[str, float] = {}
    if has_suspect_runners:
        for runner, alive_s in connection.execute(_query_suspect_runners(), parameters):
            runners[runner] = -1.0 if alive_s is None else alive_s
    leases: dict[str, float] = {}
    if has_suspect_leases:
        leases = {row.lease: row.lease_until_s for row in connection.execute(_query_suspect_leases(), parameters)}
    lane, lease_s = claim.lane, claim.config.lease_s
    silent = watch.find_silent(("runners", lane), runners, _PATIENCE * lease_s)
    # A lease that has run out was not renewed in time; one from a clock that was ahead may be valid for its whole time.
    lapsed = {lease: until_s for lease, until_s in leases.items() if until_s < now_s}
    ahead = {lease: until_s for lease, until_s in leases.items() if until_s >= now_s}
    dead = watch.find_silent(("lapsed", lane), lapsed, min(_PATIENCE * lease_s, _LONGEST_PATIENCE_S))
    # Jobs of dead runners come first: while one may be about to show, no other is begun.
    is_decided = len(dead) == len(lapsed)
    dead |= watch.find_silent(("ahead", lane), ahead, lease_s)
    return ClaimableWork(bool(is_alive_noted), tuple(silent), dead, bool(has_queued) and is_decided)


def claim_next(connection: Connection, claim: ClaimRequest, work: ClaimableWork, now_s: float) -> Job | None:
    """Claim the next job for a runner under the queue lock; None if there is none for it.

    ``work`` is what :func:`check_work` found just before; later work is left for the next claim.
    """
    parameters = claim.query_parameters(now_s)
    if not work.is_alive_noted:
        note_runner(connection, claim.runner, claim.model, now_s)
    if work.dead_runners:
        abandoned = and_(*_in_lane(QUEUED), JOBS.c.attached_to.in_(work.dead_runners))
        for row in connection.execute(_select_and_lock(abandoned, _MAX_ABANDONED), parameters).all():
            end_job(connection, job_of(row), _outcome_of_abandoned(claim), now_s)
    dead_leases = dict(work.dead_leases)
    while dead_leases:
        expired = and_(_is_suspect(claim.only_attached), JOBS.c.lease.in_(dead_leases))
        found = connection.execute(_select_and_lock(expired, 1), parameters).one_or_none()
        if found is None:
            break
        job = job_of(found)
        if dead_leases.pop(job.lease) != job.lease_until_s:
            continue  # it was renewed just now
        if (outcome := _outcome_of_expired(job, claim)) is not None:
            end_job(connection, job, outcome, now_s)  # and is not found again
        elif job.attempts >= claim.config.max_attempts:
            postpone(connection, job, _make_death(job), claim.config, now_s)
        else:
            return _start_claimed(connection, job, claim, now_s)
    if not work.has_queued:
        return None
    parameters["blocked"] = _find_blocked_owners(connection, claim.config, parameters)
    first = connection.execute(_query_first(claim.only_attached), parameters).one_or_none()
    if first is None:
        return None
    job = job_of(first)
    virtual_time = max(_read_virtual_time(connection, job.model, job.lane), job.order)
    upsert(connection, LANES, model=job.model, lane=job.lane.value, virtual_time=virtual_time)
    return _start_claimed(connection, job, claim, now_s)


# Postponing


@dataclass(frozen=True)
class Fault:
    """Why a run of a job stopped although nothing is wrong with its request.

    Attributes:
        what: in a few words, for the job's status.
        code, message: of the job's error if it is ended.
        counts_if_others_succeed: whether the run counts as an attempt if other jobs were completed meanwhile.
    """

    what: str
    code: str
    message: str
    counts_if_others_succeed: bool


def postpone(connection: Connection, job: Job, fault: Fault, config: JobsConfig, now_s: float) -> Job:
    """Requeue a claimed job after a fault, with a pause that grows from fault to fault, or end it.

    It is ended if it has lost its last run while other jobs were completed, or has had faults for too long.
    """
    since_s = now_s if job.fault_since_s is None else job.fault_since_s
    is_attempt = fault.counts_if_others_succeed and _have_others_succeeded(connection, job, now_s)
    is_last = is_attempt and job.attempts >= config.max_attempts
    is_late = config.max_fault_wait_s is not None and now_s - since_s >= config.max_fault_wait_s
    if is_last or is_late:
        outcome = Outcome(JobState.FAILED, error_code=fault.code, error_message=fault.message)
        return end_job(connection, job, outcome, now_s)
    return put_back(
        connection,
        job,
        now_s,
        pause_s=min(_FIRST_PAUSE_S * 2.0 ** min(job.num_faults, _MAX_DOUBLINGS), MAX_PAUSE_S),
        is_attempt=is_attempt,
        num_faults=job.num_faults + 1,
        fault=fault.what,
        fault_since_s=since_s,
    )


def _have_others_succeeded(connection: Connection, job: Job, now_s: float) -> bool:
    """Return whether another job of the model that began later was completed: what both need works."""
    # An end in the future is from before the clock was set back.
    completed = (JOBS.c.state == JobState.COMPLETED.value, JOBS.c.completed_s.between(job.started_s, now_s))
    later = (JOBS.c.model == job.model, JOBS.c.started_s >= job.started_s)
    query = select(JOBS.c.job_id).where(*completed, *later).limit(1)
    return connection.execute(query).first() is not None


def put_back(
    connection: Connection, job: Job, now_s: float, *, pause_s: float = 0.0, is_attempt: bool = False, **changes: Any
) -> Job:
    """Requeue a claimed job at its place, to be claimed after a pause; its run counts if ``is_attempt``."""
    return change_job(
        connection,
        job,
        JobState.QUEUED,
        now_s,
        runner="",
        lease="",
        lease_until_s=0.0,
        stage="queued",
        attempts=job.attempts if is_attempt else job.attempts - 1,
        retry_at_s=now_s + pause_s if pause_s else 0.0,
        **changes,
    )


def renew(connection: Connection, held: Mapping[str, str], until_s: float) -> dict[str, bool]:
    """Extend the leases of ``held``, id of a job -> lease.

    Returns:
        Id of each job that is still held -> whether it must be stopped.
    """
    parameters = {"ids": list(held), "leases": list(held.values()), "until_s": until_s}
    return {row.job_id: row.is_cancelling for row in connection.execute(_renew_statement(), parameters)}


def _start_claimed(connection: Connection, job: Job, claim: ClaimRequest, now_s: float) -> Job:
    attempt = job.attempts + 1
    return change_job(
        connection,
        job,
        JobState.IN_PROGRESS,
        now_s,
        [("started", {"attempt": attempt})],
        runner=claim.runner,
        lease=uuid.uuid4().hex,
        lease_until_s=now_s + claim.config.lease_s,
        attempts=attempt,
        started_s=now_s,
        stage="starting",
        fault="",
    )


def _outcome_of_expired(job: Job, claim: ClaimRequest) -> Outcome | None:
    """Return how the job of a dead runner ends; None if another runner resumes it."""
    if job.is_cancelling:
        return Outcome(JobState.CANCELLED, error_code="cancelled", error_message="it was cancelled")
    if job.attached_to not in (None, claim.runner):
        return _outcome_of_abandoned(claim)
    return None


def _make_death(job: Job) -> Fault:
    reason = f"the runner died {job.attempts} times while it ran this job, the most that jobs.max_attempts allows"
    return Fault("runner_died", "runner_died", reason, counts_if_others_succeed=True)


def _outcome_of_abandoned(claim: ClaimRequest) -> Outcome:
    silent_s = f"{claim.config.lease_s:g} s"
    reason = f"the process that its caller was connected to has been silent for {silent_s}; send it again"
    return Outcome(JobState.FAILED, error_code="abandoned", error_message=reason)


def _in_lane(state: str) -> tuple[ColumnElement[bool], ...]:
    return JOBS.c.model == bindparam("model"), JOBS.c.state == state, JOBS.c.lane == bindparam("lane")


def _is_suspect(only_attached: bool) -> ColumnElement[bool]:
    """Select running jobs whose lease has run out, or is longer than any, except the runner's own, renewed late."""
    of_others = JOBS.c.job_id.not_in(bindparam("in_hand", expanding=True))
    until_s = JOBS.c.lease_until_s
    is_strange = or_(until_s < bindparam("now_s"), until_s > bindparam("latest_lease_s"))
    suspect = and_(*_in_lane(IN_PROGRESS), is_strange, of_others)
    return and_(suspect, JOBS.c.attached_to.is_not(None)) if only_attached else suspect


def _is_queued(only_attached: bool) -> ColumnElement[bool]:
    """Select queued jobs that this runner may claim."""
    own = JOBS.c.attached_to == bindparam("runner")
    # A time that is later than any pause was set by a clock that has been set back since.
    has_paused = or_(JOBS.c.retry_at_s <= bindparam("now_s"), JOBS.c.retry_at_s > bindparam("latest_retry_s"))
    return and_(*_in_lane(QUEUED), has_paused, own if only_attached else or_(own, JOBS.c.attached_to.is_(None)))


def _is_abandoned() -> ColumnElement[bool]:
    """Select queued jobs that are attached to a runner whose last sign of life is old, or in the future."""
    is_recent = RUNNERS.c.alive_s.between(bindparam("silent_since_s"), bindparam("latest_s"))
    is_alive = exists().where(RUNNERS.c.runner == JOBS.c.attached_to, is_recent).correlate(JOBS)
    of_others = and_(JOBS.c.attached_to.is_not(None), JOBS.c.attached_to != bindparam("runner"))
    return and_(*_in_lane(QUEUED), of_others, not_(is_alive))


def _select_and_lock(condition: ColumnElement[bool], limit: int) -> Select[Any]:
    """Select rows in queue order and lock them, skipping those that others are changing."""
    return select(JOBS).where(condition).order_by(*QUEUE_ORDER).limit(limit).with_for_update(skip_locked=True)


@cache
def _query_work(only_attached: bool) -> Select[bool, bool, bool, bool]:
    this = RUNNERS.c.runner == bindparam("runner")
    is_alive_noted = exists().where(this, RUNNERS.c.alive_s > bindparam("fresh_since_s"))
    conditions = (_is_abandoned(), _is_suspect(only_attached), _is_queued(only_attached))
    abandoned, expired, queued = (exists().where(condition) for condition in conditions)
    return select(is_alive_noted, abandoned, expired, queued)


@cache
def _query_suspect_runners() -> Select[Any]:
    runner = RUNNERS.c.runner == JOBS.c.attached_to
    query = select(JOBS.c.attached_to, RUNNERS.c.alive_s).join(RUNNERS, runner, isouter=True).where(_is_abandoned())
    return query.distinct().limit(_MAX_SUSPECTS)


@cache
def _query_suspect_leases() -> Select[str, float]:
    suspect = select(JOBS.c.lease, JOBS.c.lease_until_s).where(_is_suspect(only_attached=False))
    return suspect.order_by(*QUEUE_ORDER).limit(_MAX_SUSPECTS)


@cache
def _query_first(only_attached: bool) -> Select[Any]:
    is_allowed = JOBS.c.owner.not_in(bindparam("blocked", expanding=True))
    return _select_and_lock(and_(_is_queued(only_attached), is_allowed), 1)


@cache
def _renew_statement() -> ReturningUpdate[str, bool]:
    return (
        update(JOBS)
        .where(JOBS.c.job_id.in_(bindparam("ids", expanding=True)), JOBS.c.state == IN_PROGRESS)
        .where(JOBS.c.lease.in_(bindparam("leases", expanding=True)))  # leases are unique
        .values(lease_until_s=bindparam("until_s"))
        .returning(JOBS.c.job_id, JOBS.c.is_cancelling)
    )


@cache
def _query_running() -> Select[Any]:
    """Select owners, the bounds of their keys, and how many of their jobs run in a lane."""
    return (
        select(JOBS.c.owner, API_KEYS.c.max_running, func.count())
        .join(API_KEYS, API_KEYS.c.key_id == JOBS.c.owner, isouter=True)
        .where(*_in_lane(IN_PROGRESS), JOBS.c.owner != "")
        .group_by(JOBS.c.owner, API_KEYS.c.max_running)
    )


def _find_blocked_owners(connection: Connection, config: JobsConfig, parameters: Mapping[str, Any]) -> list[str]:
    """Return the owners at their limit of running jobs."""
    blocked = []
    for owner, own_limit, num_running in connection.execute(_query_running(), parameters):
        limit = config.max_running_per_key if own_limit is None else own_limit
        if limit is not None and num_running >= limit:
            blocked.append(owner)
    return blocked
