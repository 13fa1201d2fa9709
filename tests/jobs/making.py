"""Jobs and limits for tests of the database of jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from sqlalchemy import select

from deployments.config import JobsConfig
from deployments.jobs import queue
from deployments.jobs.estimates import Speed
from deployments.jobs.job import Job, JobState, Lane, NewJob, Outcome, new_job_id
from deployments.jobs.queue import ClaimRequest
from deployments.jobs.schema import RATES, RUNNERS
from deployments.jobs.store import JobStore, Lease

MODEL = "nano"
LEASE_S = 20.0
LIMITS = JobsConfig(max_queued=1000, max_queued_per_key=1000, lease_s=LEASE_S, max_attempts=3)
COMPLETED = Outcome(JobState.COMPLETED, result={"num_bytes": 5})


def new_job(**changes: Any) -> NewJob:
    """Make a job; its work is 4 token-steps by default."""
    job = NewJob(
        job_id=new_job_id(),
        owner="",
        model=MODEL,
        request={"prompt": "a car"},
        fingerprint="f",
        mode="text_to_video",
        prompt="a car",
        width=320,
        height=192,
        num_frames=17,
        fps=24.0,
        seed=1,
        num_steps=4,
        media_type="video/mp4",
        lane=Lane.VIDEO,
        service_class="standard",
        work=4.0,
        request_id="r",
    )
    return replace(job, **changes)


def limits_with(**changes: Any) -> JobsConfig:
    """Return the limits with some changed."""
    return LIMITS.model_copy(update=changes)


def claim(
    store: JobStore, runner: str = "runner", *, lane: Lane = Lane.VIDEO, limits: JobsConfig = LIMITS, **changes: Any
) -> Job | None:
    """Claim a job or None; ``changes`` go to the claim if it has the field, else to the limits."""
    own = {name: changes.pop(name) for name in ("model", "only_attached", "in_hand") if name in changes}
    request = ClaimRequest(
        runner=runner, lane=lane, config=limits.model_copy(update=changes), **{"model": MODEL, **own}
    )
    _look_for_a_while(store, request)
    return store.claim(request)


def _look_for_a_while(store: JobStore, request: ClaimRequest) -> None:
    """Look at the leases that a claim meets, and again a lease later: runners look twice a second."""
    with store._database.reading() as connection:
        queue.check_work(connection, request, store._watch, store._clock())
    for seen in store._watch._groups.values():
        seen |= {name: (time_s, since_s - LEASE_S) for name, (time_s, since_s) in seen.items()}


def count_queued(store: JobStore, model: str = MODEL) -> int:
    """Count a model's queued jobs, of all classes in both lanes."""
    return sum(each.num_queued for each in store.read_load(model))


def list_runners(store: JobStore, silent_s: float) -> tuple[str, ...]:
    """List the model's runners that gave a recent sign of life."""
    alive = (RUNNERS.c.model == MODEL, RUNNERS.c.alive_s >= store._clock() - silent_s)
    with store._database.reading() as connection:
        return tuple(connection.execute(select(RUNNERS.c.runner).where(*alive).order_by(RUNNERS.c.runner)).scalars())


def read_speed(store: JobStore, lane: Lane) -> Speed | None:
    """Return the recorded speed of a lane."""
    with store._database.reading() as connection:
        query = select(RATES.c.work_per_s, RATES.c.pixels_per_s).where(RATES.c.model == MODEL)
        found = connection.execute(query.where(RATES.c.lane == lane.value)).one_or_none()
        return None if found is None else Speed(*found)


def claim_existing(store: JobStore, runner: str = "runner", **changes: Any) -> Job:
    """Claim a job that must be there."""
    job = claim(store, runner, **changes)
    assert job is not None
    return job


def make_lease(job: Job) -> Lease:
    """Return the claim's lease."""
    return Lease(job.job_id, job.lease)


def reload(store: JobStore, job: NewJob) -> Job:
    """Reload the job, which must exist."""
    now = store.get(job.job_id)
    assert now is not None
    return now


def list_event_kinds(store: JobStore, job: NewJob) -> list[str]:
    """List the kinds of all its events; checks that their numbers have no gap."""
    events = store.find_events({job.job_id: 0})
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.kind for event in events]
