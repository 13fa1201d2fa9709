"""How long jobs wait: positions in the queue, the time until a job is done, and ``Retry-After`` of a full queue.

The jobs of a lane that run share its speed evenly, and the first queued job takes the place of one that ends.
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

from cluster.events import QueuePosition
from deployments.jobs.job import Job, JobState, Lane
from deployments.jobs.rows import put
from deployments.jobs.schema import JOBS, RATES, RUNNERS

MIN_WAIT_S, MAX_WAIT_S = 1.0, 3600.0
UNKNOWN_WAIT_S = 5.0
"""``Retry-After`` where nothing runs, or no speed has been measured yet."""

# Share of a new measurement in the average.
_NEWEST_SHARE = 0.3
# A runner that has been silent for longer does not count.
_ALIVE_S = 120.0
# Callers who are told to come one after the other, for each place in a queue.
_CALLERS_PER_PLACE = 4

WORK_LEFT = JOBS.c.work * (1 - JOBS.c.step * 1.0 / JOBS.c.num_steps)
"""SQL of :attr:`deployments.jobs.job.Job.work_left`, for a job that has not ended."""


def queue_positions(connection: Connection, jobs: Sequence[Job], now_s: float) -> dict[str, QueuePosition]:
    """Return id -> position of those jobs that wait, with one query for all of them.

    Args:
        connection: in a transaction.
        jobs: any; those that do not wait have no position.
        now_s: seconds since 1970.
    """
    queued = {job.job_id: job.work for job in jobs if job.state is JobState.QUEUED}
    parameters = {
        "models": sorted({job.model for job in jobs}),
        "job_ids": list(queued),
        "alive_since_s": now_s - _ALIVE_S,
    }
    found = {}
    for job_id, num_ahead, work_ahead, rate_of_one, num_alive in connection.execute(_positions_query(), parameters):
        speed = None if rate_of_one is None else rate_of_one * max(num_alive, 1)
        eta_s = (work_ahead + queued[job_id]) / speed if speed else None
        found[job_id] = QueuePosition(num_ahead, os.getpid(), eta_s)
    return found


@cache
def _positions_query() -> Select[Any]:
    is_queued = JOBS.c.state == JobState.QUEUED.value
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
        .where(JOBS.c.state.in_((JobState.QUEUED.value, JobState.IN_PROGRESS.value)))
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
        .where(ranked.c.state == JobState.QUEUED.value, ranked.c.job_id.in_(bindparam("job_ids", expanding=True)))
    )


def estimate_freed_s(running: Sequence[float], queued: Sequence[float], num_places: int, work_per_s: float) -> float:
    """Return the seconds until so many places of a lane have become free.

    Args:
        running: work that is left of each job that runs; one at least.
        queued: work of those that wait, in their order; ``num_places`` - 1 at least.
        num_places: which have to become free, those that are taken again included.
        work_per_s: that the lane gets done.
    """
    waiting = iter(queued)
    # Every running job gets the same work done in the same time: ends are reckoned in that work.
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


@dataclass(frozen=True)
class _LaneLoad:
    """The load of one lane.

    Attributes:
        running: work that is left of each job that runs.
        queued: owner and work of each job that waits, in order.
        work_per_s: of all runners together; None where it was never measured.
    """

    running: tuple[float, ...]
    queued: tuple[tuple[str, float], ...]
    work_per_s: float | None

    def wait_s(self, owner: str | None, num_before: int) -> float | None:
        """Return the seconds until the first queued job (of an owner) begins, and until ``num_before`` more have begun.

        None where that cannot be estimated.
        """
        before = next((i for i, (whose, _) in enumerate(self.queued) if owner in (None, whose)), None)
        if before is None or not self.running or not self.work_per_s:
            return None
        works = [work for _, work in self.queued]
        further_s = num_before * sum(works) / len(works) / self.work_per_s
        return estimate_freed_s(self.running, works, before + 1, self.work_per_s) + further_s


def estimate_retry_s(
    connection: Connection, model: str, lane: Lane, owner: str | None, now_s: float, num_before: int = 0
) -> float:
    """Estimate the seconds until a queued job begins, so that another one has room.

    Args:
        connection: in a transaction.
        model, lane: whose queue is full.
        owner: whose own bound was reached; None where it is everybody's.
        now_s: seconds since 1970.
        num_before: callers who were refused earlier and have not come again yet: they get the places before.
    """
    wait_s = _read_load(connection, model, lane, now_s).wait_s(owner, num_before)
    return min(max(UNKNOWN_WAIT_S if wait_s is None else wait_s, MIN_WAIT_S), MAX_WAIT_S)


def _read_load(connection: Connection, model: str, lane: Lane, now_s: float) -> _LaneLoad:
    of_lane = (JOBS.c.model == model, JOBS.c.lane == lane.value)
    running = connection.execute(select(WORK_LEFT).where(*of_lane, JOBS.c.state == "in_progress")).scalars()
    queued = connection.execute(
        select(JOBS.c.owner, JOBS.c.work)
        .where(*of_lane, JOBS.c.state == "queued")
        .order_by(JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
    )
    alive = (
        select(func.count()).select_from(RUNNERS).where(RUNNERS.c.model == model, RUNNERS.c.alive_s > now_s - _ALIVE_S)
    )
    rate_of_one = find_rate(connection, model, lane)
    num_alive = max(connection.execute(alive).scalar_one(), 1)
    return _LaneLoad(
        running=tuple(running),
        queued=tuple((owner, work) for owner, work in queued),
        work_per_s=None if rate_of_one is None else rate_of_one * num_alive,
    )


def find_rate(connection: Connection, model: str, lane: Lane) -> float | None:
    """Return the work per second that one runner gets done in a lane; None where it was never measured."""
    query = select(RATES.c.work_per_s).where(RATES.c.model == model, RATES.c.lane == lane.value)
    return connection.execute(query).scalar_one_or_none()


def note_rate(connection: Connection, model: str, lane: Lane, work_per_s: float, now_s: float) -> None:
    """Enter a measurement into the average of all runners."""
    assert work_per_s > 0, "something was measured"
    known = find_rate(connection, model, lane)
    if known is not None:
        work_per_s = _NEWEST_SHARE * work_per_s + (1 - _NEWEST_SHARE) * known
    put(connection, RATES, model=model, lane=lane.value, work_per_s=work_per_s, updated_s=now_s)


@dataclass(frozen=True)
class QueueBound:
    """A bound of a queue that was reached.

    Attributes:
        lane: whose queue it is.
        owner: whose jobs it counts; None where it counts everybody's.
        limit: the bound.
    """

    lane: Lane
    owner: str | None
    limit: int


class RetryEstimator:
    """Remembers when refused callers were told to come again, so that each is told another time.

    All of them would otherwise come at once for one place. Counts the callers of this process, from any thread. A
    caller who comes too early is counted again each time: hence a bound, by the places that there are.
    """

    def __init__(self) -> None:
        self._until_s: dict[QueueBound, deque[float]] = {}
        self._lock = threading.Lock()

    def add(self, bound: QueueBound, seconds: float) -> None:
        """Note that a caller was told to come again after so long."""
        with self._lock:
            until_s = self._until_s.setdefault(bound, deque())
            until_s.append(time.monotonic() + seconds)
            while len(until_s) > _CALLERS_PER_PLACE * bound.limit:
                until_s.popleft()

    def num_open(self, bound: QueueBound) -> int:
        """Return how many callers are still to come."""
        now_s = time.monotonic()
        with self._lock:
            still = {bound: [until_s for until_s in known if until_s > now_s] for bound, known in self._until_s.items()}
            self._until_s = {bound: deque(until_s) for bound, until_s in still.items() if until_s}
            return len(self._until_s.get(bound, ()))
