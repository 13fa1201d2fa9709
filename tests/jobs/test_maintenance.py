"""Periodic maintenance of jobs: which files are removed, and when."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.config import JobsConfig
from deployments.jobs.estimates import Speed
from deployments.jobs.job import Job, JobState, Lane, Outcome, Progress
from deployments.jobs.service import JobService, Maintenance
from deployments.jobs.store import JobStore
from deployments.media import sweeper
from deployments.media.job_files import JobFiles
from deployments.media.layout import new_media_id
from deployments.media.store import MediaStore
from tests.clock import Clock
from tests.jobs.making import COMPLETED, LIMITS, MODEL, claim, claim_existing, make_lease, new_job
from tests.virtual_time import set_clocks

KEEP_S, KEEP_MEDIA_S = 1000.0, 100.0


@pytest.fixture
def maintenance(store: JobStore, tmp_path: Path) -> Maintenance:
    media = MediaStore(tmp_path / "media", 2**20, KEEP_MEDIA_S)
    jobs = JobService(store, JobFiles(media.objects), media, 1)
    return Maintenance(jobs, MODEL, JobsConfig(keep_s=KEEP_S, run_timeout_s=KEEP_S, max_kept=100))


def with_media(maintenance: Maintenance, media: MediaStore) -> Maintenance:
    """Return the same maintenance for another media store."""
    jobs = maintenance.jobs
    return replace(maintenance, jobs=JobService(jobs.store, jobs.files, media, 1))


def with_picture(maintenance: Maintenance, **changes: object) -> Job:
    job = maintenance.jobs.store.create(new_job(inputs=("image",), **changes), LIMITS)
    maintenance.jobs.files.put(job.job_id, "image", b"picture")
    return job


def has_picture(maintenance: Maintenance, job: Job) -> bool:
    return maintenance.jobs.files.exists(job.job_id, "image")


def complete(maintenance: Maintenance) -> Job:
    """Make a completed job with an input picture and a clip."""
    with_picture(maintenance)
    job = claim_existing(maintenance.jobs.store)
    media_id = new_media_id(job.job_id)
    entry = maintenance.jobs.media.create(media_id, "video/mp4", ".mp4", is_live=False)
    entry.path.write_bytes(b"clip")
    entry.finish()
    maintenance.jobs.store.record(make_lease(job), Progress(media_id=media_id), [])
    return maintenance.jobs.store.finish(make_lease(job), COMPLETED, keep_media_s=KEEP_MEDIA_S)


def test_files_of_queued_jobs_are_kept(maintenance: Maintenance) -> None:
    waiting = with_picture(maintenance)
    running = claim_existing(maintenance.jobs.store)
    other = with_picture(maintenance)
    assert waiting.job_id == running.job_id
    maintenance.sweep_folders()
    assert has_picture(maintenance, running)
    assert has_picture(maintenance, other)


def test_files_of_a_job_that_is_not_created_yet_are_kept(
    maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = new_job()
    maintenance.jobs.files.put(new.job_id, "image", b"picture")
    maintenance.sweep_folders()
    assert maintenance.jobs.files.exists(new.job_id, "image"), "its request is being accepted"
    now_s = time.time()
    set_clocks(monkeypatch, time_s=lambda: now_s + sweeper.ORPHAN_S + 60)
    maintenance.sweep_folders()
    assert not maintenance.jobs.files.exists(new.job_id, "image")


@pytest.mark.parametrize("end", ["cancelled", "abandoned", "runner_died", "not_served", "given_back"])
def test_old_files_without_a_job_are_removed(end: str, maintenance: Maintenance, clock: Clock) -> None:
    store = maintenance.jobs.store
    job = with_picture(maintenance, attached_to="gone" if end == "abandoned" else None)
    if end == "cancelled":
        store.cancel(job.job_id)
    elif end == "abandoned":
        clock.advance(1e4)
        claim(store, "other")
    elif end == "runner_died":
        claim_existing(store)
        other = with_picture(maintenance)
        store.finish(make_lease(claim_existing(store)), Outcome(JobState.COMPLETED), keep_media_s=1e6)
        clock.advance(1e4)
        claim(store, "other", max_attempts=1)
        assert has_picture(maintenance, other)
    elif end == "not_served":
        clock.advance(1e6)
        replace(maintenance, model="another").sweep_jobs()
    else:
        running = claim_existing(store)
        store.cancel(job.job_id)
        store.give_back(make_lease(running))
    ended = store.get(job.job_id)
    assert ended is not None
    assert ended.state.is_final
    maintenance.sweep_folders()
    assert not has_picture(maintenance, job)


def test_inputs_of_a_completed_job_are_kept_as_long_as_its_clip(maintenance: Maintenance, clock: Clock) -> None:
    kept, removed, expired = complete(maintenance), complete(maintenance), complete(maintenance)
    maintenance.jobs.remove_files(removed)
    maintenance.sweep_folders()
    assert [has_picture(maintenance, job) for job in (kept, removed, expired)] == [True, False, True]
    clock.advance(KEEP_MEDIA_S + 1)
    maintenance.sweep_folders()
    assert not has_picture(maintenance, expired)
    assert maintenance.jobs.media.find(expired.media_id) is None
    assert os.listdir(maintenance.jobs.media.directory) == []


def test_too_many_bytes_remove_the_oldest_completed_jobs_folders(maintenance: Maintenance, clock: Clock) -> None:
    """Files of unfinished jobs stay, and count for up to half of the bytes."""
    jobs = []
    for _ in range(4):
        jobs.append(complete(maintenance))
        clock.advance(1)
    waiting = with_picture(maintenance)
    size = maintenance.jobs.media.objects.measure(jobs[0].job_id)[0]
    maintenance.jobs.files.put(waiting.job_id, "image", bytes(10 * size))
    small = with_media(maintenance, MediaStore(maintenance.jobs.media.directory, int(4.5 * size), KEEP_MEDIA_S))
    small.sweep_folders()
    assert [has_picture(maintenance, job) for job in jobs] == [False, False, True, True]
    assert [maintenance.jobs.media.find(job.media_id) is not None for job in jobs] == [False, False, True, True]
    assert has_picture(maintenance, waiting)
    tiny = with_media(maintenance, MediaStore(maintenance.jobs.media.directory, 1, KEEP_MEDIA_S))
    tiny.sweep_folders()
    assert [has_picture(maintenance, job) for job in (*jobs, waiting)] == [False, False, False, False, True]


def test_a_forgotten_jobs_files_are_removed(maintenance: Maintenance, clock: Clock) -> None:
    job = complete(maintenance)
    clock.advance(KEEP_S + 1)
    maintenance.sweep_jobs()
    assert maintenance.jobs.store.get(job.job_id) is None
    assert not has_picture(maintenance, job)
    assert maintenance.jobs.media.find(job.media_id) is None


def test_files_of_an_unfinished_job_are_never_swept(maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever their age and size: input, state, the growing attempt and the one before."""
    job = with_picture(maintenance)
    running = claim_existing(maintenance.jobs.store)
    maintenance.jobs.files.put(job.job_id, "checkpoint", b"state")
    failed, growing = new_media_id(job.job_id), new_media_id(job.job_id)
    for media_id in (failed, growing):
        maintenance.jobs.media.create(media_id, "video/mp4", ".mp4", is_live=True)
    maintenance.jobs.media.fail(failed, "the encoder died")
    maintenance.jobs.store.record(make_lease(running), Progress(media_id=growing), [])
    set_clocks(monkeypatch, time_s=lambda: 1e11)
    tiny = with_media(maintenance, MediaStore(maintenance.jobs.media.directory, 1, KEEP_MEDIA_S))
    tiny.sweep_folders()
    assert maintenance.jobs.files.get(job.job_id, "image") == b"picture"
    assert maintenance.jobs.files.get(job.job_id, "checkpoint") == b"state"
    assert maintenance.jobs.media.require(growing).live_name == "live.mp4"


def test_a_sweep_keeps_files_of_another_apps_unfinished_job(
    maintenance: Maintenance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other app sweeps too; unneeded files are removed."""
    waiting, orphan = with_picture(maintenance), new_job()
    maintenance.jobs.files.put(orphan.job_id, "image", b"picture")
    monkeypatch.setattr(sweeper, "read_written_s", lambda *_: 1.0)
    media = maintenance.jobs.media
    for job_id in (waiting.job_id, orphan.job_id):
        os.utime(media.directory / job_id, (1, 1))
        os.utime(media.directory / job_id / "image", (1, 1))
    media.sweep(lambda job_ids: {waiting.job_id: None, orphan.job_id: 1.0}, time.time())
    assert media.sweep(lambda _: {}, time.time()) == 1
    assert has_picture(maintenance, waiting)
    assert not maintenance.jobs.files.exists(orphan.job_id, "image")
    assert media.sweep(lambda _: {}, time.time() + sweeper.ORPHAN_S + 60) == 1


def test_speed_is_the_sum_over_runners(store: JobStore) -> None:
    store.create(new_job(work=30.0), LIMITS)
    waiting = store.create(new_job(work=30.0), LIMITS)
    assert claim(store, "one") is not None
    store.note_speed(MODEL, Lane.VIDEO, Speed(1.0))
    alone = store.find_positions([waiting])[waiting.job_id]
    assert claim(store, "two", lane=Lane.IMAGE) is None
    together = store.find_positions([waiting])[waiting.job_id]
    assert (alone.eta_s, together.eta_s) == (pytest.approx(60.0), pytest.approx(30.0))
