"""Claims: the job that a runner gets next, one whose runner died or the first that waits; renewal of leases."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, exists, func, not_, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from deployments.jobs.job import Job, JobState, Lane, Outcome
from deployments.jobs.queue import QueueLimits, note_runner, read_virtual_time
from deployments.jobs.rows import change, end, job_of, put
from deployments.jobs.schema import API_KEYS, JOBS, LANES, RUNNERS

_QUEUED, _IN_PROGRESS = JobState.QUEUED.value, JobState.IN_PROGRESS.value
# Attached jobs of dead runners that one claim ends.
_MAX_ABANDONED = 100
# How often a runner is noted as alive.
_NOTES_PER_LEASE = 4


@dataclass(frozen=True)
class ClaimRequest:
    """The arguments of :meth:`deployments.jobs.store.JobStore.claim`, and its time."""

    runner: str
    model: str
    lane: Lane
    limits: QueueLimits
    lease_s: float
    max_attempts: int
    only_attached: bool
    in_hand: tuple[str, ...]
    now_s: float

    @property
    def parameters(self) -> dict[str, Any]:
        """Parameters of the queries below."""
        return {
            "runner": self.runner,
            "model": self.model,
            "lane": self.lane.value,
            "now_s": self.now_s,
            "in_hand": list(self.in_hand),
            "silent_since_s": self.now_s - self.lease_s,
            "fresh_since_s": self.now_s - self.lease_s / _NOTES_PER_LEASE,
        }


@dataclass(frozen=True)
class ClaimableWork:
    """The work that a claim may find.

    Attributes:
        is_alive_noted: whether it was noted not long ago that the runner is alive.
        has_abandoned: whether jobs wait for a runner that has died.
        has_expired: whether the lease of a running job has expired.
        has_queued: whether jobs wait.
    """

    is_alive_noted: bool
    has_abandoned: bool
    has_expired: bool
    has_queued: bool

    @property
    def is_worth_a_claim(self) -> bool:
        """Whether there is anything to write."""
        return self.has_abandoned or self.has_expired or self.has_queued or not self.is_alive_noted


def check_work(connection: Connection, claim: ClaimRequest) -> ClaimableWork:
    """Check for claimable work without taking the write lock: runners do so twice a second."""
    return ClaimableWork(*connection.execute(_work_query(claim.only_attached), claim.parameters).one())


def claim_next(connection: Connection, claim: ClaimRequest, work: ClaimableWork) -> Job | None:
    """Claim the next job for a runner; None where there is none for it.

    Args:
        connection: in a transaction that decides alone.
        claim: what the runner asks for.
        work: as :func:`check_work` found it just before; later work is for the next claim.
    """
    if not work.is_alive_noted:
        note_runner(connection, claim.runner, claim.model, claim.now_s)
    if work.has_abandoned:
        for row in connection.execute(_abandoned_query(), claim.parameters).all():
            end(connection, job_of(row), _abandoned_outcome(claim), claim.now_s)
    while work.has_expired:
        found = connection.execute(_expired_query(claim.only_attached), claim.parameters).one_or_none()
        if found is None:
            break
        job = job_of(found)
        if (outcome := _outcome_of_expired(job, claim)) is None:
            return _begin(connection, job, claim)
        end(connection, job, outcome, claim.now_s)  # and is not found again
    if not work.has_queued:
        return None
    parameters = claim.parameters | {"blocked": _find_blocked_owners(connection, claim)}
    first = connection.execute(_first_query(claim.only_attached), parameters).one_or_none()
    if first is None:
        return None
    job = job_of(first)
    time_now = max(read_virtual_time(connection, job.model, job.lane), job.order)
    put(connection, LANES, model=job.model, lane=job.lane.value, virtual_time=time_now)
    return _begin(connection, job, claim)


def renew(connection: Connection, held: Mapping[str, str], until_s: float) -> dict[str, bool]:
    """Extend leases.

    Args:
        connection: in a transaction that writes.
        held: id of a job -> the lease that is held on it.
        until_s: seconds since 1970.

    Returns:
        Id of each job that is still held -> whether it has to be stopped.
    """
    parameters = {"ids": list(held), "leases": list(held.values()), "until_s": until_s}
    return {row.job_id: row.is_cancelling for row in connection.execute(_renew_statement(), parameters)}


def _begin(connection: Connection, job: Job, claim: ClaimRequest) -> Job:
    attempt = job.attempts + 1
    return change(
        connection,
        job,
        JobState.IN_PROGRESS,
        claim.now_s,
        [("started", {"attempt": attempt})],
        runner=claim.runner,
        lease=uuid.uuid4().hex,
        lease_until_s=claim.now_s + claim.lease_s,
        attempts=attempt,
        started_s=claim.now_s,
        stage="starting",
    )


def _outcome_of_expired(job: Job, claim: ClaimRequest) -> Outcome | None:
    """Return how a job ends whose runner has died; None where another runner resumes it."""
    if job.is_cancelling:
        return Outcome(JobState.CANCELLED, error_code="cancelled", error_message="it was cancelled")
    if job.attached_to not in (None, claim.runner):
        return _abandoned_outcome(claim)
    if job.attempts >= claim.max_attempts:
        reason = f"the runner died {job.attempts} times while it ran this job, which is as often as may be"
        return Outcome(JobState.FAILED, error_code="runner_died", error_message=reason)
    return None


def _abandoned_outcome(claim: ClaimRequest) -> Outcome:
    reason = f"the process that its caller was connected to has been silent for {claim.lease_s:g} s; send it again"
    return Outcome(JobState.FAILED, error_code="abandoned", error_message=reason)


# Queries are built once: building one takes as long as running it.


def _expired(only_attached: bool) -> ColumnElement[bool]:
    """Select running jobs whose lease has expired, except those that the runner itself renews too late."""
    of_others = JOBS.c.job_id.not_in(bindparam("in_hand", expanding=True))
    expired = and_(*_of_lane(_IN_PROGRESS), JOBS.c.lease_until_s < bindparam("now_s"), of_others)
    return and_(expired, JOBS.c.attached_to.is_not(None)) if only_attached else expired


def _queued(only_attached: bool) -> ColumnElement[bool]:
    """Select queued jobs that this runner may claim."""
    own = JOBS.c.attached_to == bindparam("runner")
    return and_(*_of_lane(_QUEUED), own if only_attached else or_(own, JOBS.c.attached_to.is_(None)))


def _abandoned() -> ColumnElement[bool]:
    """Select queued jobs that are attached to a runner that has died."""
    is_alive = exists().where(RUNNERS.c.runner == JOBS.c.attached_to, RUNNERS.c.alive_s >= bindparam("silent_since_s"))
    of_others = and_(JOBS.c.attached_to.is_not(None), JOBS.c.attached_to != bindparam("runner"))
    return and_(*_of_lane(_QUEUED), of_others, not_(is_alive))


def _of_lane(state: str) -> tuple[ColumnElement[bool], ...]:
    return JOBS.c.model == bindparam("model"), JOBS.c.state == state, JOBS.c.lane == bindparam("lane")


def _locked(condition: ColumnElement[bool], limit: int) -> Select[Any]:
    """Select rows in queue order, skipping those that others are changing, and lock them."""
    return (
        select(JOBS)
        .where(condition)
        .order_by(JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )


@cache
def _work_query(only_attached: bool) -> Select[bool, bool, bool, bool]:
    is_alive_noted = exists().where(
        RUNNERS.c.runner == bindparam("runner"), RUNNERS.c.alive_s > bindparam("fresh_since_s")
    )
    abandoned, expired, queued = _abandoned(), _expired(only_attached), _queued(only_attached)
    return select(is_alive_noted, exists().where(abandoned), exists().where(expired), exists().where(queued))


@cache
def _renew_statement() -> ReturningUpdate[str, bool]:
    return (
        update(JOBS)
        .where(JOBS.c.job_id.in_(bindparam("ids", expanding=True)), JOBS.c.state == _IN_PROGRESS)
        .where(JOBS.c.lease.in_(bindparam("leases", expanding=True)))  # a claim's name is its own
        .values(lease_until_s=bindparam("until_s"))
        .returning(JOBS.c.job_id, JOBS.c.is_cancelling)
    )


@cache
def _abandoned_query() -> Select[Any]:
    return _locked(_abandoned(), _MAX_ABANDONED)


@cache
def _expired_query(only_attached: bool) -> Select[Any]:
    return _locked(_expired(only_attached), 1)


@cache
def _first_query(only_attached: bool) -> Select[Any]:
    return _locked(and_(_queued(only_attached), JOBS.c.owner.not_in(bindparam("blocked", expanding=True))), 1)


@cache
def _running_query() -> Select[Any]:
    """Select owners, the bounds of their keys, and how many of their jobs run in a lane."""
    return (
        select(JOBS.c.owner, API_KEYS.c.max_running, func.count())
        .join(API_KEYS, API_KEYS.c.key_id == JOBS.c.owner, isouter=True)
        .where(*_of_lane(_IN_PROGRESS), JOBS.c.owner != "")
        .group_by(JOBS.c.owner, API_KEYS.c.max_running)
    )


def _find_blocked_owners(connection: Connection, claim: ClaimRequest) -> list[str]:
    """Return owners that have as many jobs running as they may."""
    default = claim.limits.max_running_per_key
    found = []
    for owner, own_limit, num_running in connection.execute(_running_query(), claim.parameters):
        limit = default if own_limit is None else own_limit
        if limit is not None and num_running >= limit:
            found.append(owner)
    return found
