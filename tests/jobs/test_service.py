"""The job service with missing or unusable files; ``tests/api`` covers HTTP and the handle."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.errors import MediaError, RequestError
from deployments.errors import ApiError
from deployments.jobs.estimates import Speed
from deployments.jobs.job import Job, JobState, Lane, Progress
from deployments.jobs.service import MAX_PART_BYTES, JobService
from deployments.jobs.store import JobStore
from deployments.media.job_files import JobFiles
from deployments.media.layout import new_media_id
from deployments.media.store import MediaStore
from deployments.media.variants import CONTENT_VARIANTS
from tests.clock import Clock
from tests.jobs.making import COMPLETED, LIMITS, MODEL, claim_existing, make_lease, new_job

DEADLINE_S = 60.0


@pytest.fixture
def jobs(store: JobStore, tmp_path: Path) -> JobService:
    media = MediaStore(tmp_path / "media", 2**20, 1000.0)
    return JobService(store, JobFiles(media.objects), media, 2)


def with_clip(jobs: JobService, *, is_finished: bool = True) -> Job:
    """Make a running job with an input picture and a clip."""
    new = new_job(inputs=("image",))
    jobs.files.put(new.job_id, "image", b"picture")
    jobs.store.create(new, LIMITS)
    job = claim_existing(jobs.store)
    media_id = new_media_id(job.job_id)
    entry = jobs.media.create(media_id, "video/mp4", ".mp4", is_live=True)
    if is_finished:
        entry.path.write_bytes(b"a clip")
        entry.finish()
    jobs.store.record(make_lease(job), Progress(media_id=media_id), [])
    return job


def complete(jobs: JobService) -> Job:
    return jobs.store.finish(make_lease(with_clip(jobs)), COMPLETED, keep_media_s=1000.0)


def leftovers(jobs: JobService, job: Job) -> tuple[bool, bool]:
    """Whether its picture exists, and its clip."""
    return jobs.files.exists(job.job_id, "image"), jobs.media.find(job.media_id) is not None


def break_disk(jobs: JobService, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make removals fail; return the names they were tried on."""
    names: list[str] = []

    def remove(name: str, *_: object) -> bool:
        names.append(name)
        raise OSError("the disk is away")

    monkeypatch.setattr(jobs.media.objects, "remove", remove)
    return names


def test_a_deletion_succeeds_even_if_files_cannot_be_removed(
    jobs: JobService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A sweep removes what is left."""
    job = complete(jobs)
    names = break_disk(jobs, monkeypatch)
    deleted = asyncio.run(jobs.delete(job.job_id, ""))
    assert deleted.as_json() == {"id": job.job_id, "object": "video.deleted", "deleted": True}
    assert names == [job.media_id]
    assert caplog.text.count("could not be removed") == 1
    for call in (jobs.delete, jobs.cancel, jobs.get):
        with pytest.raises(ApiError) as caught:
            asyncio.run(call(job.job_id, ""))
        assert (caught.value.status, caught.value.code) == (404, "not_found")


def test_a_deleted_job_leaves_nothing(jobs: JobService) -> None:
    """Earlier attempts and saved states are removed too."""
    job = complete(jobs)
    earlier = new_media_id(job.job_id)
    jobs.media.create(earlier, "video/mp4", ".mp4", is_live=True)
    jobs.media.fail(earlier, "the encoder died")
    jobs.files.put(job.job_id, "checkpoint", b"state")
    asyncio.run(jobs.delete(job.job_id, ""))
    assert os.listdir(jobs.media.directory) == []


def test_a_job_of_another_owner_is_not_found(jobs: JobService) -> None:
    job = complete(jobs)
    for call in (jobs.delete, jobs.cancel, jobs.get):
        with pytest.raises(ApiError, match="video not found"):
            asyncio.run(call(job.job_id, "somebody"))
    assert leftovers(jobs, job) == (True, True)


def test_a_cancelled_queued_job_loses_its_files(jobs: JobService) -> None:
    """The files are its inputs, and the clip of a runner that released it."""
    job = with_clip(jobs, is_finished=False)
    jobs.store.give_back(make_lease(job))
    cancelled = asyncio.run(jobs.cancel(job.job_id, ""))
    assert (cancelled.state, bool(cancelled.media_id)) == (JobState.CANCELLED, True)
    assert leftovers(jobs, cancelled) == (False, False)


def test_a_cancellation_succeeds_even_if_files_cannot_be_removed(
    jobs: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    waiting = jobs.store.create(new_job(), LIMITS)
    names = break_disk(jobs, monkeypatch)
    assert asyncio.run(jobs.cancel(waiting.job_id, "")).state is JobState.CANCELLED
    assert names == [waiting.job_id]
    jobs.store.create(new_job(), LIMITS)
    running = claim_existing(jobs.store)
    assert asyncio.run(jobs.cancel(running.job_id, "")).state is JobState.IN_PROGRESS
    assert names == [waiting.job_id], "its runner needs them until it has stopped"


@pytest.mark.parametrize("how", ["removed", "unreadable"])
def test_a_file_removed_while_it_is_read_is_a_typed_error(
    how: str, jobs: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message does not show the directory."""
    job = complete(jobs)
    assert asyncio.run(jobs.read_content(job, 2, 100)) == b"clip"
    assert asyncio.run(jobs.read_content(job, 6, 100)) == b""
    opened = jobs.media.open

    def open_gone(record: Any) -> Any:
        if how == "unreadable":
            raise PermissionError(13, "Permission denied", str(jobs.media.file_path(record)))
        jobs.media.remove(record.media_id)
        return opened(record)

    monkeypatch.setattr(jobs.media, "open", open_gone)
    expected = "has expired, or was removed" if how == "removed" else "cannot be read: Permission denied"
    with pytest.raises(ApiError if how == "removed" else MediaError, match=expected) as caught:
        asyncio.run(jobs.read_content(job, 0, 100))
    assert str(jobs.media.directory) not in str(caught.value)
    assert job.job_id in str(caught.value)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"start": -1}, "start"),
        ({"num_bytes": 0}, "num_bytes"),
        ({"num_bytes": MAX_PART_BYTES + 1}, "num_bytes"),
        ({"variant": "poster"}, "variant"),
    ],
)
def test_parts_of_a_file_are_bounded(given: dict[str, Any], field: str, jobs: JobService) -> None:
    job = complete(jobs)
    with pytest.raises(RequestError) as caught:
        asyncio.run(jobs.read_content(job, **{"start": 0, "num_bytes": 1, **given}))
    assert caught.value.field == field


@pytest.mark.parametrize("variant", CONTENT_VARIANTS)
def test_a_growing_file_is_read_in_parts_once_it_is_finished(variant: str, jobs: JobService) -> None:
    job = with_clip(jobs, is_finished=False)
    now = jobs.store.get(job.job_id)
    assert now is not None
    with pytest.raises(ApiError) as caught:
        asyncio.run(jobs.read_content(now, 0, 1, variant))
    assert (caught.value.status, caught.value.code) == (409, "media_not_ready")
    assert "retry-after" in caught.value.headers


def test_a_page_of_queued_jobs_takes_two_queries(
    jobs: JobService, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = []
    for _ in range(101):
        created.append(jobs.store.create(new_job(), LIMITS))
        clock.advance(1.0)
    jobs.store.note_speed(MODEL, Lane.VIDEO, Speed(2.0))
    reading, transactions = jobs.store._database.reading, []

    def count_reading() -> Any:
        transactions.append(1)
        return reading()

    monkeypatch.setattr(jobs.store._database, "reading", count_reading)
    page = asyncio.run(jobs.list("", None, 100, "asc"))
    assert len(transactions) == 2, "the jobs, and where all of them stand"
    assert [video.id for video in page.videos] == [job.job_id for job in created[:100]]
    assert [video.queue_position for video in page.videos] == list(range(100))
    assert [video.eta_s for video in page.videos] == [2.0 * (i + 1) for i in range(100)]
    assert (page.first_id, page.last_id, page.has_more) == (created[0].job_id, created[99].job_id, True)


def test_a_future_event_number_hides_no_event(jobs: JobService) -> None:
    job = jobs.store.create(new_job(), LIMITS)

    async def follow() -> list[Any]:
        events = jobs.follow(job, 5000, DEADLINE_S)
        first = [await anext(events)]
        await jobs.cancel(job.job_id, "")
        return first + [event async for event in events]

    queued, cancelled = asyncio.run(follow())
    assert (queued.kind, cancelled.kind) == ("queued", "cancelled")
    assert (cancelled.data["id"], cancelled.data["status"]) == (job.job_id, "failed"), "the last one has the job"


def test_following_a_deleted_job_raises(jobs: JobService) -> None:
    job = jobs.store.create(new_job(), LIMITS)

    async def follow() -> list[Any]:
        events = jobs.follow(job, 0, DEADLINE_S)
        first = [await anext(events)]
        deleted = await jobs.delete(job.job_id, "")
        assert [event.data for event in first + [event async for event in events]][-1] == deleted.as_json()
        return first

    assert [event.kind for event in asyncio.run(follow())] == ["queued"]
