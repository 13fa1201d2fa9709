"""Estimates: the work of a request, the speed of runners, queue positions, waiting times and ``Retry-After``.

Work is counted in token-steps: steps x guidance branches x generated tokens. The cost of a token grows with their
number, because attention is quadratic: on Nano attention and the rest of a layer cost the same at 23,600 tokens,
between 480p and 720p. Decoding and encoding are counted in pixels of the file. Both speeds are measured, the first from
a request's start to its latents. As jobs are decoded while others are denoised, the slower of both sets the pace.

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
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, bindparam, case, func, select

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

# Last requests from which the speed of one runner is measured: more than run at once, and few, as the first one after a
# start is slow.
_MAX_RUNS = 32
# The time that is measured has at least this length, and this share of the time of all those requests.
_SHORTEST_S, _LEAST_SHARE = 1e-3, 0.1
# Share of a new measurement in the average of all runners.
_NEWEST_SHARE = 0.3
# A runner that has been silent for longer does not count.
_ALIVE_S = 120.0
# Rejected callers that are remembered for each place in a queue.
_CALLERS_PER_PLACE = 4
# Seconds that a rejected caller may come back before its time, and for which its place is kept after it.
_EARLY_S, _KEPT_S = 0.5, 5.0

PIXELS = case((JOBS.c.media_type == "", 0.0), else_=1.0 * JOBS.c.num_frames * JOBS.c.width * JOBS.c.height)
"""Pixels of a job's file, in SQL."""

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


@dataclass(frozen=True)
class Speed:
    """The speed of a lane.

    Attributes:
        work_per_s: of denoising, in token-steps.
        pixels_per_s: of decoding and encoding; None: not measured, counted as no time.
    """

    work_per_s: float
    pixels_per_s: float | None = None

    def seconds(self, work: float, pixels: float) -> float:
        """Return the seconds for some work and pixels, done side by side."""
        return max(work / self.work_per_s, pixels / self.pixels_per_s if self.pixels_per_s else 0.0)


class _Run(NamedTuple):
    """One request's begin and end in one kind of work, and how much it was."""

    start_s: float
    end_s: float
    work: float


class Throughput:
    """Measures the speed of one runner in a lane, in one kind of work, over its last requests.

    Requests overlap, so the speed is the sum of their work over the union of their times; idle time does not count.
    """

    def __init__(self) -> None:
        self._runs: deque[_Run] = deque(maxlen=_MAX_RUNS)

    def add(self, work: float, start_s: float, end_s: float) -> float:
        """Add a finished request, with times of any one clock; return the work per second."""
        # Runs are counted when they end. Some of the first one's time may have been spent before the measured time, and
        # some of a run that has not ended yet within it: in the long run the two are equal.
        since_s = self._runs[0].end_s if len(self._runs) == _MAX_RUNS else -math.inf
        self._runs.append(_Run(start_s, end_s, work))
        busy_s, all_s = (self._compute_busy_s(begin_s) for begin_s in (since_s, -math.inf))
        if busy_s < _LEAST_SHARE * all_s:  # they all ended together
            busy_s = all_s
        return sum(run.work for run in self._runs) / max(busy_s, _SHORTEST_S)

    def _compute_busy_s(self, since_s: float) -> float:
        """Compute the length of the union of the requests' times after a moment."""
        busy_s = 0.0
        for run in sorted(self._runs):
            busy_s += max(run.end_s - max(run.start_s, since_s), 0.0)
            since_s = max(since_s, run.end_s)
        return busy_s


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
    """Return id -> position of those jobs that are queued, in two queries."""
    queued = [job.job_id for job in jobs if job.state is JobState.QUEUED]
    models = sorted({job.model for job in jobs})
    speeds = _find_speeds(connection, models, now_s)
    found = {}
    for row in connection.execute(_query_positions(), {"models": models, "job_ids": queued}):
        speed = speeds.get((row.model, row.lane))
        eta_s = None if speed is None else speed.seconds(row.work, row.pixels)
        found[row.job_id] = QueuePosition(row.num_ahead, os.getpid(), eta_s)
    return found


@cache
def _query_positions() -> Select[Any]:
    """Select queued jobs, how many are ahead of each, and the work and pixels until its end."""
    # Running jobs come first.
    order = (JOBS.c.state == QUEUED, *QUEUE_ORDER)
    lane: dict[str, Any] = {"partition_by": (JOBS.c.model, JOBS.c.lane), "order_by": order}
    ranked = (
        select(
            *(JOBS.c.job_id, JOBS.c.model, JOBS.c.lane, JOBS.c.state),
            (func.row_number().over(**lane) - 1).label("num_ahead"),
            func.sum(WORK_LEFT).over(**lane, rows=(None, 0)).label("work"),
            func.sum(PIXELS).over(**lane, rows=(None, 0)).label("pixels"),
        )
        .where(JOBS.c.model.in_(bindparam("models", expanding=True)))
        .where(JOBS.c.state.in_((QUEUED, IN_PROGRESS)))
        .subquery()
    )
    return select(ranked).where(ranked.c.state == QUEUED, ranked.c.job_id.in_(bindparam("job_ids", expanding=True)))


def _find_speeds(connection: Connection, models: Sequence[str], now_s: float) -> dict[tuple[str, str], Speed]:
    """Return (model, lane) -> speed of all runners that are alive, one at least, where it was measured."""
    parameters = {"models": list(models), "alive_since_s": now_s - _ALIVE_S}
    rows = connection.execute(_query_speeds(), parameters)
    return {
        (model, lane): Speed(work_per_s * (num or 1), pixels_per_s and pixels_per_s * (num or 1))
        for model, lane, work_per_s, pixels_per_s, num in rows
    }


@cache
def _query_speeds() -> Select[Any]:
    is_alive = (RUNNERS.c.model == RATES.c.model, RUNNERS.c.alive_s >= bindparam("alive_since_s"))
    num_alive = select(func.count()).select_from(RUNNERS).where(*is_alive).correlate(RATES).scalar_subquery()
    columns = (RATES.c.model, RATES.c.lane, RATES.c.work_per_s, RATES.c.pixels_per_s, num_alive)
    return select(*columns).where(RATES.c.model.in_(bindparam("models", expanding=True)))


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
    speed = _find_speeds(connection, [model], now_s).get((model, bound.lane.value))
    query = (
        select(JOBS.c.owner, JOBS.c.state, WORK_LEFT, PIXELS)
        .where(JOBS.c.model == model, JOBS.c.lane == bound.lane.value, JOBS.c.state.in_((QUEUED, IN_PROGRESS)))
        .order_by(*QUEUE_ORDER)
    )
    unfinished = connection.execute(query).all()
    owners = [owner for owner, state, *_ in unfinished if state == QUEUED]
    num_ahead = next((i for i, owner in enumerate(owners) if bound.owner in (None, owner)), None)
    if num_ahead is None or len(owners) == len(unfinished) or speed is None:
        return UNKNOWN_RETRY_S
    running = [speed.seconds(work, pixels) for _, state, work, pixels in unfinished if state == IN_PROGRESS]
    queued = [speed.seconds(work, pixels) for _, state, work, pixels in unfinished if state == QUEUED]
    further_s = num_before * sum(queued) / len(queued)
    return min(max(estimate_freed_s(running, queued, num_ahead + 1) + further_s, MIN_RETRY_S), MAX_RETRY_S)


def estimate_freed_s(running: Sequence[float], queued: Sequence[float], num_places: int) -> float:
    """Return the seconds until places of a lane have become free ``num_places`` times; queued jobs take them again.

    ``running`` and ``queued`` hold the seconds that each job has left if it runs alone. ``running`` must not be empty.
    """
    waiting = iter(queued)
    # All running jobs advance at the same pace: a job's end is the seconds per job at which it is done.
    ends, done, elapsed_s = list(running), 0.0, 0.0
    heapq.heapify(ends)
    for _ in range(num_places):
        elapsed_s += (ends[0] - done) * len(ends)
        done = ends[0]
        following = next(waiting, None)
        if following is None:
            heapq.heappop(ends)
        else:
            heapq.heapreplace(ends, done + following)
    return elapsed_s


def note_speed(connection: Connection, model: str, lane: Lane, speed: Speed, now_s: float) -> None:
    """Add a runner's measurement to the average of all runners."""
    assert speed.work_per_s > 0, "a finished job has some work"
    query = select(RATES.c.work_per_s, RATES.c.pixels_per_s).where(RATES.c.model == model, RATES.c.lane == lane.value)
    known = connection.execute(query).one_or_none() or (None, None)
    work_per_s, pixels_per_s = map(_average, known, (speed.work_per_s, speed.pixels_per_s))
    rates = {"work_per_s": work_per_s, "pixels_per_s": pixels_per_s, "updated_s": now_s}
    upsert(connection, RATES, model=model, lane=lane.value, **rates)


def _average(known: float | None, measured: float | None) -> float | None:
    if known is None or measured is None:
        return known if measured is None else measured
    return _NEWEST_SHARE * measured + (1 - _NEWEST_SHARE) * known


class _Promise(NamedTuple):
    """A place that is kept for a rejected caller, from a time on."""

    due_s: float
    caller: Hashable


class RetryEstimator:
    """Spreads the retries of rejected callers, and keeps a place for each who comes back when it was told to.

    Knows the callers of this process by their owner and request, from any thread. A caller who comes back too early
    counts twice, so the number of promises per bound is limited.
    """

    def __init__(self) -> None:
        self._promises: dict[QueueBound, list[_Promise]] = {}
        self._lock = threading.Lock()

    def promise(self, bound: QueueBound, caller: Hashable, estimate_s: Callable[[int], float]) -> float:
        """Return in how many seconds a rejected caller is to come back.

        ``estimate_s`` takes the number of other callers who will come back before.
        """
        now_s = time.monotonic()
        with self._lock:
            self._drop_past(now_s)
            promises = self._promises.setdefault(bound, [])
            if (kept := self._find_due(bound, caller, now_s)) is not None:
                promises.remove(kept)  # it has come, and there was no place after all
            num_before = sum(each.due_s > now_s for each in promises)
        seconds = estimate_s(num_before)
        with self._lock:
            promises = self._promises.setdefault(bound, [])
            promises.append(_Promise(now_s + seconds, caller))
            del promises[: -_CALLERS_PER_PLACE * bound.limit]
        return seconds

    def count_kept(self, bound: QueueBound, caller: Hashable) -> int:
        """Return how many places are kept from a caller, for others who are about to come back."""
        now_s = time.monotonic()
        with self._lock:
            self._drop_past(now_s)
            if self._find_due(bound, caller, now_s) is not None:
                return 0
            return sum(each.due_s <= now_s for each in self._promises.get(bound, ()))

    def fulfil(self, caller: Hashable) -> None:
        """Note that a caller was accepted."""
        with self._lock:
            for bound, promises in self._promises.items():
                if (kept := self._find_due(bound, caller, time.monotonic())) is not None:
                    promises.remove(kept)

    def _find_due(self, bound: QueueBound, caller: Hashable, now_s: float) -> _Promise | None:
        """Return a promise to a caller whose time has come."""
        promises = self._promises.get(bound, ())
        return next((each for each in promises if each.caller == caller and each.due_s - _EARLY_S <= now_s), None)

    def _drop_past(self, now_s: float) -> None:
        """Drop the promises whose callers have not come back in time."""
        kept = {
            bound: [each for each in promises if each.due_s + _KEPT_S >= now_s]
            for bound, promises in self._promises.items()
        }
        self._promises = {bound: promises for bound, promises in kept.items() if promises}
