"""What can be asked about jobs that are there already, and done with them: by the Director's handle."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import sys
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from cosmos3_core import checks
from cosmos3_core.errors import MediaError, RequestError
from deployments.director.parts import DirectorParts
from deployments.jobs.job import Job, JobEvent, JobState
from deployments.jobs.store import Page
from deployments.media.record import DONE, MediaRecord
from deployments.media.store import MediaStore
from deployments.media.variants import ACTION, CONTENT_VARIANTS, VIDEO, made_variant
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

MAX_PART_BYTES = 4 * 2**20
_MAX_FOLLOW_S = 86_400.0


class JobDesk:
    """Base of the Director. ``owner`` is the API key whose jobs are meant, "" for those that came without."""

    _parts: DirectorParts

    async def models(self) -> list[dict[str, Any]]:
        """The one model that is served, and what it can do."""
        return [self._parts.model.told()]

    async def job(self, job_id: str, owner: str = "") -> Job | None:
        """What is known of a job."""
        return await run_in_thread(self._parts.store.get, job_id, owner)

    async def job_object(self, job_id: str, owner: str = "") -> dict[str, Any] | None:
        """A job as the HTTP API tells of it."""
        job = await self.job(job_id, owner)
        return None if job is None else await self._parts.job_objects.of(job)

    async def jobs(self, owner: str = "", after: str | None = None, limit: int = 20, order: str = "desc") -> Page:
        """Jobs of an owner, the newest first unless ``order`` is "asc".

        Raises:
            RequestError: a value is out of range.
        """
        is_ascending = checks.choice("order", order, ("asc", "desc")) == "asc"
        limit = checks.integer("limit", limit, 0, 100)
        store = self._parts.store
        return await asyncio.to_thread(store.list, owner, after=after, limit=limit, is_ascending=is_ascending)

    async def cancel(self, job_id: str, owner: str = "") -> Job | None:
        """Stop a job; one that has ended stays as it is. None where there is none."""
        job = await run_in_thread(self._parts.store.cancel, job_id, owner)
        if job is not None and job.state is JobState.CANCELLED:  # it waited
            try:
                await run_in_thread(self._parts.maintenance.remove_files, job)
            except MediaError:  # they are swept
                logger.exception("what %s came with could not be removed", job_id)
        return job

    async def delete(self, job_id: str, owner: str = "") -> Job | None:
        """Stop and forget a job, its files too. None where there is none."""
        job = await run_in_thread(self._parts.store.delete, job_id, owner)
        if job is not None:
            await run_in_thread(self._parts.maintenance.remove_files, job)
        return job

    async def events(
        self, job_id: str, after: int = 0, timeout_s: float | None = None, owner: str = ""
    ) -> AsyncIterator[JobEvent]:
        """A job's history from an event on, and what comes; call with ``stream=True``. Ends with the job.

        Raises:
            RequestError: there is no such job.
            OverloadedError: too many follow jobs here.
            DeadlineExceeded: it has not ended in time.
        """
        if (job := await self.job(job_id, owner)) is None:
            raise RequestError("video_id", job_id, "the id of a video, as long as it is kept")
        limit_s = checks.real("timeout_s", _MAX_FOLLOW_S if timeout_s is None else timeout_s, 0, math.inf)
        async with aclosing(self._parts.feed.follow(job_id, min(after, job.last_seq), limit_s)) as events:
            async for event in events:
                yield event

    async def read(self, job_id: str, start: int, num_bytes: int, owner: str = "", variant: str = VIDEO) -> bytes:
        """A part of what a finished job has made, as long as it is kept; empty behind its end.

        Any Director of the app can be asked: whoever reads asks for part after part, and holds nobody up by being slow.

        Args:
            job_id: of the job.
            start: first byte.
            num_bytes: at most so many; up to 4 MiB.
            owner: whose job it is.
            variant: as of ``GET /v1/videos/{id}/content``.

        Raises:
            RequestError: there is no such file, or not any more; or a value is out of range.
            ApiError: there is no such variant of it, or not yet.
            MediaError: it cannot be read.
        """
        start = checks.integer("start", start, 0, sys.maxsize)
        num_bytes = checks.integer("num_bytes", num_bytes, 1, MAX_PART_BYTES)
        checks.choice("variant", variant, CONTENT_VARIANTS)
        job = await self.job(job_id, owner)
        if job is None or job.state is not JobState.COMPLETED:
            raise _no_file(job_id)
        if variant == ACTION:
            told = (await self._parts.job_objects.of(job))["action"]
            return b"" if told is None else json.dumps(told).encode()[start : start + num_bytes]
        media = self._parts.media
        record = await asyncio.to_thread(media.find, job.media_id)
        if record is None or record.state != DONE:
            raise _no_file(job_id)
        if variant != VIDEO:
            record = await made_variant(media, record, variant)
        try:
            return await run_in_thread(_part, media, record, start, num_bytes)
        except FileNotFoundError:  # it was removed meanwhile
            raise _no_file(job_id) from None
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise MediaError(f"the file of {job_id} cannot be read: {why}") from error


def _no_file(job_id: str) -> RequestError:
    return RequestError("video_id", job_id, "the id of a video with a finished file, as long as it is kept")


def _part(media: MediaStore, record: MediaRecord, start: int, num_bytes: int) -> bytes:
    with media.open(record) as file:
        file.seek(start)
        return file.read(num_bytes)
