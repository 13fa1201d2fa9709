"""The queue: its bounds, and the place of a new job in its order.

The order is weighted fair queueing by a self-clocked virtual time (Golestani 1994). Jobs of one owner and class in a
lane are a flow. A new job's place is its work over its class's share behind the last queued job of its flow, or behind
the lane's virtual time if that is later; the virtual time is the place of the job that began last. So each class gets
its share of the work, and owners of a class get equal ones. An owner who sends many jobs waits behind its own jobs, and
one who sent none for a while has saved nothing. A cancelled job costs nothing where none of its flow waits behind it;
jobs that do keep their places.

Every change happens in a transaction that decides alone (``is_queue``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, bindparam, delete, func, select

from cluster.errors import OverloadedError
from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from deployments.config import JobsConfig
from deployments.errors import IdempotencyConflict
from deployments.jobs.job import Job, JobState, Lane, NewJob
from deployments.jobs.keys import KeyLimits
from deployments.jobs.rows import add, job_of, put
from deployments.jobs.schema import JOBS, LANES, RUNNERS
from deployments.jobs.waiting import WORK_LEFT

_QUEUED, _IN_PROGRESS = JobState.QUEUED.value, JobState.IN_PROGRESS.value


@dataclass(frozen=True)
class QueueLimits:
    """The queue's bounds; they count the jobs of one model.

    Attributes:
        max_queued: queued jobs.
        max_queued_per_key: queued jobs of one API key without a bound of its own; without keys there is no such bound.
        max_running_per_key: the same for running jobs, in each lane; None = any number.
        classes: class -> its share of the work while others wait as well.
    """

    max_queued: int
    max_queued_per_key: int
    max_running_per_key: int | None
    classes: Mapping[str, float]

    @classmethod
    def of(cls, config: JobsConfig) -> QueueLimits:
        """Return the bounds in a configuration."""
        return cls(config.max_queued, config.max_queued_per_key, config.max_running_per_key, config.classes)


@dataclass(frozen=True)
class ClassLoad:
    """Jobs of one class in a lane that have not ended.

    Attributes:
        lane, service_class: which.
        num_queued, num_running: how many.
        work_queued, work_running: that is left of them.
    """

    lane: Lane
    service_class: str
    num_queued: int
    num_running: int
    work_queued: float
    work_running: float


@dataclass(frozen=True)
class QueueLoad:
    """All jobs of a model that have not ended.

    Attributes:
        classes: those that have some.
    """

    classes: tuple[ClassLoad, ...]

    @property
    def num_queued(self) -> int:
        """Number of queued jobs, of all classes in both lanes."""
        return sum(load.num_queued for load in self.classes)

    @property
    def num_running(self) -> int:
        """Number of running jobs, of all classes in both lanes."""
        return sum(load.num_running for load in self.classes)


# Accepting


class QueueFull(Exception):
    """A bound was reached; the store adds when to come again.

    Attributes:
        what: which bound.
        limit: the bound.
        owner: whose bound it is; None where it counts all jobs.
    """

    def __init__(self, what: str, limit: int, owner: str | None) -> None:
        super().__init__(what, limit, owner)
        self.what, self.limit, self.owner = what, limit, owner

    def error(self, retry_after_s: float) -> OverloadedError:
        """Return the error for the caller."""
        return OverloadedError(self.what, self.limit, retry_after_s)


def find_earlier(connection: Connection, new: NewJob) -> Job | None:
    """Return the job that came with the same idempotency key before.

    Raises:
        IdempotencyConflict: that was another request.
    """
    if new.idempotency_key is None:
        return None
    query = select(JOBS).where(JOBS.c.owner == new.owner, JOBS.c.idempotency_key == new.idempotency_key)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    if row.fingerprint != new.fingerprint:
        raise IdempotencyConflict(new.idempotency_key)
    return job_of(row)


@cache
def _count_query(is_own: bool) -> Select[Any]:
    of_lane = (JOBS.c.model == bindparam("model"), JOBS.c.lane == bindparam("lane"))
    queued = select(func.count()).select_from(JOBS).where(*of_lane, JOBS.c.state == _QUEUED)
    return queued.where(JOBS.c.owner == bindparam("owner")) if is_own else queued


def check_room(connection: Connection, new: NewJob, limits: QueueLimits, key_limits: KeyLimits | None) -> None:
    """Check that one more job may wait.

    Raises:
        QueueFull: a bound is reached.
    """
    parameters = {"model": new.model, "lane": new.lane.value, "owner": new.owner}
    if connection.execute(_count_query(False), parameters).scalar_one() >= limits.max_queued:
        raise QueueFull(f"{new.lane}s that wait", limits.max_queued, None)
    own_limit = None if key_limits is None else key_limits.max_queued
    if own_limit is None and new.owner:
        own_limit = limits.max_queued_per_key
    if own_limit is not None and connection.execute(_count_query(True), parameters).scalar_one() >= own_limit:
        raise QueueFull(f"{new.lane}s of this API key that wait", own_limit, new.owner)


def enqueue(connection: Connection, new: NewJob, limits: QueueLimits, now_s: float) -> Job:
    """Insert a job that there is room for, in its place."""
    if new.attached_to is not None:
        note_runner(connection, new.attached_to, new.model, now_s)
    # A job of the flow that is no longer queued has no place behind the virtual time.
    flow = {"model": new.model, "lane": new.lane.value, "service_class": new.service_class, "owner": new.owner}
    last = connection.execute(_last_query(), flow).scalar_one() or 0.0
    begin = max(read_virtual_time(connection, new.model, new.lane), last)
    return add(connection, new, begin + new.work / limits.classes[new.service_class], now_s)


@cache
def _last_query() -> Select[Any]:
    """Build the query for the last place of a flow; null where none of it waits."""
    names = ("model", "lane", "service_class", "owner")
    flow = (JOBS.c[name] == bindparam(name) for name in names)
    return select(func.max(JOBS.c.queue_order)).where(JOBS.c.state == _QUEUED, *flow)


def check_storable(new: NewJob, limits: QueueLimits) -> None:
    """Check that the databases can hold a job's texts, and that its class has a share.

    Raises:
        RequestError: a text cannot be stored, or there is no such class.
    """
    checks.choice("service_class", new.service_class, tuple(limits.classes))
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


def note_runner(connection: Connection, runner: str, model: str, now_s: float) -> None:
    """Note that a runner is alive."""
    put(connection, RUNNERS, runner=runner, model=model, alive_s=now_s)


def read_virtual_time(connection: Connection, model: str, lane: Lane) -> float:
    """Return the place of the job of a lane that began last."""
    query = select(LANES.c.virtual_time).where(LANES.c.model == model, LANES.c.lane == lane.value)
    return connection.execute(query).scalar_one_or_none() or 0.0


# Looking


def read_load(connection: Connection, model: str) -> QueueLoad:
    """Return how much of a model is queued and running."""
    query = (
        select(JOBS.c.lane, JOBS.c.service_class, JOBS.c.state, func.count(), func.sum(WORK_LEFT))
        .where(JOBS.c.model == model, JOBS.c.state.in_((_QUEUED, _IN_PROGRESS)))
        .group_by(JOBS.c.lane, JOBS.c.service_class, JOBS.c.state)
    )
    found = {(lane, name, state): (num_jobs, work) for lane, name, state, num_jobs, work in connection.execute(query)}
    loads = []
    for lane, name in sorted({(lane, name) for lane, name, _ in found}):
        num_queued, work_queued = found.get((lane, name, _QUEUED), (0, 0.0))
        num_running, work_running = found.get((lane, name, _IN_PROGRESS), (0, 0.0))
        loads.append(ClassLoad(Lane(lane), name, num_queued, num_running, work_queued, work_running))
    return QueueLoad(tuple(loads))


# Forgetting


def forget_runners(connection: Connection, before_s: float) -> None:
    """Delete runners that have been silent since."""
    connection.execute(delete(RUNNERS).where(RUNNERS.c.alive_s < before_s))
