"""A line for each job that has ended, on the terminal of ``cosmos3 serve``."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.config import AppConfig
from deployments.errors import JobsError
from deployments.jobs.database import database_url
from deployments.jobs.job import Job, JobState
from deployments.jobs.store import JobStore

_MAX_LINES = 50  # at once


class EndedJobs:
    """Reports an app's jobs that have ended since the last look into its database."""

    def __init__(
        self, config: AppConfig, report: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self._store = JobStore.open(database_url(config))
        self._model = config.model_name or CheckpointLayout.open(config.checkpoint).name
        self._report = report
        self._since_s = clock()

    def report_new(self) -> None:
        """Report the jobs that have ended since the last call. A database that is away is the Director's to report."""
        try:
            jobs = self._store.find_ended(self._model, self._since_s, _MAX_LINES + 1)
        except JobsError:
            return
        for job in jobs[:_MAX_LINES]:
            self._report(describe_end(job))
            self._since_s = job.completed_s or self._since_s
        if len(jobs) > _MAX_LINES:
            self._report("... and more, which follow")

    def close(self) -> None:
        """Close the database."""
        self._store.close()


def describe_end(job: Job) -> str:
    """Describe a job that has ended: when, id, what it was, and how it ended, on one line."""
    ended_s = job.completed_s or job.updated_s
    at = datetime.fromtimestamp(ended_s).strftime("%H:%M:%S")
    frames = "" if job.num_frames == 1 else f" {job.num_frames} frames"
    what = f"{job.mode} {job.width}x{job.height}{frames} {job.num_steps} steps"
    if job.state is JobState.COMPLETED:
        end = f"completed in {ended_s - (job.started_s or job.created_s):.1f} s"
    else:
        end = f"{job.state.value}: {job.error_code}: {' '.join(job.error_message.split())}"
    return f"{at} {job.job_id} {what}: {end}"
