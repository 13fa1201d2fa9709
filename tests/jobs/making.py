"""Jobs, limits and a clock for tests of the database of jobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from deployments.jobs.job import Job, JobState, Lane, NewJob, Outcome, new_job_id
from deployments.jobs.store import JobStore, Lease, QueueLimits

MODEL = "nano"
LEASE_S = 20.0
LIMITS = QueueLimits(
    max_queued=1000,
    max_queued_per_key=1000,
    max_running_per_key=None,
    classes={"interactive": 8.0, "standard": 4.0, "batch": 1.0},
)
COMPLETED = Outcome(JobState.COMPLETED, result={"num_bytes": 5})


class Clock:
    """Seconds since 1970, that pass when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now_s

    def passes(self, seconds: float) -> None:
        self.now_s += seconds


def new_job(**changes: Any) -> NewJob:
    """A job of 4 token-steps, say."""
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


def claim(store: JobStore, runner: str = "runner", **changes: Any) -> Job | None:
    """What a runner gets."""
    given = {"model": MODEL, "lane": Lane.VIDEO, "limits": LIMITS, "lease_s": LEASE_S, "max_attempts": 3, **changes}
    return store.claim(runner, **given)


def claimed(store: JobStore, runner: str = "runner", **changes: Any) -> Job:
    """What a runner gets, where there has to be something."""
    job = claim(store, runner, **changes)
    assert job is not None
    return job


def lease_of(job: Job) -> Lease:
    """The claim's."""
    return Lease(job.job_id, job.lease)


def found(store: JobStore, job: NewJob) -> Job:
    """The job as it is now."""
    now = store.get(job.job_id)
    assert now is not None
    return now


def kinds(store: JobStore, job: NewJob) -> list[str]:
    """Of all its events; their numbers have no gap."""
    events = store.events({job.job_id: 0})
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    return [event.kind for event in events]
