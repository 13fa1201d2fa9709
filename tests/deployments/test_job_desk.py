"""What the Director's handle says of files, without Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cosmos3_core.errors import MediaError, RequestError
from deployments.job_desk import JobDesk
from deployments.jobs.files import JobFiles
from deployments.jobs.job import Progress
from deployments.jobs.store import JobStore
from deployments.media_store import MediaStore, new_media_id
from tests.jobs.making import COMPLETED, LIMITS, claimed, lease_of, new_job


@pytest.fixture
def desk(tmp_path: Path) -> Any:
    desk: Any = JobDesk()
    media = MediaStore(tmp_path / "media", 2**20, 100.0)
    store = JobStore.open(f"sqlite:///{tmp_path}/jobs.sqlite3")
    desk._parts = SimpleNamespace(store=store, media=media, files=JobFiles(media.directory, None))
    yield desk
    store.close()


@pytest.mark.parametrize(
    ("raised", "told"), [(FileNotFoundError(2, "gone", "/srv/clip.mp4"), RequestError), (OSError(5, "io"), MediaError)]
)
def test_a_file_that_goes_while_it_is_read(
    raised: OSError, told: type[Exception], desk: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, media = desk._parts.store, desk._parts.media
    store.create(new_job(), LIMITS)
    job, media_id = claimed(store), new_media_id()
    entry = media.create(media_id, "video/mp4", ".mp4", is_live=False)
    entry.path.write_bytes(b"clip")
    entry.finish()
    store.record(lease_of(job), Progress(media_id=media_id), [])
    store.finish(lease_of(job), COMPLETED, keep_media_s=100.0)
    assert asyncio.run(desk.read(job.job_id, 1, 2)) == b"li"

    def opened(_: Any) -> Any:
        raise raised

    monkeypatch.setattr(media, "open", opened)
    with pytest.raises(told) as caught:
        asyncio.run(desk.read(job.job_id, 0, 10))
    assert "/srv" not in str(caught.value)


def test_what_a_cancelled_job_came_with_goes_at_once(desk: Any) -> None:
    job = desk._parts.store.create(new_job(inputs=("image",)), LIMITS)
    desk._parts.files.put(job.job_id, "image", b"picture")
    asyncio.run(desk.cancel(job.job_id))
    assert not desk._parts.files.exists(job.job_id, "image")
