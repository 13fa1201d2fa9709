"""Where a job stands: how many are before it, and when it is likely to be done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from deployments.jobs.job import Job, JobState, Lane
from deployments.jobs.store import JobStore

# Runners that were silent for longer do not count.
_ALIVE_S = 120.0


@dataclass(frozen=True)
class Place:
    """See the module.

    Attributes:
        position: jobs that are before it, those that run included; None for one that does not wait.
        eta_s: seconds until its last step; None where nobody knows yet.
    """

    position: int | None
    eta_s: float | None


NOWHERE = Place(None, None)
"""Of a job that neither waits nor denoises."""


def places_of(store: JobStore, jobs: Sequence[Job]) -> list[Place]:
    """Of jobs, in their order; asks the database about those that wait, for threads.

    Raises:
        JobsError: the database cannot be used.
    """
    speeds: dict[tuple[str, Lane], float | None] = {}
    places = []
    for job in jobs:
        if job.state is JobState.QUEUED:
            of_lane = (job.model, job.lane)
            if of_lane not in speeds:
                speeds[of_lane] = _speed(store, *of_lane)
            ahead, speed = store.ahead(job), speeds[of_lane]
            places.append(Place(ahead.num_jobs, (ahead.work + job.work) / speed if speed else None))
        elif job.state is JobState.IN_PROGRESS and job.started_s is not None and 0 < job.step < job.num_steps:
            # Other jobs' turns are in the time that has passed; what was done before a restart is not.
            pace_s = max((job.updated_s - job.started_s) / job.step, job.step_s or 0.0)
            places.append(Place(None, (job.num_steps - job.step) * pace_s))
        else:
            places.append(NOWHERE)
    return places


def _speed(store: JobStore, model: str, lane: Lane) -> float | None:
    """Work per second that all runners get done in a lane; None where it was never measured."""
    of_one = store.rate(model, lane)
    return None if of_one is None else of_one * max(len(store.runners(model, _ALIVE_S)), 1)
