"""What the Director's handle is told where files are gone, or cannot be used."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosmos3_core.errors import MediaError, RequestError
from deployments.director.job_desk import JobDesk
from deployments.jobs.feed import EventFeed
from deployments.jobs.job import Job, JobState, Progress
from deployments.jobs.store import JobStore
from deployments.media.store import MediaStore, new_media_id
from tests.jobs.making import COMPLETED, LIMITS, claimed, lease_of, new_job

DEADLINE_S = 60.0


class Desk(JobDesk):
    """Of a store, and what becomes of files is written down."""

    def __init__(self, directory: Path) -> None:
        self.store = JobStore.open(f"sqlite:///{directory}/jobs.sqlite3")
        self.media = MediaStore(directory / "media", 2**20, 1000.0)
        self.removed: list[str] = []
        self._parts: Any = SimpleNamespace(
            store=self.store,
            media=self.media,
            feed=EventFeed(self.store, 2),
            maintenance=SimpleNamespace(remove_files=self._remove),
        )

    def _remove(self, job: Job) -> None:
        self.removed.append(job.job_id)
        raise MediaError("the disk is away")

    def completed(self) -> Job:
        """A job with a clip."""
        self.store.create(new_job(), LIMITS)
        job, media_id = claimed(self.store), new_media_id()
        entry = self.media.create(media_id, "video/mp4", ".mp4", is_live=False)
        entry.path.write_bytes(b"a clip")
        entry.finish()
        self.store.record(lease_of(job), Progress(media_id=media_id), [])
        return self.store.finish(lease_of(job), COMPLETED, keep_media_s=1000.0)


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    made = Desk(tmp_path)
    yield made
    made.store.close()


@pytest.mark.parametrize("how", ["removed", "unreadable"])
def test_a_file_that_goes_while_it_is_asked_for(how: str, desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The directory is nobody's business."""
    job = desk.completed()
    assert asyncio.run(desk.read(job.job_id, 2, 100)) == b"clip"
    opened = desk.media.open

    def gone(record: Any) -> Any:
        if how == "unreadable":
            raise PermissionError(13, "Permission denied", str(desk.media.file_path(record)))
        desk.media.remove(record.media_id)
        return opened(record)

    monkeypatch.setattr(desk.media, "open", gone)
    expected = "as long as it is kept" if how == "removed" else "cannot be read: Permission denied"
    with pytest.raises(RequestError if how == "removed" else MediaError, match=expected) as caught:
        asyncio.run(desk.read(job.job_id, 0, 100))
    assert str(desk.media.directory) not in str(caught.value)
    assert job.job_id in str(caught.value)


def test_a_cancelled_job_takes_what_it_came_with_along(desk: Desk) -> None:
    """Whatever becomes of that, it is cancelled."""
    waiting = desk.store.create(new_job(), LIMITS)
    job = asyncio.run(desk.cancel(waiting.job_id))
    assert job is not None
    assert job.state is JobState.CANCELLED
    assert desk.removed == [job.job_id]
    desk.store.create(new_job(), LIMITS)
    running = claimed(desk.store)
    assert asyncio.run(desk.cancel(running.job_id)) is not None
    assert desk.removed == [job.job_id], "its runner needs it until it has stopped"


def test_a_number_that_is_not_there_yet_hides_nothing(desk: Desk) -> None:
    job = desk.store.create(new_job(), LIMITS)

    async def kinds() -> list[str]:
        events = desk.events(job.job_id, after=5000, timeout_s=DEADLINE_S)
        told = [(await anext(events)).kind]
        desk.store.cancel(job.job_id)
        return told + [event.kind async for event in events]

    assert asyncio.run(kinds()) == ["queued", "cancelled"]
