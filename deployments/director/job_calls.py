"""Methods of the Director's handle for existing jobs; they answer as the HTTP API does."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from cosmos3_core import checks
from deployments.director.parts import DirectorParts
from deployments.jobs.job import JobEvent
from deployments.media.variants import VIDEO

_MAX_FOLLOW_S = 86_400.0


class JobCalls:
    """Base of the Director: offers :class:`deployments.jobs.service.JobService` by its handle.

    An ``owner`` is the id of an API key, "" for jobs without a key. A job that does not exist, or is not the owner's,
    raises ``ApiError`` with status 404, as over HTTP.
    """

    _parts: DirectorParts

    async def models(self) -> list[dict[str, Any]]:
        """Return the one model that is served, as ``GET /v1/models`` shows it."""
        return [self._parts.model.as_json()]

    async def job(self, job_id: str, owner: str = "") -> dict[str, Any]:
        """Return a job, as ``GET /v1/videos/{id}`` shows it."""
        jobs = self._parts.jobs
        return (await jobs.video(await jobs.get(job_id, owner))).as_json()

    async def jobs(
        self, owner: str = "", after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> dict[str, Any]:
        """Return a page of an owner's jobs, as ``GET /v1/videos`` shows it; raise RequestError for a wrong value."""
        return (await self._parts.jobs.list(owner, after, limit, order)).as_json()

    async def cancel(self, job_id: str, owner: str = "") -> dict[str, Any]:
        """Stop a job and return it; one that has ended stays as it is."""
        jobs = self._parts.jobs
        return (await jobs.video(await jobs.cancel(job_id, owner))).as_json()

    async def delete(self, job_id: str, owner: str = "") -> dict[str, Any]:
        """Stop and delete a job with its files."""
        return (await self._parts.jobs.delete(job_id, owner)).as_json()

    async def events(
        self, job_id: str, after: int = 0, timeout_s: float | None = None, owner: str = ""
    ) -> AsyncIterator[JobEvent]:
        """Yield a job's events after number ``after``, as they come, to its end; call with ``stream=True``.

        Raises:
            OverloadedError: too many callers follow jobs here.
            DeadlineExceeded: the job has not ended in time.
        """
        limit_s = checks.real("timeout_s", _MAX_FOLLOW_S if timeout_s is None else timeout_s, 0, math.inf)
        job = await self._parts.jobs.get(job_id, owner)
        async with aclosing(self._parts.jobs.follow(job, after, limit_s)) as events:
            async for event in events:
                yield event

    async def read(self, job_id: str, start: int, num_bytes: int, owner: str = "", variant: str = VIDEO) -> bytes:
        """Return a part of a finished job's content, as :meth:`deployments.jobs.service.JobService.read`.

        Any Director of the app answers. Readers fetch part after part, so a slow one delays no other.
        """
        jobs = self._parts.jobs
        return await jobs.read(await jobs.get(job_id, owner), start, num_bytes, variant)
