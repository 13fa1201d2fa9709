"""How long a full queue stays full: what ``Retry-After`` says.

The jobs of a lane that run share its speed evenly; the place of one that ends is taken by the first that waits. So it
can be told when how many places will have become free.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from sqlalchemy import Connection, func, select

from deployments.jobs.job import Lane
from deployments.jobs.rows import put
from deployments.jobs.schema import JOBS, RATES, RUNNERS

MIN_WAIT_S, MAX_WAIT_S = 1.0, 3600.0
UNKNOWN_WAIT_S = 5.0
"""Where nothing runs, or nothing has been measured yet."""

# Of a new measurement in the average.
_NEWEST_SHARE = 0.3
# Runners that were silent for longer do not count.
_ALIVE_S = 120.0

WORK_LEFT = JOBS.c.work * (1 - JOBS.c.step * 1.0 / JOBS.c.num_steps)
"""As :attr:`deployments.jobs.job.Job.work_left` of a job that has not ended."""


def until_freed_s(running: Sequence[float], queued: Sequence[float], num_places: int, work_per_s: float) -> float:
    """Seconds until so many places of a lane have become free.

    Args:
        running: work that is left of each job that runs; one at least.
        queued: work of those that wait, in their order; ``num_places`` - 1 at least.
        num_places: which have to become free, those that are taken again included.
        work_per_s: that the lane gets done.
    """
    waiting = iter(queued)
    # Every job that runs has had the same work done since it began: ends are reckoned in that.
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
class _Lane:
    """What is known of a lane.

    Attributes:
        running: work that is left of each job that runs.
        queued: owner and work of each job that waits, in order.
        work_per_s: of all runners together; None where it was never measured.
    """

    running: tuple[float, ...]
    queued: tuple[tuple[str, float], ...]
    work_per_s: float | None

    def wait_s(self, owner: str | None, num_promised: int) -> float | None:
        """Until the first job that waits is begun, or the first of an owner, and then as many more as were promised a
        place; None where that cannot be told.
        """
        before = next((i for i, (whose, _) in enumerate(self.queued) if owner in (None, whose)), None)
        if before is None or not self.running or not self.work_per_s:
            return None
        works = [work for _, work in self.queued]
        further_s = num_promised * sum(works) / len(works) / self.work_per_s
        return until_freed_s(self.running, works, before + 1, self.work_per_s) + further_s


def retry_after_s(
    connection: Connection, model: str, lane: Lane, owner: str | None, now_s: float, num_promised: int = 0
) -> float:
    """Seconds until a job that waits is likely to be begun, so that another one may.

    Args:
        connection: in a transaction.
        model, lane: whose queue is full.
        owner: whose own bound was reached; None where it is everybody's.
        now_s: seconds since 1970.
        num_promised: callers who were told to come again and have not done so yet: they have the places before.
    """
    wait_s = _lane(connection, model, lane, now_s).wait_s(owner, num_promised)
    return min(max(UNKNOWN_WAIT_S if wait_s is None else wait_s, MIN_WAIT_S), MAX_WAIT_S)


def _lane(connection: Connection, model: str, lane: Lane, now_s: float) -> _Lane:
    of_lane = (JOBS.c.model == model, JOBS.c.lane == lane.value)
    running = connection.execute(select(WORK_LEFT).where(*of_lane, JOBS.c.state == "in_progress")).scalars()
    queued = connection.execute(
        select(JOBS.c.owner, JOBS.c.work)
        .where(*of_lane, JOBS.c.state == "queued")
        .order_by(JOBS.c.queue_order, JOBS.c.created_s, JOBS.c.job_id)
    )
    alive = (
        select(func.count()).select_from(RUNNERS).where(RUNNERS.c.model == model, RUNNERS.c.seen_s > now_s - _ALIVE_S)
    )
    of_one = rate(connection, model, lane)
    num_alive = max(connection.execute(alive).scalar_one(), 1)
    return _Lane(
        running=tuple(running),
        queued=tuple((owner, work) for owner, work in queued),
        work_per_s=None if of_one is None else of_one * num_alive,
    )


def rate(connection: Connection, model: str, lane: Lane) -> float | None:
    """Work per second that one runner gets done in a lane; None where it was never measured."""
    query = select(RATES.c.work_per_s).where(RATES.c.model == model, RATES.c.lane == lane.value)
    return connection.execute(query).scalar_one_or_none()


def note_rate(connection: Connection, model: str, lane: Lane, work_per_s: float, now_s: float) -> None:
    """Enter a measurement into the average of all runners."""
    assert work_per_s > 0, "something was measured"
    known = rate(connection, model, lane)
    if known is not None:
        work_per_s = _NEWEST_SHARE * work_per_s + (1 - _NEWEST_SHARE) * known
    put(connection, RATES, model=model, lane=lane.value, work_per_s=work_per_s, updated_s=now_s)
