"""Runners when something else fails: the database, the files, another runner, the app."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from sqlalchemy import update

from cluster.envelope import TensorEnvelope
from cluster.errors import ShuttingDown
from cluster.events import QueuePosition
from deployments.director import recorder as recorder_module
from deployments.director import runner as runner_module
from deployments.director.leases import ClaimedJob, LeaseKeeper, StopReason
from deployments.director.progress import StageDeadlines
from deployments.director.recorder import SAVED_STATE, SavedStates
from deployments.errors import IllegalTransition, JobsError, LeaseLost
from deployments.jobs.job import Job, JobState, Lane, new_job_id
from deployments.jobs.schema import JOBS
from deployments.media.job_files import JobFiles
from deployments.media.objects import DirectoryObjects
from deployments.messages import Finished
from tests.jobs.making import count_queued, new_job
from tests.jobs.running import DEADLINE_S, IMAGE, SMALL, Service
from tests.observability.recording import RecordingMetrics

AWAY = JobsError("the database is away")


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> RecordingMetrics:
    metrics = RecordingMetrics()
    monkeypatch.setattr(runner_module, "metrics", lambda: metrics)
    return metrics


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "_TRY_PAUSE_S", 0.05)


def fail_first_calls(work: Callable[..., Any], num_failures: int, is_done: bool = False) -> Callable[..., Any]:
    """Make a method fail the first ``num_failures`` calls; with ``is_done`` it takes effect all the same."""
    left = [num_failures]

    def call(*arguments: Any, **named: Any) -> Any:
        if left[0] > 0:
            left[0] -= 1
            if is_done:
                work(*arguments, **named)
            raise AWAY
        return work(*arguments, **named)

    return call


@pytest.mark.parametrize("name", ["record", "finish"])
def test_a_short_database_outage_costs_nothing(name: str, serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        monkeypatch.setattr(service.store, name, fail_first_calls(getattr(service.store, name), 12))
        job = await service.submit()
        done = await service.until(job.job_id, JobState.COMPLETED)
        assert (done.attempts, len(service.stage.pipelines)) == (1, 1)
        assert [event.kind for event in service.store.find_events({job.job_id: 0})].count("step") == 4

    serve(body)


def test_a_job_is_released_despite_a_database_outage(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        service.stage.gate.clear()
        job = await service.submit()
        await service.until(job.job_id, JobState.IN_PROGRESS)
        monkeypatch.setattr(service.store, "give_back", fail_first_calls(service.store.give_back, 12))
        await service.runner.release()
        assert service.store.get(job.job_id).state is JobState.QUEUED

    serve(body)


def test_a_fresh_claim_is_released_despite_a_database_outage(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The runner stops when the database has the claim but the runner has not got the answer."""
    claimed, go_on = threading.Event(), threading.Event()

    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        claim = service.store.claim

        def slow(*arguments: Any, **named: Any) -> Job | None:
            if (job := claim(*arguments, **named)) is not None:
                claimed.set()
                go_on.wait(DEADLINE_S)
            return job

        monkeypatch.setattr(service.store, "claim", slow)
        monkeypatch.setattr(service.store, "give_back", fail_first_calls(service.store.give_back, 12))
        job = await service.submit()
        assert await asyncio.to_thread(claimed.wait, DEADLINE_S)
        releasing = asyncio.create_task(service.runner.release())
        await asyncio.sleep(0)
        go_on.set()
        async with asyncio.timeout(DEADLINE_S):
            await releasing
        assert service.store.get(job.job_id).state is JobState.QUEUED
        assert service.stage.pipelines == []

    serve(body)


def test_progress_waits_for_the_database(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long it is away, while the leases can be renewed."""

    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=0.3)
        monkeypatch.setattr(service.store, "record", fail_first_calls(service.store.record, 20))
        job = await service.submit()
        done = await service.until(job.job_id, JobState.COMPLETED)
        assert (done.attempts, len(service.stage.pipelines)) == (1, 1)
        assert [event.kind for event in service.store.find_events({job.job_id: 0})].count("step") == 4

    serve(body)


def test_an_end_whose_confirmation_was_lost_counts(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        monkeypatch.setattr(service.store, "finish", fail_first_calls(service.store.finish, 1, is_done=True))
        events = [event async for event in service.stream()]
        assert isinstance(events[-1], Finished)

    serve(body)


def test_another_runners_end_is_not_taken_for_ones_own(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unused file is removed; the job's file stays."""

    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        removed: list[str] = []
        monkeypatch.setattr(service.media, "remove", removed.append)
        is_ended = False

        def finish(*_: Any, **__: Any) -> Job:
            nonlocal is_ended
            if is_ended:
                raise LeaseLost("whatever")
            is_ended = True
            with service.store._database.writing() as connection:
                others = {"state": "completed", "runner": "other", "lease": "", "media_path": "1" * 32}
                connection.execute(update(JOBS).values(others))
            raise AWAY

        monkeypatch.setattr(service.store, "finish", finish)
        await service.submit()
        async with asyncio.timeout(DEADLINE_S):
            while not removed:
                await asyncio.sleep(0.02)
        assert removed == ["0" * 32]

    serve(body)


def test_a_runner_that_cannot_renew_its_leases_stops(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=0.3)
        service.stage.gate.clear()
        job = await service.submit()
        await service.until(job.job_id, JobState.IN_PROGRESS)
        is_away = True
        renew = service.store.renew

        def fail_while_away(*arguments: Any) -> Any:
            if is_away:
                raise AWAY
            return renew(*arguments)

        monkeypatch.setattr(service.store, "renew", fail_while_away)
        async with asyncio.timeout(DEADLINE_S):
            while not any(pipeline.was_stopped for pipeline in service.stage.pipelines):
                await asyncio.sleep(0.02)
        waits = await service.until(job.job_id, JobState.QUEUED)
        assert (waits.fault, waits.attempts) == ("jobs_unavailable", 0)
        assert service.runner.breaker.faults == ["jobs_unavailable"]
        is_away = False
        service.stage.gate.set()
        assert (await service.until(job.job_id, JobState.COMPLETED)).attempts == 1
        assert service.runner.breaker.faults == []

    serve(body)


def test_a_locked_database_is_named_before_a_write_fails(
    serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A lock that passes refuses no request, but /ready says what everybody waits for."""
    monkeypatch.setattr(runner_module, "_LONG_WRITE_S", 0.2)

    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        await service.until((await service.submit()).job_id, JobState.COMPLETED)
        assert service.runner.list_faults() == []
        with closing(sqlite3.connect(tmp_path / "jobs.sqlite3", isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            submitting = asyncio.create_task(service.submit())
            async with asyncio.timeout(DEADLINE_S):
                while service.runner.list_faults() != ["jobs_unavailable"]:
                    await asyncio.sleep(0.02)
            assert service.runner.breaker.faults == []
            other.execute("ROLLBACK")
        await service.until((await submitting).job_id, JobState.COMPLETED)
        assert service.runner.list_faults() == []

    serve(body)


def test_a_stage_without_any_process_does_not_end_its_jobs(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A call of it waits for a process without end: the job waits in the queue instead."""
    monkeypatch.setattr(runner_module, "_STAGES_PERIOD_S", 0.05)

    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0, deadlines=StageDeadlines(*[(0.5, 0.5)] * 4))
        service.stage.gate.clear()
        job = await service.submit()
        await service.until(job.job_id, JobState.IN_PROGRESS)
        waits = await service.until(job.job_id, JobState.QUEUED)
        assert (waits.fault, waits.attempts) == ("stage_failed: PromptTokenizer", 0)
        service.stage.gate.set()
        assert (await service.until(job.job_id, JobState.COMPLETED)).attempts == 1

    serve(body)


def test_a_fresh_claim_survives_earlier_failed_renewals() -> None:
    old, fresh = (ClaimedJob(Job(**vars(new_job()))) for _ in range(2))
    leases = LeaseKeeper(MagicMock(), "runner", 20.0, {"old": old, "fresh": fresh}, lambda _: None)
    old.claimed_s -= 41
    leases._give_up_expired(renewed_s=old.claimed_s)
    assert (old.stop_reason, fresh.stop_reason) == (StopReason.DATABASE_AWAY, None)


def test_a_renewal_that_takes_long_is_waited_for_and_the_next_one_counts() -> None:
    """A busy machine: another try would wait behind the first, and be as late."""
    num_calls, failures = 0, []
    answer = threading.Event()

    def renew(*_: Any) -> tuple[set[str], set[str]]:
        nonlocal num_calls
        num_calls += 1
        assert answer.wait(DEADLINE_S)
        return set(), set()

    async def body() -> None:
        claimed = {"a": ClaimedJob(Job(**vars(new_job())))}
        keeper = LeaseKeeper(MagicMock(renew=renew), "runner", 0.2, claimed, failures.append)
        keeping = asyncio.ensure_future(keeper.renew_forever())
        async with asyncio.timeout(DEADLINE_S):
            while claimed["a"].stop_reason is None:
                await asyncio.sleep(0.01)
        assert claimed["a"].stop_reason is StopReason.DATABASE_AWAY
        assert num_calls == 1
        assert isinstance(failures[0], TimeoutError)
        answer.set()
        while num_calls < 3:
            await asyncio.sleep(0.01)
        failures.clear()
        claimed["b"] = ClaimedJob(Job(**vars(new_job())))
        await asyncio.sleep(1.0)
        assert (claimed["b"].stop_reason, failures) == (None, [])
        keeping.cancel()

    asyncio.run(body())


def test_an_illegal_transition_is_not_retried(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=20.0)
        wrong = IllegalTransition("video_gen_0", "completed", "failed")
        finish = MagicMock(side_effect=wrong)
        monkeypatch.setattr(service.store, "finish", finish)
        with pytest.raises(IllegalTransition):
            _ = [event async for event in service.stream()]
        finish.assert_called_once()

    serve(body)


def test_a_shutdown_refuses_waiting_callers_and_starts_no_job(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 1})
        cancel = service.store.cancel

        def slow_cancel(job_id: str) -> Any:
            time.sleep(0.5)
            return cancel(job_id)

        monkeypatch.setattr(service.store, "cancel", slow_cancel)
        service.stage.gate.clear()

        async def ask() -> str:
            try:
                async with aclosing(service.stream()) as events:
                    _ = [event async for event in events]
            except ShuttingDown:
                return "shutting down"
            return "served"

        asking = [asyncio.ensure_future(ask()) for _ in range(3)]
        while count_queued(service.store) + len(service.stage.pipelines) < 3 or not service.stage.pipelines:
            await asyncio.sleep(0.02)
        service.stage.gate.set()
        await service.runner.release()
        assert await asyncio.gather(*asking) == ["shutting down"] * 3
        await asyncio.sleep(0.3)
        assert len(service.stage.pipelines) == 1
        await service.runner.release()  # releasing twice is harmless

    serve(body)


def test_releasing_a_runner_cancels_its_attached_jobs(serve: Any) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 0})
        streams = [service.stream() for _ in range(3)]
        asking = [asyncio.ensure_future(anext(stream)) for stream in streams]
        await asyncio.gather(*asking)  # skip their queue positions
        assert count_queued(service.store) == 3
        await service.runner.release()
        assert count_queued(service.store) == 0
        for stream in streams:
            with pytest.raises(ShuttingDown):
                await anext(stream)

    serve(body)


def test_a_queue_lookup_during_a_shutdown_reports_the_shutdown(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 0})
        get, looking, goes_on = service.store.get, threading.Event(), threading.Event()

        def slow_get(*arguments: Any) -> Any:
            looking.set()
            goes_on.wait(DEADLINE_S)
            return get(*arguments)

        monkeypatch.setattr(service.store, "get", slow_get)
        stream = service.stream()
        asking = asyncio.ensure_future(anext(stream))
        while not looking.is_set():
            await asyncio.sleep(0.02)
        await service.runner.release()
        goes_on.set()
        with pytest.raises(ShuttingDown):
            await asking

    serve(body)


def test_an_attached_job_claimed_during_a_shutdown_is_not_started(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        claim, may_claim = service.store.claim, threading.Event()
        claimed, goes_on = threading.Event(), threading.Event()

        def slow_claim(*arguments: Any, **named: Any) -> Job | None:
            job = claim(*arguments, **named) if may_claim.is_set() else None
            if job is not None:
                claimed.set()
                goes_on.wait(DEADLINE_S)
            return job

        monkeypatch.setattr(service.store, "claim", slow_claim)
        stream = service.stream()
        assert isinstance(await anext(stream), QueuePosition)  # and reads on slowly
        (job_id,) = service.runner._callers
        may_claim.set()
        while not claimed.is_set():
            await asyncio.sleep(0.02)
        releasing = asyncio.ensure_future(service.runner.release())
        await asyncio.sleep(0.05)
        goes_on.set()
        await releasing
        assert service.store.get(job_id).state is JobState.CANCELLED
        assert not service.stage.pipelines
        with pytest.raises(ShuttingDown):
            await anext(stream)

    serve(body)


def test_a_job_that_is_created_during_a_shutdown_is_cancelled(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        create, asked, goes_on = service.store.create, threading.Event(), threading.Event()

        def slow_create(*arguments: Any) -> Any:
            asked.set()
            goes_on.wait(DEADLINE_S)
            return create(*arguments)

        monkeypatch.setattr(service.store, "create", slow_create)
        asking = asyncio.ensure_future(anext(service.stream()))
        while not asked.is_set():
            await asyncio.sleep(0.02)
        (job_id,) = service.runner._callers
        await service.runner.release()
        goes_on.set()
        with pytest.raises(ShuttingDown):
            await asking
        await service.until(job_id, JobState.CANCELLED)
        assert not service.stage.pipelines

    serve(body)


def test_jobs_are_counted_in_the_metrics(serve: Any, metrics: RecordingMetrics) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(lease_s=0.5)
        done = await service.submit(IMAGE)
        await service.until(done.job_id, JobState.COMPLETED)
        service.stage.gate.clear()
        job = await service.submit()
        await service.until(job.job_id, JobState.IN_PROGRESS)
        async with asyncio.timeout(DEADLINE_S):
            while len(metrics.values_of("cosmos3_queue_wait_seconds")) < 2:  # incremented just after the claim commits
                await asyncio.sleep(0.02)
        service.die()
        other = make()
        await other.until(job.job_id, JobState.COMPLETED)
        async with asyncio.timeout(DEADLINE_S):
            while len(metrics.values_of("cosmos3_requests")) < 2:
                await asyncio.sleep(0.02)
        assert [labels for _, *labels in metrics.values_of("cosmos3_requests")] == [
            ["text_to_image", "completed"],
            ["text_to_video", "completed"],
        ]
        assert [labels for _, *labels in metrics.values_of("cosmos3_queue_wait_seconds")] == [
            ["jobs", "image", "standard"],
            ["jobs", "video", "standard"],
        ]
        assert metrics.values_of("cosmos3_takeovers") == [(1,)]

    serve(body)


def test_jobs_that_leave_the_queue_are_counted(serve: Any, metrics: RecordingMetrics) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(max_running={Lane.IMAGE: 1, Lane.VIDEO: 0})
        stream = service.stream()
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(DEADLINE_S):
            while not metrics.values:
                await asyncio.sleep(0.02)
        assert [labels for _, *labels in metrics.values_of("cosmos3_requests")] == [["text_to_video", "cancelled"]]

    serve(body)


def test_a_job_released_before_its_first_step_counts_one_wait(serve: Any, metrics: RecordingMetrics) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make()
        first.stage.gate.clear()
        job = await first.submit()
        await first.until(job.job_id, JobState.IN_PROGRESS)
        await first.runner.release()
        await make().until(job.job_id, JobState.COMPLETED)
        assert len(metrics.values_of("cosmos3_queue_wait_seconds")) == 1
        assert metrics.values_of("cosmos3_takeovers") == []

    serve(body)


def test_measured_speed_counts_only_this_runners_steps(
    serve: Any, monkeypatch: pytest.MonkeyPatch, metrics: RecordingMetrics
) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make(checkpoint_period_s=1000.0)
        first.stage.holds_after = 3
        job = await first.submit()
        while first.store.get(job.job_id).step < 3:
            await asyncio.sleep(0.02)
        await first.runner.release()
        counted: list[float] = []
        monkeypatch.setattr(
            runner_module.Throughput, "add", lambda self, work, start_s, end_s: counted.append(work) or 1.0
        )
        second = make()
        await second.until(job.job_id, JobState.COMPLETED)
        while second.runner.num_in_hand:
            await asyncio.sleep(0.02)
        assert counted[0] == pytest.approx(job.work / 4)
        assert len(metrics.values_of("cosmos3_queue_wait_seconds")) == 1, "it has waited once"

    serve(body)


def test_a_viewer_of_a_dead_writers_file_gets_an_error(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        first = make(lease_s=0.5)
        job = await first.submit()
        await first.until(job.job_id, JobState.COMPLETED)
        media_id = first.store.get(job.job_id).media_id
        first.stage.holds_at_end = True
        second_job = await first.submit()
        while not first.store.get(second_job.job_id).media_id:
            await asyncio.sleep(0.02)
        first.die()
        failed: list[str] = []
        other = make()
        monkeypatch.setattr(other.media, "fail", lambda media_id, reason: failed.append(media_id))
        await other.until(second_job.job_id, JobState.COMPLETED)
        assert failed == [media_id]

    serve(body)


def test_a_job_that_is_deleted_while_it_runs_leaves_nothing(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        service.stage.holds_at_end = True
        removed: list[str] = []
        monkeypatch.setattr(service.media, "remove", removed.append)
        job = await service.submit()
        while not service.store.get(job.job_id).media_id:
            await asyncio.sleep(0.02)
        service.store.delete(job.job_id, "")
        service.files.put(job.job_id, SAVED_STATE, b"late")
        async with asyncio.timeout(DEADLINE_S):
            while service.runner.num_in_hand:
                await asyncio.sleep(0.02)
        assert not service.files.exists(job.job_id, SAVED_STATE)
        assert removed == ["0" * 32]

    serve(body)


@pytest.fixture
def hanging_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Saving a state blocks until this event is set."""
    monkeypatch.setattr(recorder_module, "_WRITE_S", 0.1)
    goes_on, put = threading.Event(), JobFiles.put

    def slow_put(files: JobFiles, job_id: str, name: str, data: Any) -> None:
        if name == SAVED_STATE:
            goes_on.wait(DEADLINE_S)
        put(files, job_id, name, data)

    monkeypatch.setattr(JobFiles, "put", slow_put)
    yield goes_on
    goes_on.set()


def test_a_state_saved_too_late_is_not_kept(tmp_path: Path, hanging_files: threading.Event) -> None:
    files = JobFiles(DirectoryObjects(tmp_path))

    async def body() -> None:
        job_id = new_job_id()
        states = SavedStates(files, job_id, 0.0)
        states.save_if_due(1, TensorEnvelope.of_array(np.zeros(4, np.uint8)))
        await asyncio.sleep(0.05)
        writing = states._writing
        await states.finish_write()
        states.save_if_due(2, TensorEnvelope.of_array(np.ones(4, np.uint8)))
        await states.write_last()
        assert states._writing is writing, "two at once would write into one another's file"
        hanging_files.set()
        async with asyncio.timeout(DEADLINE_S):
            while states._writing is not None:
                await asyncio.sleep(0.02)
        assert not files.exists(job_id, SAVED_STATE)

    asyncio.run(body())


@pytest.mark.parametrize("period_s", [0.0, 1000.0], ids=["being written", "written last"])
def test_hanging_files_do_not_delay_a_shutdown(period_s: float, serve: Any, hanging_files: threading.Event) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make(checkpoint_period_s=period_s)
        service.stage.holds_after = 2
        job = await service.submit()
        while service.store.get(job.job_id).step < 2:
            await asyncio.sleep(0.02)
        async with asyncio.timeout(DEADLINE_S / 2):
            await service.runner.release()
        assert service.store.get(job.job_id).state is JobState.QUEUED
        hanging_files.set()

    serve(body)


def test_hanging_files_do_not_delay_a_jobs_end(
    serve: Any, hanging_files: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def body(make: Callable[..., Service]) -> None:
        monkeypatch.setattr(recorder_module, "_WRITE_S", DEADLINE_S)
        service = make()
        job = await service.submit()
        async with asyncio.timeout(DEADLINE_S / 2):
            await service.until(job.job_id, JobState.COMPLETED)
        hanging_files.set()
        async with asyncio.timeout(DEADLINE_S):
            while service.runner.num_in_hand:
                await asyncio.sleep(0.02)
        assert not service.files.exists(job.job_id, SAVED_STATE)

    serve(body)


PICTURE = replace(SMALL, image=np.zeros((32, 32, 3), np.uint8))


def test_a_job_whose_creation_only_seemed_to_fail_is_accepted(serve: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        monkeypatch.setattr(service.store, "create", fail_first_calls(service.store.create, 1, is_done=True))
        job = await service.submit(PICTURE)
        await service.until(job.job_id, JobState.COMPLETED)

    serve(body)


@pytest.mark.parametrize("can_be_asked", [True, False])
def test_files_of_a_job_that_was_not_created_are_removed(
    can_be_asked: bool, serve: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def body(make: Callable[..., Service]) -> None:
        service = make()
        monkeypatch.setattr(service.store, "create", MagicMock(side_effect=AWAY))
        if not can_be_asked:
            monkeypatch.setattr(service.store, "get", MagicMock(side_effect=JobsError("it cannot be asked")))
        with pytest.raises(JobsError, match="the database is away"):
            await service.submit(PICTURE)
        assert len(list((tmp_path / "media").glob("video_gen_*"))) == (0 if can_be_asked else 1)

    serve(body)
