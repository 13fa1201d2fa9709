"""What is done about jobs now and then: which files go when."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest

from deployments.jobs import upkeep as upkeep_module
from deployments.jobs.files import JobFiles
from deployments.jobs.job import Job, Lane, Progress
from deployments.jobs.maintenance import Upkeep
from deployments.jobs.queue_position import places_of
from deployments.jobs.store import JobStore
from deployments.media.store import MediaStore, new_media_id
from tests.jobs.making import COMPLETED, LIMITS, MODEL, Clock, claim, claimed, lease_of, new_job

KEEP_S, KEEP_MEDIA_S = 1000.0, 100.0


@pytest.fixture
def upkeep(store: JobStore, tmp_path: Path) -> Upkeep:
    media = MediaStore(tmp_path / "media", 2**20, KEEP_MEDIA_S)
    return Upkeep(store, JobFiles(media.directory, None), media, MODEL, KEEP_S, 100)


def with_picture(upkeep: Upkeep, **changes: object) -> Job:
    job = upkeep.store.create(new_job(inputs=("image",), **changes), LIMITS)
    upkeep.files.put(job.job_id, "image", b"picture")
    return job


def has_picture(upkeep: Upkeep, job: Job) -> bool:
    return upkeep.files.exists(job.job_id, "image")


def completed(upkeep: Upkeep) -> Job:
    """With a picture that it came with, and a clip."""
    with_picture(upkeep)
    job = claimed(upkeep.store)
    media_id = new_media_id()
    entry = upkeep.media.create(media_id, "video/mp4", ".mp4", is_live=False)
    entry.path.write_bytes(b"clip")
    entry.finish()
    upkeep.store.record(lease_of(job), Progress(media_id=media_id), [])
    return upkeep.store.finish(lease_of(job), COMPLETED, keep_media_s=KEEP_MEDIA_S)


def test_files_of_jobs_that_will_be_run_stay(upkeep: Upkeep) -> None:
    waiting = with_picture(upkeep)
    running = claimed(upkeep.store)
    other = with_picture(upkeep)
    assert waiting.job_id == running.job_id
    upkeep.sweep_files()
    assert has_picture(upkeep, running)
    assert has_picture(upkeep, other)


def test_files_of_jobs_that_are_not_there_yet_stay(upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    new = new_job()
    upkeep.files.put(new.job_id, "image", b"picture")
    upkeep.sweep_files()
    assert upkeep.files.exists(new.job_id, "image"), "its request is being accepted"
    now_s = time.time()
    monkeypatch.setattr(upkeep_module.time, "time", lambda: now_s + upkeep_module._ORPHAN_S + 60)
    upkeep.sweep_files()
    assert not upkeep.files.exists(new.job_id, "image")


@pytest.mark.parametrize("end", ["cancelled", "abandoned", "runner_died", "not_served", "given_back"])
def test_files_that_no_job_is_made_of_any_more_go(end: str, upkeep: Upkeep, clock: Clock) -> None:
    store = upkeep.store
    job = with_picture(upkeep, attached_to="gone" if end == "abandoned" else None)
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
        upkeep.sweep()
    else:
        running = claimed(store)
        store.cancel(job.job_id)
        store.give_back(lease_of(running))
    ended = store.get(job.job_id)
    assert ended is not None
    assert ended.state.is_final
    upkeep.sweep_files()
    assert not has_picture(upkeep, job)


def test_what_a_completed_job_came_with_stays_as_long_as_its_clip(upkeep: Upkeep, clock: Clock) -> None:
    kept, removed, expired = completed(upkeep), completed(upkeep), completed(upkeep)
    upkeep.media.remove(removed.media_id)  # as for too many bytes
    upkeep.sweep_files()
    assert [has_picture(upkeep, job) for job in (kept, removed, expired)] == [True, False, True]
    clock.passes(KEEP_MEDIA_S + 1)
    upkeep.sweep_files()
    assert not has_picture(upkeep, expired)


def test_what_completed_jobs_came_with_is_at_most_half_of_what_there_is(upkeep: Upkeep, clock: Clock) -> None:
    """The longest completed lose it first; what is to be run needs it."""
    jobs = []
    for _ in range(4):
        jobs.append(completed(upkeep))
        clock.passes(1)
    waiting = with_picture(upkeep)
    size = sum(path.stat().st_size for path in (upkeep.media.directory / "jobs" / waiting.job_id).iterdir())
    small = replace(upkeep, media=MediaStore(upkeep.media.directory, 7 * size, KEEP_MEDIA_S))
    small.sweep_files()
    assert [has_picture(upkeep, job) for job in jobs] == [False, False, True, True]
    assert has_picture(upkeep, waiting)
    tiny = replace(upkeep, media=MediaStore(upkeep.media.directory, 1, KEEP_MEDIA_S))
    tiny.sweep_files()
    assert [has_picture(upkeep, job) for job in (*jobs, waiting)] == [False, False, False, False, True]


def test_a_forgotten_job_takes_its_files_with_it(upkeep: Upkeep, clock: Clock) -> None:
    job = completed(upkeep)
    clock.passes(KEEP_S + 1)
    upkeep.sweep()
    assert upkeep.store.get(job.job_id) is None
    assert not has_picture(upkeep, job)
    assert upkeep.media.find(job.media_id) is None


def test_an_archive_is_seldom_listed(upkeep: Upkeep, monkeypatch: pytest.MonkeyPatch) -> None:
    periods: dict[str, float] = {}

    class Loop:
        def create_task(self, work: tuple[str, float], context: object) -> None:
            periods[work[0]] = work[1]

    monkeypatch.setattr(upkeep_module.asyncio, "get_running_loop", Loop)
    monkeypatch.setattr(upkeep_module, "_repeated", lambda work, period_s: (work.__name__, period_s))
    upkeep.start()
    assert periods["sweep_files"] == upkeep_module._SWEEP_PERIOD_S
    archived = MediaStore(upkeep.media.directory, 2**20, 1e6, f"file://{upkeep.media.directory}-archive")
    replace(upkeep, media=archived).start()
    assert periods["sweep_files"] == pytest.approx(1e4)


def test_runners_together_are_as_fast_as_they_are_many(store: JobStore) -> None:
    store.create(new_job(work=30.0), LIMITS)
    waiting = store.create(new_job(work=30.0), LIMITS)
    assert claim(store, "one") is not None
    store.note_rate(MODEL, Lane.VIDEO, 1.0)
    (alone,) = places_of(store, [waiting])
    assert claim(store, "two", lane=Lane.IMAGE) is None
    (together,) = places_of(store, [waiting])
    assert (alone.eta_s, together.eta_s) == (pytest.approx(60.0), pytest.approx(30.0))
