"""JobService: operations on accepted jobs, for the HTTP API and the Director's handle alike; and their maintenance."""

from __future__ import annotations

import asyncio
import json
import logging
import sys
import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

from cosmos3_core import checks
from cosmos3_core.errors import MediaError
from deployments.config import AppConfig, JobsConfig
from deployments.errors import ApiError
from deployments.jobs.database import database_url
from deployments.jobs.events import DELETED, FINAL_KINDS
from deployments.jobs.feed import EventFeed
from deployments.jobs.job import Job, JobEvent, JobState
from deployments.jobs.store import JobStore
from deployments.jobs.video import MAX_PAGE, ORDERS, Video, VideoDeleted, VideoPage, retry_after_s
from deployments.media.job_files import JobFiles
from deployments.media.layout import DONE, MediaRecord
from deployments.media.old_layout import adopt_old_files
from deployments.media.store import MediaStore
from deployments.media.variants import ACTION, CONTENT_VARIANTS, VIDEO, find_or_make
from deployments.observability.metrics import metrics
from deployments.threads import repeat_in_thread, run_in_thread, start_task

logger = logging.getLogger("ray.serve")

MAX_PART_BYTES = 4 * 2**20
_MAINTENANCE_S, _GAUGES_S = 60.0, 5.0


class JobService:
    """Jobs of a database, with their files. Used inside one event loop.

    Every method raises ``JobsError`` if the database cannot be used, and ``ApiError`` 404 for a job that does not
    exist or belongs to another owner. An owner is the id of an API key, "" without keys.
    """

    def __init__(self, store: JobStore, files: JobFiles, media: MediaStore, max_followers: int) -> None:
        self.store, self.files, self.media = store, files, media
        self.feed = EventFeed(store, max_followers)

    @classmethod
    def open(cls, config: AppConfig) -> JobService:
        """Open the database and the files of a configuration; move files of an earlier release to where they belong.

        Raise JobsError or MediaStoreError if they cannot be used.
        """
        media = MediaStore.of(config.media)
        files = JobFiles(media.archive or media.objects)
        store = JobStore.open(database_url(config))
        try:
            adopt_old_files(media, store.find_folder_needs, store.find_media_ids)
        except BaseException:
            store.close()
            raise
        return cls(store, files, media, config.jobs.max_followers)

    async def get(self, job_id: str, owner: str) -> Job:
        """Return a job."""
        return _require(await run_in_thread(self.store.get, job_id, owner))

    async def describe(self, job: Job) -> Video:
        """Return a job as clients see it."""
        (video,) = await self._videos([job])
        return video

    async def _videos(self, jobs: Sequence[Job]) -> tuple[Video, ...]:
        positions = await run_in_thread(self.store.find_positions, jobs)
        return tuple(Video.of(job, positions.get(job.job_id)) for job in jobs)

    async def list(self, owner: str, after: str | None, limit: int, order: str) -> VideoPage:
        """Return a page of an owner's jobs that follows the job ``after``; "asc" = the oldest first.

        Raise RequestError if a value is out of range, or there is no job ``after``.
        """
        limit = checks.integer("limit", limit, 0, MAX_PAGE)
        is_ascending = checks.choice("order", order, ORDERS) == "asc"
        page = await run_in_thread(lambda: self.store.list(owner, after=after, limit=limit, is_ascending=is_ascending))
        return VideoPage.of(await self._videos(page.jobs), has_more=page.has_more)

    async def cancel(self, job_id: str, owner: str) -> Job:
        """Stop a job; one that has ended stays as it is.

        A queued job ends at once, and its files are removed. A running one is ended by its runner.
        """
        job = _require(await run_in_thread(self.store.cancel, job_id, owner))
        if job.state is JobState.CANCELLED:
            await run_in_thread(self.remove_files, job)
        return job

    async def delete(self, job_id: str, owner: str) -> VideoDeleted:
        """Stop and delete a job with its files."""
        job = _require(await run_in_thread(self.store.delete, job_id, owner))
        await run_in_thread(self.remove_files, job)
        return VideoDeleted.of(job.job_id)

    def remove_files(self, job: Job) -> None:
        """Remove the folder of a job that has ended. A folder that cannot be removed now is logged, and swept later."""
        try:
            self.media.remove_folder(job.job_id, job.media_id)
        except MediaError:
            logger.exception("files of %s could not be removed; a sweep will try again", job.job_id)

    async def follow(self, job: Job, after: int, timeout_s: float) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events after number ``after``, as they come; the last one holds the whole job.

        Raise OverloadedError and DeadlineExceeded as :meth:`deployments.jobs.feed.EventFeed.follow`.
        """
        async with aclosing(self.feed.follow(job.job_id, min(after, job.last_seq), timeout_s)) as events:
            async for event in events:
                event = await self._add_video(event, job.owner)
                yield event
                if event.kind == DELETED:
                    return

    async def _add_video(self, event: JobEvent, owner: str) -> JobEvent:
        """Add the job to a final event."""
        if event.kind in FINAL_KINDS:
            job = await run_in_thread(self.store.get, event.job_id, owner)
            if job is not None:
                return replace(event, data=(await self.describe(job)).as_json())
        elif event.kind != DELETED:
            return event
        return replace(event, seq=0, kind=DELETED, data=VideoDeleted.of(event.job_id).as_json())

    async def find_content(self, job: Job, variant: str) -> MediaRecord | bytes:
        """Return the record of a job's file, which may still grow, or of a variant of it; of actions their JSON text.

        Raises:
            RequestError: there is no variant of this name.
            ApiError: 404, this job has no such variant; 409, it is not ready; 410, it failed or has expired.
            MediaError: the file cannot be looked up, or the variant cannot be made.
        """
        checks.choice("variant", variant, CONTENT_VARIANTS)
        if job.state in (JobState.FAILED, JobState.CANCELLED):
            raise ApiError(410, "media_failed", "there is no file: the job has failed or was cancelled")
        is_completed = job.state is JobState.COMPLETED
        if not is_completed and (variant != VIDEO or not job.media_id):
            raise await self._not_ready(job)
        if variant == ACTION:
            actions = Video.of(job, None).action
            if actions is None:
                raise ApiError(404, "no_such_variant", "this job has generated no actions")
            return json.dumps(actions).encode()
        if not job.media_id:
            raise ApiError(404, "no_such_variant", "this job has made actions alone; variant=action has them")
        try:
            return await find_or_make(self.media, job.media_id, variant)
        except ApiError as error:
            if is_completed or error.status != 410:
                raise
        raise await self._not_ready(job)  # an earlier run began that file

    async def read_content(self, job: Job, start: int, num_bytes: int, variant: str = VIDEO) -> bytes:
        """Return at most ``num_bytes``, up to 4 MiB, of a job's finished content; empty after its end.

        Raise RequestError if a value is out of range, ApiError as :meth:`find_content` and 409 while the file grows,
        MediaError if the file cannot be read.
        """
        start = checks.integer("start", start, 0, sys.maxsize)
        num_bytes = checks.integer("num_bytes", num_bytes, 1, MAX_PART_BYTES)
        content = await self.find_content(job, variant)
        if isinstance(content, bytes):
            return content[start : start + num_bytes]
        if content.state != DONE:
            raise await self._not_ready(job)
        try:
            return await run_in_thread(self.media.read, content, start, num_bytes)
        except FileNotFoundError:
            raise ApiError(410, "media_expired", f"the file of {job.job_id} has expired, or was removed") from None

    async def _not_ready(self, job: Job) -> ApiError:
        eta_s = (await self.describe(job)).eta_s
        message = "the file is not ready yet; the job's progress says how far it is"
        return ApiError.not_ready(message, retry_after_s(eta_s))


def _require(job: Job | None) -> Job:
    if job is None:
        raise ApiError(404, "not_found", "video not found, or already deleted")
    return job


@dataclass(frozen=True)
class Maintenance:
    """Deletes old jobs, removes folders that no job needs, and sets one model's gauges, all periodically.

    Any number of processes may do it at once.
    """

    jobs: JobService
    model: str
    config: JobsConfig

    def start(self) -> list[asyncio.Task[None]]:
        """Start the work inside the event loop; the caller must keep the tasks."""
        work = ((self.sweep_jobs, _MAINTENANCE_S), (self.sweep_folders, _MAINTENANCE_S), (self.set_gauges, _GAUGES_S))
        return [start_task(repeat_in_thread(*each)) for each in work]

    def sweep_jobs(self) -> None:
        """Delete old jobs with their files, and fail jobs that no runner would ever claim."""
        self.jobs.store.fail_unserved(self.config.keep_s, self.model)
        for job in self.jobs.store.sweep(self.config.keep_s, self.config.max_kept):
            self.jobs.remove_files(job)

    def sweep_folders(self) -> None:
        """Remove folders that no job needs; see :mod:`deployments.media.layout`."""
        self.jobs.media.sweep(self.jobs.store.find_folder_needs, time.time())

    def set_gauges(self) -> None:
        """Set the gauges of queued and running jobs."""
        classes = self.jobs.store.read_load(self.model)
        metrics().set_jobs(
            queued={(each.lane, each.service_class): each.num_queued for each in classes},
            running={(each.lane, each.service_class): each.num_running for each in classes},
        )
