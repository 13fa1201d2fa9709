"""Maintenance: periodically delete old jobs, remove folders that no job needs, and set gauges."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from deployments.config import JobsConfig
from deployments.jobs.service import JobService
from deployments.observability.metrics import metrics
from deployments.threads import repeat_in_thread, start_task

_PERIOD_S = 60.0
_GAUGES_PERIOD_S = 5.0


@dataclass(frozen=True)
class Maintenance:
    """Periodic work on jobs, and gauges of one model's; any number of processes may do it at once."""

    jobs: JobService
    model: str
    config: JobsConfig

    def start(self) -> list[asyncio.Task[None]]:
        """Start the work inside the event loop; the caller must keep the tasks."""
        work = ((self.sweep_jobs, _PERIOD_S), (self.sweep_folders, _PERIOD_S), (self.set_gauges, _GAUGES_PERIOD_S))
        return [start_task(repeat_in_thread(*each)) for each in work]

    def sweep_jobs(self) -> None:
        """Delete old jobs with their files, and fail jobs that no runner would ever claim."""
        self.jobs.store.fail_unserved(self.config.keep_s)
        for job in self.jobs.store.sweep(self.config.keep_s, self.config.max_kept):
            self.jobs.remove_files(job)

    def sweep_folders(self) -> None:
        """Remove folders that no job needs; see :mod:`deployments.media.layout`."""
        self.jobs.media.sweep(self.jobs.store.folder_needs, time.time())

    def set_gauges(self) -> None:
        """Set the gauges of queued and running jobs."""
        classes = self.jobs.store.load(self.model)
        metrics().set_jobs(
            queued={(each.lane, each.service_class): each.num_queued for each in classes},
            running={(each.lane, each.service_class): each.num_running for each in classes},
        )
