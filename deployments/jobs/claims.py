"""Which job a runner gets: one whose runner died, or the first of those that wait."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, and_, bindparam, exists, func, not_, or_, select, update
from sqlalchemy.sql.dml import ReturningUpdate

from deployments.jobs.job import Job, JobState, Lane, Outcome
from deployments.jobs.queue import QueueLimits, note_runner, virtual_time
from deployments.jobs.rows import change, end, job_of, put
from deployments.jobs.schema import API_KEYS, JOBS, LANES, RUNNERS

_QUEUED, _IN_PROGRESS = JobState.QUEUED.value, JobState.IN_PROGRESS.value
# Attached jobs of dead runners that one claim ends.
_MAX_ABANDONED = 100
# How often it is noted that a runner is alive.
_NOTES_PER_LEASE = 4


@dataclass(frozen=True)
class Claim:
    """Who asks for a job, and how it is run; see :meth:`deployments.jobs.store.JobStore.claim`."""

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
        """Of the queries below."""
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
class Look:
    """What a runner that asks for a job may find.

    Attributes:
        is_noted: whether it was noted not long ago that the runner is alive.
        has_abandoned: whether jobs wait for a runner that has died.
        has_run_out: whether the lease of a job has run out.
        has_waiting: whether jobs wait.
    """

    is_noted: bool
    has_abandoned: bool
    has_run_out: bool
    has_waiting: bool

    @property
    def is_worth_a_claim(self) -> bool:
        """Whether there is anything to write."""
        return self.has_abandoned or self.has_run_out or self.has_waiting or not self.is_noted


def look(connection: Connection, claim: Claim) -> Look:
    """What there is; without writing, which whoever looks twice a second need not do each time."""
    return Look(*connection.execute(_look_query(claim.only_attached), claim.parameters).one())


def claim_next(connection: Connection, claim: Claim, seen: Look) -> Job | None:
    """See :meth:`deployments.jobs.store.JobStore.claim`.

    Args:
        connection: in a transaction that decides alone.
        claim: who asks.
        seen: by :func:`look` just before; what has come since is for the next one.
    """
    if not seen.is_noted:
        note_runner(connection, claim.runner, claim.model, claim.now_s)
    if seen.has_abandoned:
        for row in connection.execute(_abandoned_query(), claim.parameters).all():
            end(connection, job_of(row), _gone_with_its_runner(claim), claim.now_s)
    while seen.has_run_out:
        found = connection.execute(_run_out_query(claim.only_attached), claim.parameters).one_or_none()
        if found is None:
            break
        job = job_of(found)
        if (outcome := _end_of_run_out(job, claim)) is None:
            return _begun(connection, job, claim)
        end(connection, job, outcome, claim.now_s)  # and is not found again
    if not seen.has_waiting:
        return None
    parameters = claim.parameters | {"blocked": _owners_at_their_bound(connection, claim)}
    first = connection.execute(_first_query(claim.only_attached), parameters).one_or_none()
    if first is None:
        return None
    job = job_of(first)
    time_now = max(virtual_time(connection, job.model, job.lane), job.order)
    put(connection, LANES, model=job.model, lane=job.lane.value, virtual_time=time_now)
    return _begun(connection, job, claim)


def renew(connection: Connection, held: Mapping[str, str], until_s: float) -> dict[str, bool]:
    """Have leases last longer.

    Args:
        connection: in a transaction that writes.
        held: id of a job -> the lease that is held on it.
        until_s: seconds since 1970.

    Returns:
        Id of each job that is still held -> whether it is to be stopped.
    """
    parameters = {"ids": list(held), "leases": list(held.values()), "until_s": until_s}
    return {row.job_id: row.is_cancelling for row in connection.execute(_renew_statement(), parameters)}


def _begun(connection: Connection, job: Job, claim: Claim) -> Job:
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


def _end_of_run_out(job: Job, claim: Claim) -> Outcome | None:
    """How a job ends whose runner has died; None where another runner goes on with it."""
    if job.is_cancelling:
        return Outcome(JobState.CANCELLED, error_code="cancelled", error_message="it was cancelled")
    if job.attached_to not in (None, claim.runner):
        return _gone_with_its_runner(claim)
    if job.attempts >= claim.max_attempts:
        reason = f"the runner died {job.attempts} times while it ran this job, which is as often as may be"
        return Outcome(JobState.FAILED, error_code="runner_died", error_message=reason)
    return None


def _gone_with_its_runner(claim: Claim) -> Outcome:
    reason = f"the process that its caller was connected to has been silent for {claim.lease_s:g} s; send it again"
    return Outcome(JobState.FAILED, error_code="abandoned", error_message=reason)


# Queries are made once: that takes as long as to run them.


def _run_out(only_attached: bool) -> ColumnElement[bool]:
    """Jobs in progress whose lease has run out, but for those that the runner itself has renewed too late."""
    of_others = JOBS.c.job_id.not_in(bindparam("in_hand", expanding=True))
    expired = and_(*_of_lane(_IN_PROGRESS), JOBS.c.lease_until_s < bindparam("now_s"), of_others)
    return and_(expired, JOBS.c.attached_to.is_not(None)) if only_attached else expired


def _waiting(only_attached: bool) -> ColumnElement[bool]:
    """Jobs that wait, and for this runner."""
    own = JOBS.c.attached_to == bindparam("runner")
    return and_(*_of_lane(_QUEUED), own if only_attached else or_(own, JOBS.c.attached_to.is_(None)))


def _abandoned() -> ColumnElement[bool]:
    """Jobs that wait for a runner that has died."""
    is_alive = exists().where(RUNNERS.c.runner == JOBS.c.attached_to, RUNNERS.c.seen_s >= bindparam("silent_since_s"))
    of_others = and_(JOBS.c.attached_to.is_not(None), JOBS.c.attached_to != bindparam("runner"))
    return and_(*_of_lane(_QUEUED), of_others, not_(is_alive))


def _of_lane(state: str) -> tuple[ColumnElement[bool], ...]:
    return JOBS.c.model == bindparam("model"), JOBS.c.state == state, JOBS.c.lane == bindparam("lane")


def _locked(condition: ColumnElement[bool], limit: int) -> Select[Any]:
    """Rows in order that nobody else is changing; they stay as they are until the transaction ends."""
    return (
        select(JOBS)
        .where(condition)
        .order_by(JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
        .limit(limit)
        .with_for_update(skip_locked=True)
    )


@cache
def _look_query(only_attached: bool) -> Select[bool, bool, bool, bool]:
    is_noted = exists().where(RUNNERS.c.runner == bindparam("runner"), RUNNERS.c.seen_s > bindparam("fresh_since_s"))
    abandoned, run_out, waiting = _abandoned(), _run_out(only_attached), _waiting(only_attached)
    return select(is_noted, exists().where(abandoned), exists().where(run_out), exists().where(waiting))


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
def _run_out_query(only_attached: bool) -> Select[Any]:
    return _locked(_run_out(only_attached), 1)


@cache
def _first_query(only_attached: bool) -> Select[Any]:
    return _locked(and_(_waiting(only_attached), JOBS.c.owner.not_in(bindparam("blocked", expanding=True))), 1)


@cache
def _running_query() -> Select[Any]:
    """Owners, their keys' own bounds, and how many of theirs run in a lane."""
    return (
        select(JOBS.c.owner, API_KEYS.c.max_running, func.count())
        .join(API_KEYS, API_KEYS.c.key_id == JOBS.c.owner, isouter=True)
        .where(*_of_lane(_IN_PROGRESS), JOBS.c.owner != "")
        .group_by(JOBS.c.owner, API_KEYS.c.max_running)
    )


def _owners_at_their_bound(connection: Connection, claim: Claim) -> list[str]:
    """Owners that have as many jobs running as they may."""
    default = claim.limits.max_running_per_key
    found = []
    for owner, own_limit, num_running in connection.execute(_running_query(), claim.parameters):
        limit = default if own_limit is None else own_limit
        if limit is not None and num_running >= limit:
            found.append(owner)
    return found
