"""Maintenance of jobs: old ones are forgotten, files that no job needs are removed, gauges are set."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from deployments.config import JobsConfig
from deployments.jobs.service import JobService
from deployments.observability.metrics import metrics
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

_SWEEP_PERIOD_S = 60.0
_GAUGES_PERIOD_S = 5.0


@dataclass(frozen=True)
class Maintenance:
    """Periodic work on jobs; any number of processes may do it at once.

    Attributes:
        jobs: with their files.
        model: whose jobs are counted.
        config: the configuration's section.
    """

    jobs: JobService
    model: str
    config: JobsConfig

    def start(self) -> list[asyncio.Task[None]]:
        """Start the work inside the event loop; the caller has to hold the tasks."""
        loop = asyncio.get_running_loop()
        work = (
            (self.sweep, _SWEEP_PERIOD_S),
            (self.sweep_folders, _SWEEP_PERIOD_S),
            (self.set_gauges, _GAUGES_PERIOD_S),
        )
        return [loop.create_task(_repeat(*each), context=contextvars.Context()) for each in work]

    def sweep(self) -> None:
        """Delete old jobs with their files, and fail jobs that no runner would ever claim."""
        self.jobs.store.fail_unserved(self.config.keep_s)
        for job in self.jobs.store.sweep(self.config.keep_s, self.config.max_kept):
            self.jobs.remove_files(job)

    def sweep_folders(self) -> None:
        """Remove folders of jobs that are not needed any more, or too large; see :mod:`deployments.media.layout`."""
        self.jobs.media.sweep(self.jobs.store.folder_needs, time.time())

    def set_gauges(self) -> None:
        """Set the gauges of jobs."""
        classes = self.jobs.store.load(self.model).classes
        metrics().set_jobs(
            queued={(each.lane, each.service_class): each.num_queued for each in classes},
            running={(each.lane, each.service_class): each.num_running for each in classes},
        )


async def _repeat(work: Callable[[], None], period_s: float) -> None:
    while True:
        try:
            await run_in_thread(work)
        except Exception:  # such as a database that is away: try again
            logger.exception("maintenance of jobs failed")
        await asyncio.sleep(period_s)
