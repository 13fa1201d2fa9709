"""What is done about jobs now and then: which files go when."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.config import JobsConfig
from deployments.jobs import maintenance as maintenance_module
from deployments.jobs.files import JobFiles
from deployments.jobs.job import Job, Lane, Progress
from deployments.jobs.maintenance import Maintenance
from deployments.jobs.service import JobService
from deployments.jobs.store import JobStore
from deployments.media.store import MediaStore, new_media_id
from tests.jobs.making import COMPLETED, LIMITS, MODEL, Clock, claim, claimed, lease_of, new_job

KEEP_S, KEEP_MEDIA_S = 1000.0, 100.0


@pytest.fixture
def maintenance(store: JobStore, tmp_path: Path) -> Maintenance:
    media = MediaStore(tmp_path / "media", 2**20, KEEP_MEDIA_S)
    jobs = JobService(store, JobFiles(media.directory, None), media, 1)
    return Maintenance(jobs, MODEL, JobsConfig(keep_s=KEEP_S, run_timeout_s=KEEP_S, max_kept=100))


def with_media(maintenance: Maintenance, media: MediaStore) -> Maintenance:
    """The same of another store of clips."""
    jobs = maintenance.jobs
    return replace(maintenance, jobs=JobService(jobs.store, jobs.files, media, 1))


def with_picture(maintenance: Maintenance, **changes: object) -> Job:
    job = maintenance.jobs.store.create(new_job(inputs=("image",), **changes), LIMITS)
    maintenance.jobs.files.put(job.job_id, "image", b"picture")
    return job


def has_picture(maintenance: Maintenance, job: Job) -> bool:
    return maintenance.jobs.files.exists(job.job_id, "image")


def completed(maintenance: Maintenance) -> Job:
    """With a picture that it came with, and a clip."""
    with_picture(maintenance)
    job = claimed(maintenance.jobs.store)
    media_id = new_media_id()
    entry = maintenance.jobs.media.create(media_id, "video/mp4", ".mp4", is_live=False)
    entry.path.write_bytes(b"clip")
    entry.finish()
    maintenance.jobs.store.record(lease_of(job), Progress(media_id=media_id), [])
    return maintenance.jobs.store.finish(lease_of(job), COMPLETED, keep_media_s=KEEP_MEDIA_S)


def test_files_of_jobs_that_will_be_run_stay(maintenance: Maintenance) -> None:
    waiting = with_picture(maintenance)
    running = claimed(maintenance.jobs.store)
    other = with_picture(maintenance)
    assert waiting.job_id == running.job_id
    maintenance.sweep_files()
    assert has_picture(maintenance, running)
    assert has_picture(maintenance, other)


def test_files_of_jobs_that_are_not_there_yet_stay(maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch) -> None:
    new = new_job()
    maintenance.jobs.files.put(new.job_id, "image", b"picture")
    maintenance.sweep_files()
    assert maintenance.jobs.files.exists(new.job_id, "image"), "its request is being accepted"
    now_s = time.time()
    monkeypatch.setattr(maintenance_module.time, "time", lambda: now_s + maintenance_module._ORPHAN_S + 60)
    maintenance.sweep_files()
    assert not maintenance.jobs.files.exists(new.job_id, "image")


@pytest.mark.parametrize("end", ["cancelled", "abandoned", "runner_died", "not_served", "given_back"])
def test_files_that_no_job_is_made_of_any_more_go(end: str, maintenance: Maintenance, clock: Clock) -> None:
    store = maintenance.jobs.store
    job = with_picture(maintenance, attached_to="gone" if end == "abandoned" else None)
    if end == "cancelled":
        store.cancel(job.job_id)
    elif end == "abandoned":
        clock.passes(1e4)
        claim(store, "other")
    elif end == "runner_died":
        claimed(store)
        clock.passes(1e4)
        claim(store, "other", max_attempts=1)
    elif end == "not_served":
        clock.passes(1e6)
        maintenance.sweep()
    else:
        running = claimed(store)
        store.cancel(job.job_id)
        store.give_back(lease_of(running))
    ended = store.get(job.job_id)
    assert ended is not None
    assert ended.state.is_final
    maintenance.sweep_files()
    assert not has_picture(maintenance, job)


def test_what_a_completed_job_came_with_stays_as_long_as_its_clip(maintenance: Maintenance, clock: Clock) -> None:
    kept, removed, expired = completed(maintenance), completed(maintenance), completed(maintenance)
    maintenance.jobs.media.remove(removed.media_id)  # as for too many bytes
    maintenance.sweep_files()
    assert [has_picture(maintenance, job) for job in (kept, removed, expired)] == [True, False, True]
    clock.passes(KEEP_MEDIA_S + 1)
    maintenance.sweep_files()
    assert not has_picture(maintenance, expired)


def test_what_completed_jobs_came_with_is_at_most_half_of_what_there_is(maintenance: Maintenance, clock: Clock) -> None:
    """The longest completed lose it first; what is to be run needs it."""
    jobs = []
    for _ in range(4):
        jobs.append(completed(maintenance))
        clock.passes(1)
    waiting = with_picture(maintenance)
    size = sum(path.stat().st_size for path in (maintenance.jobs.media.directory / "jobs" / waiting.job_id).iterdir())
    small = with_media(maintenance, MediaStore(maintenance.jobs.media.directory, 7 * size, KEEP_MEDIA_S))
    small.sweep_files()
    assert [has_picture(maintenance, job) for job in jobs] == [False, False, True, True]
    assert has_picture(maintenance, waiting)
    tiny = with_media(maintenance, MediaStore(maintenance.jobs.media.directory, 1, KEEP_MEDIA_S))
    tiny.sweep_files()
    assert [has_picture(maintenance, job) for job in (*jobs, waiting)] == [False, False, False, False, True]


def test_a_forgotten_job_takes_its_files_with_it(maintenance: Maintenance, clock: Clock) -> None:
    job = completed(maintenance)
    clock.passes(KEEP_S + 1)
    maintenance.sweep()
    assert maintenance.jobs.store.get(job.job_id) is None
    assert not has_picture(maintenance, job)
    assert maintenance.jobs.media.find(job.media_id) is None


def test_an_archive_is_seldom_listed(maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch) -> None:
    periods: dict[str, float] = {}

    class Loop:
        def create_task(self, work: tuple[str, float], context: object) -> None:
            periods[work[0]] = work[1]

    monkeypatch.setattr(maintenance_module.asyncio, "get_running_loop", Loop)
    monkeypatch.setattr(maintenance_module, "_repeat", lambda work, period_s: (work.__name__, period_s))
    maintenance.start()
    assert periods["sweep_files"] == maintenance_module._SWEEP_PERIOD_S
    archived = MediaStore(
        maintenance.jobs.media.directory, 2**20, 1e6, f"file://{maintenance.jobs.media.directory}-archive"
    )
    with_media(maintenance, archived).start()
    assert periods["sweep_files"] == pytest.approx(1e4)


def test_runners_together_are_as_fast_as_they_are_many(store: JobStore) -> None:
    store.create(new_job(work=30.0), LIMITS)
    waiting = store.create(new_job(work=30.0), LIMITS)
    assert claim(store, "one") is not None
    store.note_rate(MODEL, Lane.VIDEO, 1.0)
    alone = store.queue_positions([waiting])[waiting.job_id]
    assert claim(store, "two", lane=Lane.IMAGE) is None
    together = store.queue_positions([waiting])[waiting.job_id]
    assert (alone.eta_s, together.eta_s) == (pytest.approx(60.0), pytest.approx(30.0))
