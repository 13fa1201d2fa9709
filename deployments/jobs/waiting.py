"""The load of the queue and how long jobs wait: positions, the time until a job is done, and ``Retry-After``.

Estimates assume that running jobs share their lane's speed evenly, and that the first queued job takes the place of one
that ends.
"""

from __future__ import annotations

import heapq
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import Connection, Select, bindparam, func, select

from cluster.errors import OverloadedError
from cluster.events import QueuePosition
from deployments.jobs.job import Job, JobState, Lane
from deployments.jobs.rows import put
from deployments.jobs.schema import JOBS, RATES, RUNNERS

MIN_WAIT_S, MAX_WAIT_S = 1.0, 3600.0
UNKNOWN_WAIT_S = 5.0
"""``Retry-After`` if nothing runs, or no speed has been measured yet."""

# Share of a new measurement in the average.
_NEWEST_SHARE = 0.3
# A runner that has been silent for longer does not count.
_ALIVE_S = 120.0
_QUEUED, _IN_PROGRESS = JobState.QUEUED.value, JobState.IN_PROGRESS.value
# Rejected callers that are remembered for each place in a queue.
_CALLERS_PER_PLACE = 4

WORK_LEFT = JOBS.c.work * (1 - JOBS.c.step * 1.0 / JOBS.c.num_steps)
"""SQL of :attr:`deployments.jobs.job.Job.work_left`, for a job that has not ended."""


@dataclass(frozen=True)
class ClassLoad:
    """The unfinished jobs of one class in a lane, and the work that is left of them."""

    lane: Lane
    service_class: str
    num_queued: int
    num_running: int
    work_queued: float
    work_running: float


def read_load(connection: Connection, model: str) -> tuple[ClassLoad, ...]:
    """Return the load of a model by lane and class."""
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
    return tuple(loads)


def queue_positions(connection: Connection, jobs: Sequence[Job], now_s: float) -> dict[str, QueuePosition]:
    """Return id -> position of those jobs that are queued, in one query."""
    queued = {job.job_id: job.work for job in jobs if job.state is JobState.QUEUED}
    parameters = {
        "models": sorted({job.model for job in jobs}),
        "job_ids": list(queued),
        "alive_since_s": now_s - _ALIVE_S,
    }
    found = {}
    for job_id, num_ahead, work_ahead, rate_of_one, num_alive in connection.execute(_query_positions(), parameters):
        speed = None if rate_of_one is None else rate_of_one * max(num_alive, 1)
        eta_s = (work_ahead + queued[job_id]) / speed if speed else None
        found[job_id] = QueuePosition(num_ahead, os.getpid(), eta_s)
    return found


@cache
def _query_positions() -> Select[Any]:
    is_queued = JOBS.c.state == _QUEUED
    # Running jobs come first, then the queue in the order in which it is claimed.
    order = (is_queued, JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
    lane: dict[str, Any] = {"partition_by": (JOBS.c.model, JOBS.c.lane), "order_by": order}
    ranked = (
        select(
            *(JOBS.c.job_id, JOBS.c.model, JOBS.c.lane, JOBS.c.state),
            (func.row_number().over(**lane) - 1).label("num_ahead"),
            func.coalesce(func.sum(WORK_LEFT).over(**lane, rows=(None, -1)), 0.0).label("work_ahead"),
        )
        .where(JOBS.c.model.in_(bindparam("models", expanding=True)))
        .where(JOBS.c.state.in_((_QUEUED, _IN_PROGRESS)))
        .subquery()
    )
    alive = (
        select(func.count())
        .select_from(RUNNERS)
        .where(RUNNERS.c.model == ranked.c.model, RUNNERS.c.alive_s >= bindparam("alive_since_s"))
        .correlate(ranked)
    )
    return (
        select(ranked.c.job_id, ranked.c.num_ahead, ranked.c.work_ahead, RATES.c.work_per_s, alive.scalar_subquery())
        .join(RATES, (RATES.c.model == ranked.c.model) & (RATES.c.lane == ranked.c.lane), isouter=True)
        .where(ranked.c.state == _QUEUED, ranked.c.job_id.in_(bindparam("job_ids", expanding=True)))
    )


@dataclass(frozen=True)
class QueueBound:
    """A bound of a lane's queue that was reached; it counts the jobs of one owner, or all (None)."""

    lane: Lane
    owner: str | None
    limit: int

    def make_error(self, retry_after_s: float) -> OverloadedError:
        """Return the error for the caller."""
        counted = f"{self.lane}s" if self.owner is None else f"{self.lane}s of this API key"
        return OverloadedError(f"{counted} that wait", self.limit, retry_after_s)


def estimate_retry_s(connection: Connection, model: str, bound: QueueBound, now_s: float, num_before: int = 0) -> float:
    """Estimate the seconds until a queued job begins, which makes room for another one.

    ``num_before`` callers were rejected earlier and have not come back: they get the places before.
    """
    in_lane = (JOBS.c.model == model, JOBS.c.lane == bound.lane.value)
    running = connection.execute(select(WORK_LEFT).where(*in_lane, JOBS.c.state == _IN_PROGRESS)).scalars().all()
    order = (JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
    queued = connection.execute(
        select(JOBS.c.owner, JOBS.c.work).where(*in_lane, JOBS.c.state == _QUEUED).order_by(*order)
    ).all()
    alive = (RUNNERS.c.model == model, RUNNERS.c.alive_s > now_s - _ALIVE_S)
    num_alive = connection.execute(select(func.count()).select_from(RUNNERS).where(*alive)).scalar_one()
    rate_of_one = find_rate(connection, model, bound.lane)
    num_ahead = next((i for i, (owner, _) in enumerate(queued) if bound.owner in (None, owner)), None)
    if num_ahead is None or not running or not rate_of_one:
        return UNKNOWN_WAIT_S
    speed = rate_of_one * max(num_alive, 1)
    works = [work for _, work in queued]
    further_s = num_before * sum(works) / len(works) / speed
    return min(max(estimate_freed_s(running, works, num_ahead + 1, speed) + further_s, MIN_WAIT_S), MAX_WAIT_S)


def estimate_freed_s(running: Sequence[float], queued: Sequence[float], num_places: int, work_per_s: float) -> float:
    """Return the seconds until places of a lane have become free ``num_places`` times; queued jobs take them again.

    Args:
        running: work left of each running job; at least one.
        queued: work of the queued jobs in their order; at least ``num_places`` - 1.
        num_places: number of ends to wait for.
        work_per_s: speed of the lane.
    """
    waiting = iter(queued)
    # All running jobs advance at the same pace: a job's end is the work per job at which it is done.
    ends, done, elapsed_s = list(running), 0.0, 0.0
    heapq.heapify(ends)
    for _ in range(num_places):
        elapsed_s += (ends[0] - done) * len(ends) / work_per_s
        done = ends[0]
        following = next(waiting, None)
        if following is None:
            heapq.heappop(ends)
        else:
            heapq.heapreplace(ends, done + following)
    return elapsed_s


def find_rate(connection: Connection, model: str, lane: Lane) -> float | None:
    """Return the work per second of one runner in a lane; None if it was never measured."""
    query = select(RATES.c.work_per_s).where(RATES.c.model == model, RATES.c.lane == lane.value)
    return connection.execute(query).scalar_one_or_none()


def note_rate(connection: Connection, model: str, lane: Lane, work_per_s: float, now_s: float) -> None:
    """Add a measurement to the average of all runners."""
    assert work_per_s > 0, "a finished job has some work"
    known = find_rate(connection, model, lane)
    if known is not None:
        work_per_s = _NEWEST_SHARE * work_per_s + (1 - _NEWEST_SHARE) * known
    put(connection, RATES, model=model, lane=lane.value, work_per_s=work_per_s, updated_s=now_s)


class RetryEstimator:
    """Spreads the retries of rejected callers, who would otherwise all come back at once for one place.

    Counts the callers of this process, from any thread. One who comes back early is counted again: hence a bound, by
    the number of places.
    """

    def __init__(self) -> None:
        self._until_s: dict[QueueBound, deque[float]] = {}
        self._lock = threading.Lock()

    def add(self, bound: QueueBound, seconds: float) -> None:
        """Count a rejected caller who may retry in ``seconds``."""
        with self._lock:
            until_s = self._until_s.setdefault(bound, deque())
            until_s.append(time.monotonic() + seconds)
            while len(until_s) > _CALLERS_PER_PLACE * bound.limit:
                until_s.popleft()

    def num_open(self, bound: QueueBound) -> int:
        """Return the number of callers whose time to retry has not come."""
        now_s = time.monotonic()
        with self._lock:
            still = {bound: [until_s for until_s in known if until_s > now_s] for bound, known in self._until_s.items()}
            self._until_s = {bound: deque(until_s) for bound, until_s in still.items() if until_s}
            return len(self._until_s.get(bound, ()))
