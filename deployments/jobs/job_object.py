"""A job as the HTTP API tells of it: OpenAI's video object with vLLM-Omni's fields, and ours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deployments.jobs.job import Job
from deployments.jobs.store import JobStore
from deployments.jobs.video import HIGH, LOSSLESS, Video, poll_after_ms, retry_after_s
from deployments.messages import QueuePosition
from deployments.threads import run_in_thread

__all__ = ["HIGH", "LOSSLESS", "JobObjects", "job_object", "poll_after_ms", "retry_after_s"]


class JobObjects:
    """Jobs as objects, with where they stand.

    Args:
        store: of the jobs.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def of(self, job: Job) -> dict[str, Any]:
        """Of one job.

        Raises:
            JobsError: the database cannot be used.
        """
        (told,) = await self.of_all([job])
        return told

    async def of_all(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Of several, in their order.

        Raises:
            JobsError: the database cannot be used.
        """
        positions = await run_in_thread(self._store.queue_positions, jobs)
        return [job_object(job, positions.get(job.job_id)) for job in jobs]


def job_object(job: Job, position: QueuePosition | None) -> dict[str, Any]:
    """The object.

    Args:
        job: which one.
        position: in the queue; None where it does not wait.
    """
    return Video.of(job, position).as_json()
