"""Maintenance of jobs: old ones are forgotten, files that no job needs are removed, gauges are set."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deployments.config import JobsConfig
from deployments.jobs.service import JobService
from deployments.jobs.store import FileNeed
from deployments.observability.metrics import metrics
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

_SWEEP_PERIOD_S = 60.0
_SWEEPS_PER_KEEP = 100
# Files are written before their job: files whose job is missing for so long belong to none.
_ORPHAN_S = 3600.0
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
        # Listing an archive costs money.
        files_period_s = (
            _SWEEP_PERIOD_S if self.jobs.media.archive is None else self.jobs.media.keep_s / _SWEEPS_PER_KEEP
        )
        work = (
            (self.sweep, _SWEEP_PERIOD_S),
            (self.sweep_files, max(files_period_s, _SWEEP_PERIOD_S)),
            (self.set_gauges, _GAUGES_PERIOD_S),
        )
        return [loop.create_task(_repeat(*each), context=contextvars.Context()) for each in work]

    def sweep(self) -> None:
        """Delete old jobs with their files, and fail jobs that no runner would ever claim."""
        self.jobs.store.fail_unserved(self.config.keep_s)
        for job in self.jobs.store.sweep(self.config.keep_s, self.config.max_kept):
            self.jobs.remove_files(job)

    def sweep_files(self) -> None:
        """Remove input files of jobs that will not run and cannot be remixed.

        A completed job can be remixed as long as its clip is there, or until its inputs have to make room.
        """
        spare: dict[str, float] = {}

        def needed(job_ids: Sequence[str]) -> dict[str, bool]:
            needs = self.jobs.store.file_needs(job_ids)
            spare.update({job_id: need.until_s for job_id, need in needs.items() if need.until_s is not None})
            return {job_id: self._is_needed(need) for job_id, need in needs.items()}

        self.jobs.files.sweep(needed, _ORPHAN_S, time.time())
        for job_id in self.jobs.media.spare_job_files(spare):
            self.jobs.files.remove(job_id)

    def _is_needed(self, need: FileNeed) -> bool:
        if need.until_s is None:
            return True
        return need.until_s > 0 and (not need.media_id or self.jobs.media.find(need.media_id) is not None)

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
