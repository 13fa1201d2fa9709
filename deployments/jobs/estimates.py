"""Estimates: the work of a request, the speed of runners, queue positions, waiting times and ``Retry-After``.

Work is counted in token-steps: steps x guidance branches x generated tokens. The cost of a token grows with their
number, because attention is quadratic: on Nano attention and the rest of a layer cost the same at 23,600 tokens,
between 480p and 720p. The prompt's tower and the decoders are not counted: the speed, measured from a request's start
to its file, includes them.

Waiting times assume that running jobs share their lane's speed evenly, and that the first queued job takes the place of
one that ends.
"""

from __future__ import annotations

import heapq
import math
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from sqlalchemy import ColumnElement, Connection, Select, bindparam, case, func, select

from cluster.errors import OverloadedError
from cluster.events import QueuePosition
from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.request import ResolvedRequest
from cosmos3_core.sampler.guidance import needs_two_branches
from cosmos3_core.shapes import Geometry
from deployments.jobs.job import Job, JobState, Lane
from deployments.jobs.rows import upsert
from deployments.jobs.schema import IN_PROGRESS, JOBS, QUEUE_ORDER, QUEUED, RATES, RUNNERS

MIN_RETRY_S, MAX_RETRY_S = 1.0, 3600.0
UNKNOWN_RETRY_S = 5.0
"""``Retry-After`` if nothing runs, or no speed has been measured yet."""

# Time constant with which measurements of one runner decay, their shortest time, and the bound on its busy spans.
_DECAY_S, _SHORTEST_S, _MAX_SPANS = 600.0, 1e-3, 1000
# Share of a new measurement in the average of all runners.
_NEWEST_SHARE = 0.3
# A runner that has been silent for longer does not count.
_ALIVE_S = 120.0
# Rejected callers that are remembered for each place in a queue.
_CALLERS_PER_PLACE = 4

WORK_LEFT = JOBS.c.work * (1 - JOBS.c.step * 1.0 / JOBS.c.num_steps)
"""Work left of a job that has not ended, in SQL."""


@dataclass(frozen=True)
class CostModel:
    """Computes the work of a checkpoint's requests.

    At ``attention_parity_tokens`` attention takes as long as everything else in a layer.
    """

    geometry: Geometry
    attention_parity_tokens: float

    @classmethod
    def of(cls, geometry: Geometry, config: TransformerConfig) -> CostModel:
        """Derive the cost model from the sizes of a checkpoint's generation tower (``cosmos3_core.model.towers``)."""
        query, key = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        num_matrices = 2 if config.hidden_act == "relu2" else 3
        # Multiplications per token: in the layer's matrices, and in scores and values for each attended token.
        matrices = config.hidden_size * (2 * query + 2 * key + num_matrices * config.intermediate_size)
        return cls(geometry, matrices / (2 * query))

    def compute_work(self, request: ResolvedRequest) -> float:
        """Compute the work of a whole request, in token-steps."""
        num_tokens = self.geometry.num_tokens(request.num_frames, request.height, request.width)
        num_tokens += request.num_sound_latents
        num_tokens += 0 if request.action is None else request.action.chunk_size
        num_branches = 2 if needs_two_branches(request.guidance_scale) else 1
        return request.num_inference_steps * num_branches * num_tokens * (1 + num_tokens / self.attention_parity_tokens)


class Throughput:
    """Measures the speed of one runner in a lane over the last minutes.

    Jobs overlap, so the speed is the sum of their work over the union of their times; idle time does not count.
    """

    def __init__(self) -> None:
        # Busy spans without overlaps, as (begin, end).
        self._busy: list[tuple[float, float]] = []
        self._work = self._busy_s = 0.0

    def add(self, work: float, start_s: float, end_s: float) -> float:
        """Add a finished request, with times of any one clock; return the work per second."""
        # Count only time that no earlier request was running: a short request may end inside a long one.
        joined = [span for span in self._busy if span[0] <= end_s and start_s <= span[1]]
        counted_s = sum(min(end, end_s) - max(begin, start_s) for begin, end in joined)
        busy_s = max(end_s - start_s - counted_s, 0.0)
        span = (min([start_s, *(begin for begin, _ in joined)]), max([end_s, *(end for _, end in joined)]))
        apart = [other for other in self._busy if other not in joined]
        self._busy = sorted([*apart, span])[-_MAX_SPANS:]
        share = math.exp(-busy_s / _DECAY_S)
        self._work = share * self._work + work
        self._busy_s = share * self._busy_s + busy_s
        return self._work / max(self._busy_s, _SHORTEST_S)


@dataclass(frozen=True)
class ClassLoad:
    """The numbers of unfinished jobs of one class in a lane."""

    lane: Lane
    service_class: str
    num_queued: int
    num_running: int


def read_load(connection: Connection, model: str) -> tuple[ClassLoad, ...]:
    """Return the load of a model by lane and class."""
    query = (
        select(JOBS.c.lane, JOBS.c.service_class, JOBS.c.state, func.count())
        .where(JOBS.c.model == model, JOBS.c.state.in_((QUEUED, IN_PROGRESS)))
        .group_by(JOBS.c.lane, JOBS.c.service_class, JOBS.c.state)
    )
    found = {(lane, name, state): num_jobs for lane, name, state, num_jobs in connection.execute(query)}
    return tuple(
        ClassLoad(Lane(lane), name, found.get((lane, name, QUEUED), 0), found.get((lane, name, IN_PROGRESS), 0))
        for lane, name in sorted({(lane, name) for lane, name, _ in found})
    )


def find_positions(connection: Connection, jobs: Sequence[Job], now_s: float) -> dict[str, QueuePosition]:
    """Return id -> position of those jobs that are queued, in one query."""
    queued = {job.job_id: job.work for job in jobs if job.state is JobState.QUEUED}
    parameters = {
        "models": sorted({job.model for job in jobs}),
        "job_ids": list(queued),
        "alive_since_s": now_s - _ALIVE_S,
    }
    found = {}
    for job_id, num_ahead, work_ahead, work_per_s in connection.execute(_query_positions(), parameters):
        eta_s = (work_ahead + queued[job_id]) / work_per_s if work_per_s else None
        found[job_id] = QueuePosition(num_ahead, os.getpid(), eta_s)
    return found


@cache
def _query_positions() -> Select[Any]:
    # Running jobs come first.
    order = (JOBS.c.state == QUEUED, *QUEUE_ORDER)
    lane: dict[str, Any] = {"partition_by": (JOBS.c.model, JOBS.c.lane), "order_by": order}
    ranked = (
        select(
            *(JOBS.c.job_id, JOBS.c.model, JOBS.c.lane, JOBS.c.state),
            (func.row_number().over(**lane) - 1).label("num_ahead"),
            func.coalesce(func.sum(WORK_LEFT).over(**lane, rows=(None, -1)), 0.0).label("work_ahead"),
        )
        .where(JOBS.c.model.in_(bindparam("models", expanding=True)))
        .where(JOBS.c.state.in_((QUEUED, IN_PROGRESS)))
        .subquery()
    )
    work_per_s = _query_speed(ranked.c.model, ranked.c.lane).correlate(ranked).scalar_subquery()
    return select(ranked.c.job_id, ranked.c.num_ahead, ranked.c.work_ahead, work_per_s).where(
        ranked.c.state == QUEUED, ranked.c.job_id.in_(bindparam("job_ids", expanding=True))
    )


def _query_speed(model: ColumnElement[str], lane: ColumnElement[str]) -> Select[float]:
    """Select the work per second of all runners that are alive, one at least; no row before the first measurement."""
    is_alive = (RUNNERS.c.model == RATES.c.model, RUNNERS.c.alive_s >= bindparam("alive_since_s"))
    num_alive = select(func.count()).select_from(RUNNERS).where(*is_alive).scalar_subquery()
    work_per_s = RATES.c.work_per_s * case((num_alive > 1, num_alive), else_=1)
    return select(work_per_s).where(RATES.c.model == model, RATES.c.lane == lane)


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
    lane = {"model": model, "lane": bound.lane.value, "alive_since_s": now_s - _ALIVE_S}
    work_per_s = connection.execute(_query_speed(bindparam("model"), bindparam("lane")), lane).scalar_one_or_none()
    query = (
        select(JOBS.c.owner, JOBS.c.state, WORK_LEFT)
        .where(JOBS.c.model == model, JOBS.c.lane == bound.lane.value, JOBS.c.state.in_((QUEUED, IN_PROGRESS)))
        .order_by(*QUEUE_ORDER)
    )
    unfinished = connection.execute(query).all()
    running = [work for _, state, work in unfinished if state == IN_PROGRESS]
    queued = [(owner, work) for owner, state, work in unfinished if state == QUEUED]
    num_ahead = next((i for i, (owner, _) in enumerate(queued) if bound.owner in (None, owner)), None)
    if num_ahead is None or not running or not work_per_s:
        return UNKNOWN_RETRY_S
    works = [work for _, work in queued]
    further_s = num_before * sum(works) / len(works) / work_per_s
    return min(max(estimate_freed_s(running, works, num_ahead + 1, work_per_s) + further_s, MIN_RETRY_S), MAX_RETRY_S)


def estimate_freed_s(running: Sequence[float], queued: Sequence[float], num_places: int, work_per_s: float) -> float:
    """Return the seconds until places of a lane have become free ``num_places`` times; queued jobs take them again.

    ``running`` and ``queued`` hold the work left of each job: of one that runs at least, and of all that take a place.
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


def note_rate(connection: Connection, model: str, lane: Lane, work_per_s: float, now_s: float) -> None:
    """Add a runner's measurement to the average of all runners."""
    assert work_per_s > 0, "a finished job has some work"
    query = select(RATES.c.work_per_s).where(RATES.c.model == model, RATES.c.lane == lane.value)
    if (known := connection.execute(query).scalar_one_or_none()) is not None:
        work_per_s = _NEWEST_SHARE * work_per_s + (1 - _NEWEST_SHARE) * known
    upsert(connection, RATES, model=model, lane=lane.value, work_per_s=work_per_s, updated_s=now_s)


class RetryEstimator:
    """Spreads the retries of rejected callers, who would otherwise all come back at once for one place.

    Counts the callers of this process, from any thread. One who comes back early is counted again: hence a bound, by
    the number of places.
    """

    def __init__(self) -> None:
        self._until_s: dict[QueueBound, deque[float]] = {}
        self._lock = threading.Lock()

    def add_rejected(self, bound: QueueBound, seconds: float) -> None:
        """Count a rejected caller who may retry in ``seconds``."""
        with self._lock:
            until_s = self._until_s.setdefault(bound, deque())
            until_s.append(time.monotonic() + seconds)
            while len(until_s) > _CALLERS_PER_PLACE * bound.limit:
                until_s.popleft()

    def num_expected(self, bound: QueueBound) -> int:
        """Return the number of callers whose time to retry has not come."""
        now_s = time.monotonic()
        with self._lock:
            still = {bound: [until_s for until_s in known if until_s > now_s] for bound, known in self._until_s.items()}
            self._until_s = {bound: deque(until_s) for bound, until_s in still.items() if until_s}
            return len(self._until_s.get(bound, ()))
