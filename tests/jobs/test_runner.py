"""The runner, with a real database and fake pipelines: claims, callers, leases, takeovers, ends. No Ray."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy import update

from cluster.errors import DeadlineExceeded, OutOfMemory, OverloadedError, ShuttingDown
from cluster.events import QueuePosition, StepDone
from cosmos3_core.errors import RequestError
from deployments.director.recorder import SAVED_STATE
from deployments.errors import JobCancelled
from deployments.jobs.estimates import Speed
from deployments.jobs.job import Job, JobState, Lane, SubmitOptions
from deployments.jobs.rows import insert_job
from deployments.jobs.schema import JOBS
from deployments.messages import Finished
from tests.jobs.making import limits_with, new_job, read_speed
from tests.jobs.running import DEADLINE_S, IMAGE, SMALL, Service


def test_a_detached_job_runs_and_is_recorded(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        job = await service.submit()
        assert job.state is JobState.QUEUED
        done = await service.until(job.job_id, JobState.COMPLETED)
        assert done.result["frames_sha256"] == "abc"
        assert done.media_id == "0" * 32
        assert done.expires_s == pytest.approx(done.completed_s + 3600)
        events = service.store.find_events({job.job_id: 0})
        assert [event.seq for event in events] == list(range(1, len(events) + 1))
        kinds = [event.kind for event in events]
        assert kinds == ["started", "step", "step", "step", "step", "file", "completed"]
        steps = [event.data for event in events if event.kind == "step"]
        assert [(step["step"], step["sigma"], step["pid"]) for step in steps] == [
            (n, 1 - n / 4, 77) for n in range(1, 5)
        ]
        while service.files.exists(job.job_id, SAVED_STATE):  # no runner will resume from it
            await asyncio.sleep(0.02)
        while not read_speed(service.store, Lane.VIDEO):
            await asyncio.sleep(0.02)

    serve(body)


def test_a_caller_gets_every_event_and_the_recorded_end(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        kinds = []
        async for event in service.stream():
            kinds.append(type(event))
            if isinstance(event, Finished):
                job = service.store.get(event.job_id)
                assert job is not None
                assert job.state is JobState.COMPLETED
        assert kinds.count(StepDone) == 4
        assert kinds[-1] is Finished
        assert service.runner.num_in_hand == 0

    serve(body)


def test_a_caller_that_leaves_stops_its_queued_or_running_job(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        service.stage.gate.clear()
        streams = [service.stream(), service.stream()]
        waiting = [asyncio.ensure_future(anext(stream)) for stream in streams]
        while not service.stage.pipelines:
            await asyncio.sleep(0.02)
        (queued,), (running,) = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        position = queued.result()
        assert isinstance(position, QueuePosition)
        assert position.position == 1
        ids = list(service.runner._callers)
        assert len(ids) == 2
        running.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        for stream in streams:
            await stream.aclose()
        for job_id in ids:
            job = await service.until(job_id, JobState.CANCELLED)
            assert job.error_code == "cancelled"
        assert [pipeline.was_stopped for pipeline in service.stage.pipelines] == [True]
        service.stage.gate.set()
        assert [event async for event in service.stream()], "places are free again"

    serve(body)


def test_each_lane_has_its_own_places(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        service.stage.gate.clear()
        videos = [await service.submit(), await service.submit()]
        image = await service.submit(IMAGE)
        await service.until(image.job_id, JobState.IN_PROGRESS)
        await service.until(videos[0].job_id, JobState.IN_PROGRESS)
        assert service.store.get(videos[1].job_id).state is JobState.QUEUED
        service.stage.gate.set()
        await service.until(videos[1].job_id, JobState.COMPLETED)

    serve(body)


def test_a_stages_error_is_recorded_and_raised(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        service.stage.fails_at = 3
        job = await service.submit()
        failed = await service.until(job.job_id, JobState.FAILED)
        assert failed.error_code == "out_of_memory"
        assert failed.error_message.endswith("ask for fewer frames or a smaller size: 2 GiB")
        assert failed.step == 2
        with pytest.raises(OutOfMemory, match="2 GiB"):
            _ = [event async for event in service.stream()]

    serve(body)


def test_a_running_job_can_be_cancelled_and_deleted(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        service.stage.gate.clear()
        cancelled, deleted = await service.submit(), await service.submit()
        await service.until(cancelled.job_id, JobState.IN_PROGRESS)
        await service.until(deleted.job_id, JobState.IN_PROGRESS)
        service.store.cancel(cancelled.job_id, "")
        service.store.delete(deleted.job_id, "")
        await service.until(cancelled.job_id, JobState.CANCELLED)
        while service.runner.num_in_hand:
            await asyncio.sleep(0.02)
        assert all(pipeline.was_stopped for pipeline in service.stage.pipelines)
        assert service.store.get(deleted.job_id) is None
        assert service.store.find_events({cancelled.job_id: 0})[-1].kind == "cancelled"

    serve(body)


def test_a_caller_of_a_cancelled_job_gets_an_error(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        service.stage.gate.clear()

        async def follow() -> None:
            with pytest.raises(JobCancelled):
                _ = [event async for event in service.stream()]

        callers = [asyncio.ensure_future(follow()) for _ in range(2)]
        while not all(service.store.get(job_id) for job_id in service.runner._callers) or not service.stage.pipelines:
            await asyncio.sleep(0.02)
        for job_id in list(service.runner._callers):
            service.store.cancel(job_id, "")
        await asyncio.gather(*callers)

    serve(body)


def test_a_dead_runners_job_resumes_from_its_last_state(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make()
        first.stage.holds_after = 3
        job = await first.submit()
        while not first.files.exists(job.job_id, SAVED_STATE):
            await asyncio.sleep(0.02)
        while (found := first.store.get(job.job_id)) is None or found.step < 3:
            await asyncio.sleep(0.02)
        await asyncio.sleep(0.1)
        first.die()
        second = make()
        done = await second.until(job.job_id, JobState.COMPLETED)
        assert done.attempts == 2
        (pipeline,) = second.stage.pipelines
        assert pipeline.resume_from is not None
        assert 1 <= pipeline.resume_from.data[0] <= 3
        steps = [event.data["step"] for event in second.store.find_events({job.job_id: 0}) if event.kind == "step"]
        assert steps[:3] == [1, 2, 3]
        assert steps[-1] == 4

    serve(body)


async def save_and_die(service: Service) -> Job:
    """Run a job until a state of it is saved, and end its runner like SIGKILL; return the job."""
    service.stage.holds_after = 2
    job = await service.submit()
    while not service.files.exists(job.job_id, SAVED_STATE):
        await asyncio.sleep(0.02)
    service.die()
    return job


def test_a_damaged_state_is_dropped(serve: Any, tmp_path: Path) -> None:
    async def body(make: Callable[..., Service]) -> None:
        job = await save_and_die(make())
        (path,) = (path for path in (tmp_path / "media").rglob(f"*{SAVED_STATE}*") if job.job_id in str(path))
        path.write_bytes(path.read_bytes()[:-1])
        second = make()
        await second.until(job.job_id, JobState.COMPLETED)
        (pipeline,) = second.stage.pipelines
        assert pipeline.resume_from is None

    serve(body)


def test_a_state_that_cannot_be_read_just_now_is_waited_for(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is away costs no work."""

    async def body(make: Callable[..., Service]) -> None:
        job = await save_and_die(make())
        second = make()
        list_names, num_failures = second.files._objects.names, 0

        def fail_twice(folder: str) -> list[str]:
            nonlocal num_failures
            num_failures += 1
            if num_failures <= 2:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return list_names(folder)

        monkeypatch.setattr(second.files._objects, "names", fail_twice)
        done = await second.until(job.job_id, JobState.COMPLETED)
        assert done.attempts == 2, "of the runner that died, and the last"
        (pipeline,) = second.stage.pipelines
        assert pipeline.resume_from is not None

    serve(body)


@pytest.mark.parametrize("others_succeed", [True, False])
def test_a_job_fails_after_its_last_attempt_if_others_succeed(others_succeed: bool, serve: Any) -> None:
    """Otherwise it is not the job that kills its runners."""

    async def body(make: Callable[..., Service]) -> None:
        job: Job | None = None
        for number in (1, 2):
            service = make()
            service.stage.gate.clear()
            job = job or await service.submit()
            while not service.stage.pipelines:
                await asyncio.sleep(0.02)
            assert service.store.get(job.job_id).attempts == number
            service.die()
        assert job is not None
        if others_succeed:
            completed = {"state": "completed", "started_s": time.time(), "completed_s": time.time()}
            with service.store._database.writing() as connection:
                insert_job(connection, new_job(), 0.0, 0.0)
                connection.execute(update(JOBS).where(JOBS.c.job_id != job.job_id).values(completed))
        ended = await make().until(job.job_id, JobState.FAILED, JobState.COMPLETED)
        assert ended.state is (JobState.FAILED if others_succeed else JobState.COMPLETED)
        assert ("died 2 times" in ended.error_message) == others_succeed

    serve(body)


def test_an_attached_job_ends_with_its_runner(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make()
        first.stage.gate.clear()
        stream = first.stream()
        waiting = asyncio.ensure_future(anext(stream))
        while not first.stage.pipelines:
            await asyncio.sleep(0.02)
        job_id = first.stage.pipelines[0].job.job_id
        first.die()
        second = make()
        failed = await second.until(job_id, JobState.FAILED)
        assert failed.error_code == "abandoned"
        assert not second.stage.pipelines
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)

    serve(body)


def test_a_draining_runner_finishes_attached_jobs_and_releases_the_rest(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 2})
        service.stage.gate.clear()
        running = await service.submit()
        await service.until(running.job_id, JobState.IN_PROGRESS)
        stream = service.stream()
        waiting = asyncio.ensure_future(anext(stream))
        while len(service.stage.pipelines) < 2:
            await asyncio.sleep(0.02)
        queued = await service.submit()
        assert service.runner.drain() == 2
        await service.runner.release()
        with pytest.raises(ShuttingDown):
            await waiting
        for job in (running, queued):
            found = service.store.get(job.job_id)
            assert found is not None
            assert found.state is JobState.QUEUED
        assert service.runner.num_in_hand == 0
        other = make()
        for job in (running, queued):
            done = await other.until(job.job_id, JobState.COMPLETED)
        assert done.attempts == 1

    serve(body)


def test_a_job_claimed_during_a_drain_is_released(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make()
        claim, options, drained = first.store.claim, threading.Event(), threading.Event()

        def slow_claim(*arguments: Any, **changes: Any) -> Job | None:
            job = claim(*arguments, **changes)
            if job is not None:
                options.set()
                drained.wait(DEADLINE_S)
            return job

        monkeypatch.setattr(first.store, "claim", slow_claim)
        job = await first.submit()
        while not options.is_set():
            await asyncio.sleep(0.02)
        assert first.runner.drain() == 0
        drained.set()
        given_back = await first.until(job.job_id, JobState.QUEUED)
        assert (given_back.attempts, first.stage.pipelines) == (0, [])
        assert (await make().until(job.job_id, JobState.COMPLETED)).attempts == 1

    serve(body)


def test_a_released_job_resumes_where_it_was(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make(checkpoint_period_s=1000.0)
        first.stage.holds_after = 3
        job = await first.submit()
        while (found := first.store.get(job.job_id)) is None or found.step < 3:
            await asyncio.sleep(0.02)
        assert not first.files.exists(job.job_id, SAVED_STATE), "it was not time for one"
        await first.runner.release()
        given_back = first.store.get(job.job_id)
        assert (given_back.state, given_back.attempts) == (JobState.QUEUED, 0)
        second = make()
        done = await second.until(job.job_id, JobState.COMPLETED)
        assert done.attempts == 1
        (pipeline,) = second.stage.pipelines
        assert pipeline.resume_from is not None
        assert pipeline.resume_from.data[0] == 3

    serve(body)


def test_a_callers_deadline_applies_in_the_queue(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        service.stage.gate.clear()
        blocking = await service.submit()
        await service.until(blocking.job_id, JobState.IN_PROGRESS)
        stream = service.stream(limit_s=3.0)
        waiting = asyncio.ensure_future(anext(stream))
        while not service.runner._callers:
            await asyncio.sleep(0.02)
        (job_id,) = service.runner._callers
        await waiting  # skip its queue position
        with pytest.raises(DeadlineExceeded, match="in the stage 'queue'"):
            await anext(stream)
        await service.until(job_id, JobState.CANCELLED)

    serve(body)


def test_a_runner_that_renews_late_keeps_its_job(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        service.stage.gate.clear()
        renew, late = service.store.renew, threading.Event()

        def late_renew(*arguments: Any) -> Any:
            late.wait(1.4)  # later than the lease's one second
            return renew(*arguments)

        monkeypatch.setattr(service.store, "renew", late_renew)
        job = await service.submit()
        await service.until(job.job_id, JobState.IN_PROGRESS)
        await asyncio.sleep(1.3)
        late.set()
        await asyncio.sleep(0.5)
        service.stage.gate.set()
        done = await service.until(job.job_id, JobState.COMPLETED)
        assert (done.attempts, len(service.stage.pipelines)) == (1, 1)

    serve(body)


def test_inputs_are_stored_and_removed_with_the_job(serve: Any) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)

    async def body(make: Callable[..., Service]) -> None:
        service = make()
        job = await service.submit(replace(SMALL, image=picture))
        await service.until(job.job_id, JobState.COMPLETED)
        (pipeline,) = service.stage.pipelines
        np.testing.assert_array_equal(pipeline.request.picture.media, picture)
        request, options = await service.admission.load_remix(
            await service.jobs.get(job.job_id, ""), "another", SubmitOptions(service_class="batch")
        )
        assert request.prompt == "another"
        assert (options.remixed_from, options.service_class) == (job.job_id, "standard"), "it inherits the class"
        np.testing.assert_array_equal(request.image, picture)

    serve(body)


def test_an_uncompleted_job_leaves_no_inputs(serve: Any, tmp_path: Path) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        service.stage.fails_at = 2
        request = replace(SMALL, image=np.zeros((32, 32, 3), np.uint8))
        job = await service.submit(request)
        await service.until(job.job_id, JobState.FAILED)
        while list((tmp_path / "media").rglob("image")):
            await asyncio.sleep(0.02)
        with pytest.raises(RequestError, match="whose image is still there"):
            await service.admission.load_remix(await service.jobs.get(job.job_id, ""), "another", SubmitOptions())
        service.stage.fails_at = 0
        assert [event async for event in service.stream(request)], "who waits has the file, and comes back for nothing"
        while list((tmp_path / "media").rglob("image")):
            await asyncio.sleep(0.02)

    serve(body)


def test_a_full_lane_does_not_block_the_other(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        service.admission = replace(service.admission, config=limits_with(max_queued=1))
        service.stage.gate.clear()
        await service.until((await service.submit()).job_id, JobState.IN_PROGRESS)
        await service.submit()
        with pytest.raises(OverloadedError, match="videos that wait"):
            await service.submit()
        service.stage.gate.set()
        await service.until((await service.submit(IMAGE)).job_id, JobState.COMPLETED)

    serve(body)


def test_a_refused_request_leaves_no_files(serve: Any, tmp_path: Path) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        service.admission = replace(service.admission, config=limits_with(max_queued=1))
        service.runner.drain()
        picture = np.zeros((32, 32, 3), np.uint8)
        await service.submit(replace(SMALL, image=picture))
        with pytest.raises(Exception, match="places are taken"):
            await service.submit(replace(SMALL, image=picture))
        assert len(list((tmp_path / "media").rglob("*image*"))) == 1

    serve(body)


def test_refused_callers_get_staggered_retry_times(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        service.admission = replace(service.admission, config=limits_with(max_queued=1))
        service.stage.gate.clear()
        await service.until((await service.submit()).job_id, JobState.IN_PROGRESS)
        queued = await service.submit()
        service.store.note_speed("nano", Lane.VIDEO, Speed(queued.work / 10))  # ten seconds each
        waits_s = []
        for _ in range(4):
            with pytest.raises(OverloadedError) as refused:
                await service.submit()
            waits_s.append(refused.value.retry_after_s)
        assert waits_s == pytest.approx([10, 20, 30, 40])

    serve(body)
