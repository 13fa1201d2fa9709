"""The store of jobs: creation, queries, leases, ends, expiry. The order of the queue is in test_queue.py."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from typing import Any

import pytest

from cosmos3_core.errors import RequestError
from deployments.errors import IdempotencyConflict, IllegalTransition, JobsError, LeaseLost
from deployments.jobs import rows
from deployments.jobs import store as store_module
from deployments.jobs.estimates import Speed
from deployments.jobs.job import Job, JobState, Lane, NewJob, Outcome, Progress, new_job_id
from deployments.jobs.store import JobStore, Lease
from tests.clock import Clock
from tests.jobs.making import (
    COMPLETED,
    LEASE_S,
    LIMITS,
    MODEL,
    claim,
    claim_existing,
    count_queued,
    limits_with,
    list_event_kinds,
    list_runners,
    make_lease,
    new_job,
    read_speed,
    reload,
)
from tests.jobs.racing import race

FAILED = Outcome(JobState.FAILED, error_code="out_of_memory", error_message="too large")
OTHER = Outcome(JobState.CANCELLED, error_code="cancelled", error_message="it was cancelled")

# Accepting


def test_a_job_is_read_back_as_created(store: JobStore, clock: Clock) -> None:
    new = new_job(
        owner="key1",
        request={"prompt": "x", "deep": {"list": [1, 2.5, None, True, "é\u0001"]}},
        inputs=("image.png", "clip.mp4"),
        fingerprint="abc",
        mode="image_to_video",
        prompt="Ein Auto 🚗\nfährt",
        width=1280,
        height=720,
        num_frames=189,
        fps=23.976,
        seed=2**63 - 1,
        num_steps=35,
        media_type="image/png",
        lane=Lane.IMAGE,
        service_class="batch",
        work=1.5e12,
        request_id="req-1",
        idempotency_key="once",
        attached_to="runner",
        previews=3,
        remixed_from=new_job_id(),
        skip_guardrails=True,
        warnings=("a", "b"),
        notes=("c",),
    )
    plain = new_job()
    for field in fields(NewJob):
        if field.name != "model":
            assert getattr(new, field.name) != getattr(plain, field.name), f"{field.name} is not tried"
    for job in (new, plain):
        accepted = store.create(job, LIMITS)
        assert {field.name: getattr(accepted, field.name) for field in fields(NewJob)} == vars(job)
        assert (accepted.state, accepted.stage, accepted.created_s) == (JobState.QUEUED, "queued", clock.now_s)
        assert reload(store, job) == accepted


def test_a_job_is_visible_to_its_owner_only(store: JobStore) -> None:
    job = store.create(new_job(owner="key1"), LIMITS)
    assert store.get(job.job_id) == store.get(job.job_id, "key1") == job
    for action in (store.get, store.cancel, store.delete):
        assert action(job.job_id, "key2") is None
        assert action(job.job_id, "") is None
    assert store.get(job.job_id) == job


def test_an_invalid_id_is_not_found(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    assert store.get(new_job_id()) is None
    monkeypatch.setattr(store_module, "find_job", lambda *_, **__: pytest.fail("it was looked up"))
    unfit: list[Any] = ["", "x", "video_gen_", "video_gen_" + "A" * 32, "video_gen_" + "0" * 32 + "\n", None, 5]
    for job_id in unfit:
        for action in (store.get, store.cancel, store.delete):
            assert action(job_id) is None


def test_unstorable_values_are_refused(store: JobStore) -> None:
    for field in ("prompt", "request_id", "idempotency_key", "owner"):
        for text in ("a\0b", "a\ud800"):
            with pytest.raises(RequestError, match=field):
                store.create(new_job(**{field: text}), LIMITS)
    assert count_queued(store) == 0


def test_an_unknown_class_is_refused(store: JobStore) -> None:
    with pytest.raises(RequestError, match="service_class must be .*got 'standart'.*did you mean standard"):
        store.create(new_job(service_class="standart"), LIMITS)


def test_an_idempotency_key_returns_the_first_job(store: JobStore) -> None:
    first = store.create(new_job(owner="key1", idempotency_key="k"), LIMITS)
    assert store.create(new_job(owner="key1", idempotency_key="k"), LIMITS) == first
    claim_existing(store)
    assert store.create(new_job(owner="key1", idempotency_key="k"), LIMITS) == reload(store, first)
    with pytest.raises(IdempotencyConflict, match="'k' was used for another request"):
        store.create(new_job(owner="key1", idempotency_key="k", fingerprint="g"), LIMITS)
    others = [
        store.create(new_job(owner=owner, idempotency_key=key), LIMITS).job_id
        for owner, key in [("key2", "k"), ("", "k"), ("key1", "l"), ("key1", None), ("key1", None)]
    ]
    assert len({first.job_id, *others}) == 6


def test_an_idempotency_key_returns_its_job_from_a_full_queue(store: JobStore) -> None:
    limits = limits_with(max_queued=1)
    first = store.create(new_job(idempotency_key="k"), limits)
    assert store.create(new_job(idempotency_key="k"), limits) == first


# Listing


def test_jobs_are_listed_in_pages(store: JobStore, clock: Clock) -> None:
    ids = []
    for i in range(7):
        ids.append(store.create(new_job(owner="key1"), LIMITS).job_id)
        store.create(new_job(owner="key2"), LIMITS)
        store.create(new_job(owner="key1", attached_to="runner"), LIMITS)
        clock.advance(i % 3)  # jobs of the same time are ordered by id
    ids.sort(key=lambda job_id: (reload(store, new_job(job_id=job_id)).created_s, job_id))
    for is_ascending, expected in ((True, ids), (False, ids[::-1])):
        seen, after, has_more = [], None, True
        while has_more:
            page = store.list("key1", after=after, limit=3, is_ascending=is_ascending)
            assert page.jobs == tuple(store.get(job.job_id) for job in page.jobs)
            seen += [job.job_id for job in page.jobs]
            after, has_more = seen[-1], page.has_more
        assert seen == expected
    nothing = store.list("key1", after=None, limit=0, is_ascending=True)
    assert (nothing.jobs, nothing.has_more) == ((), True)
    nobodys = store.list("key3", after=None, limit=3, is_ascending=True)
    assert (nobodys.jobs, nobodys.has_more) == ((), False)


def test_a_page_after_an_unknown_id_is_refused(store: JobStore) -> None:
    others = store.create(new_job(owner="key2"), LIMITS)
    for after in ("x", new_job_id(), others.job_id):
        with pytest.raises(RequestError, match="after must be "):
            store.list("key1", after=after, limit=3, is_ascending=True)


# Running


def test_a_claim_starts_a_job(store: JobStore, clock: Clock) -> None:
    new = store.create(new_job(), LIMITS)
    assert claim(store, lane=Lane.IMAGE) is None
    assert claim(store, model="super") is None
    clock.advance(5)
    job = claim_existing(store)
    assert job == replace(
        new,
        state=JobState.IN_PROGRESS,
        runner="runner",
        lease=job.lease,
        lease_until_s=clock.now_s + LEASE_S,
        attempts=1,
        started_s=clock.now_s,
        updated_s=clock.now_s,
        stage="starting",
        last_seq=1,
    )
    assert len(job.lease) == 32
    assert reload(store, job) == job
    assert [(event.kind, event.data, event.at_s) for event in store.find_events({job.job_id: 0})] == [
        ("started", {"attempt": 1}, clock.now_s)
    ]
    assert claim(store) is None


def test_progress_and_events_are_written_together(store: JobStore, clock: Clock) -> None:
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    clock.advance(2)
    steps = [("step", {"step": step, "sigma": 1 - step / 4}) for step in (1, 2)]
    assert store.record(make_lease(job), Progress(step=2, sigma=0.5, step_s=0.25, stage="denoising"), steps) == 3
    expected = replace(job, step=2, sigma=0.5, step_s=0.25, stage="denoising", updated_s=clock.now_s, last_seq=3)
    assert reload(store, job) == expected
    clock.advance(2)
    assert store.record(make_lease(job), Progress(media_id="m"), []) == 3
    assert reload(store, job) == replace(expected, media_id="m", updated_s=clock.now_s)
    events = store.find_events({job.job_id: 1})
    assert [(event.seq, event.kind, event.data) for event in events] == [(2, *steps[0]), (3, *steps[1])]


@pytest.mark.parametrize("outcome", [COMPLETED, FAILED, OTHER], ids=lambda outcome: outcome.state.value)
def test_a_job_ends_once(store: JobStore, clock: Clock, outcome: Outcome) -> None:
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    clock.advance(9)
    ended = store.finish(make_lease(job), outcome, keep_media_s=60)
    assert ended == reload(store, job)
    assert ended == replace(
        job,
        state=outcome.state,
        stage=outcome.state.value,
        updated_s=clock.now_s,
        completed_s=clock.now_s,
        expires_s=clock.now_s + 60 if outcome is COMPLETED else None,
        result=outcome.result,
        error_code=outcome.error_code,
        error_message=outcome.error_message,
        lease="",
        lease_until_s=0.0,
        last_seq=2,
    )
    last = store.find_events({job.job_id: 1})
    data = {} if outcome is COMPLETED else {"code": outcome.error_code, "message": outcome.error_message}
    assert [(event.kind, event.data) for event in last] == [(outcome.state.value, data)]
    clock.advance(2 * LEASE_S)
    assert_out_of_reach(store, job)
    assert claim(store) is None
    assert store.cancel(job.job_id) == ended == reload(store, job)


def assert_out_of_reach(store: JobStore, job: Job) -> None:
    """Check that a lease no longer allows any write to its job."""
    before = store.get(job.job_id), store.find_events({job.job_id: 0})
    for lease in (make_lease(job), Lease(job.job_id, ""), Lease(job.job_id, "x")):
        with pytest.raises(LeaseLost, match=job.job_id):
            store.record(lease, Progress(step=1), [("step", {})])
        with pytest.raises(LeaseLost):
            store.finish(lease, COMPLETED, keep_media_s=1)
        with pytest.raises(LeaseLost):
            store.give_back(lease)
        assert store.renew("runner", [lease], LEASE_S) == ({job.job_id}, set())
    assert (store.get(job.job_id), store.find_events({job.job_id: 0})) == before


def test_a_taken_over_job_is_out_of_its_first_runners_reach(store: JobStore, clock: Clock) -> None:
    store.create(new_job(), LIMITS)
    first = claim_existing(store, "runner1")
    clock.advance(LEASE_S + 1)
    # No runner has taken it over yet, so it continues.
    assert store.renew("runner1", [make_lease(first)], LEASE_S) == (set(), set())
    assert claim(store, "runner2") is None
    clock.advance(LEASE_S + 1)
    second = claim_existing(store, "runner2")
    assert second.job_id == first.job_id
    assert (second.attempts, second.runner) == (2, "runner2")
    assert second.lease != first.lease
    assert_out_of_reach(store, first)
    assert store.record(make_lease(second), Progress(step=1), []) == 2
    assert list_event_kinds(store, first) == ["started", "started"]


def test_renewing_a_lease_reports_a_cancellation(store: JobStore, clock: Clock) -> None:
    jobs = [store.create(new_job(), LIMITS) for _ in range(3)]
    running = {job.job_id: job for job in (claim_existing(store) for _ in range(3))}
    store.cancel(jobs[1].job_id)
    store.delete(jobs[2].job_id)
    clock.advance(LEASE_S - 1)
    leases = [make_lease(job) for job in running.values()]
    assert store.renew("runner", leases, LEASE_S) == ({jobs[2].job_id}, {jobs[1].job_id})
    assert reload(store, jobs[0]).lease_until_s == clock.now_s + LEASE_S
    clock.advance(LEASE_S - 1)
    assert claim(store, "runner2") is None
    assert store.renew("runner", [], LEASE_S) == (set(), set())


def test_the_number_of_events_is_bounded_but_the_end_is_always_recorded(
    store: JobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rows, "MAX_EVENTS", 3)
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    store.record(make_lease(job), Progress(), [("step", {}), ("step", {})])
    with pytest.raises(JobsError, match="has 3 events; at most 3 are kept"):
        store.record(make_lease(job), Progress(step=4), [("step", {})])
    assert reload(store, job).step == 0, "what could not be told of has not happened"
    store.finish(make_lease(job), COMPLETED, keep_media_s=1)
    assert list_event_kinds(store, job) == ["started", "step", "step", "completed"]


def test_an_event_that_is_no_json_writes_nothing(store: JobStore) -> None:
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    with pytest.raises((JobsError, ValueError), match="Out of range float values are not JSON compliant"):
        store.record(make_lease(job), Progress(step=1), [("step", {"sigma": math.nan})])
    assert reload(store, job) == job


def test_a_released_job_can_be_claimed_again(store: JobStore, clock: Clock) -> None:
    new = store.create(new_job(), LIMITS)
    job = claim_existing(store)
    clock.advance(1)
    store.record(make_lease(job), Progress(step=2, sigma=0.5), [("step", {})])
    store.give_back(make_lease(job))
    back = reload(store, job)
    assert (back.state, back.attempts, back.runner, back.lease, back.stage) == (JobState.QUEUED, 0, "", "", "queued")
    assert (back.order, back.step, back.lease_until_s) == (new.order, 2, 0)
    assert_out_of_reach(store, job)
    again = claim_existing(store, "runner2")
    assert (again.job_id, again.attempts) == (job.job_id, 1)
    assert list_event_kinds(store, job) == ["started", "step", "started"]


def test_a_cancelled_job_ends_when_released(store: JobStore) -> None:
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    store.cancel(job.job_id)
    store.give_back(make_lease(job))
    assert reload(store, job).state is JobState.CANCELLED
    assert list_event_kinds(store, job) == ["started", "cancelled"]


# Ending


def test_a_queued_job_is_cancelled_at_once(store: JobStore, clock: Clock) -> None:
    job = store.create(new_job(), LIMITS)
    clock.advance(1)
    cancelled = store.cancel(job.job_id)
    assert cancelled == reload(store, job)
    assert cancelled.state is JobState.CANCELLED
    assert (cancelled.error_code, cancelled.completed_s, cancelled.expires_s) == ("cancelled", clock.now_s, None)
    assert list_event_kinds(store, job) == ["cancelled"]
    assert claim(store) is None


def test_a_running_job_is_cancelled_by_its_runner(store: JobStore) -> None:
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    cancelled = store.cancel(job.job_id)
    assert cancelled == replace(job, is_cancelling=True) == reload(store, job) == store.cancel(job.job_id)
    ended = store.finish(make_lease(job), OTHER, keep_media_s=1)
    assert (ended.state, ended.is_cancelling) == (JobState.CANCELLED, False)


@pytest.mark.parametrize("is_running", [False, True])
def test_deleting_a_job_deletes_its_events(store: JobStore, is_running: bool) -> None:
    job = store.create(new_job(owner="key1", idempotency_key="k"), LIMITS)
    if is_running:
        job = claim_existing(store)
        store.record(make_lease(job), Progress(media_id="m"), [("step", {})])
    assert store.delete(job.job_id, "key1") == (replace(job, media_id="m", last_seq=2) if is_running else job)
    assert store.get(job.job_id) is None
    assert store.delete(job.job_id) is None
    assert store.find_events({job.job_id: 0}) == []
    with store._database.reading() as connection:
        assert connection.exec_driver_sql("SELECT count(*) FROM job_events").scalar_one() == 0
    if is_running:
        assert_out_of_reach(store, job)
    assert claim(store) is None
    assert store.create(new_job(owner="key1", idempotency_key="k", fingerprint="g"), LIMITS).job_id != job.job_id


def test_forbidden_transitions_are_refused(store: JobStore) -> None:
    job = store.create(new_job(), LIMITS)
    with store._database.writing() as connection, pytest.raises(IllegalTransition, match="cannot become completed"):
        rows.end_job(connection, job, COMPLETED, 0.0)
    assert reload(store, job) == job


def test_a_change_of_a_job_that_has_changed_meanwhile_is_refused(store: JobStore) -> None:
    job = store.create(new_job(), LIMITS)
    claim_existing(store)
    with pytest.raises(LeaseLost), store._database.writing() as connection:
        rows.end_job(connection, job, OTHER, 0.0)
    assert list_event_kinds(store, job) == ["started"]


# Events


def test_events_of_many_jobs_are_ordered_and_paged(store: JobStore) -> None:
    jobs = [store.create(new_job(), LIMITS) for _ in range(13)]
    for job in jobs:
        store.cancel(job.job_id)
    cursors = {job.job_id: 0 for job in jobs}
    many = cursors | {new_job_id(): 0 for _ in range(2000)}  # more than the largest number of followed jobs
    assert store.find_events(many) == store.find_events(cursors)
    assert {event.job_id for event in store.find_events(cursors)} == cursors.keys()
    assert len(store.find_events(cursors, limit=7)) == 7
    assert len(store.find_events(cursors, limit=10)) == 10
    assert store.find_events({job.job_id: 1 for job in jobs}) == []
    assert store.find_events({}) == []
    running = [store.create(new_job(), LIMITS) for _ in range(2)]
    for job in (claim_existing(store), claim_existing(store)):
        store.record(make_lease(job), Progress(), [("step", {"i": i}) for i in range(4)])
    events = store.find_events({running[0].job_id: 3, running[1].job_id: 4})
    assert sorted((event.job_id, event.seq) for event in events) == sorted(
        [(running[0].job_id, 4), (running[0].job_id, 5), (running[1].job_id, 5)]
    )
    of_first = [event.seq for event in events if event.job_id == running[0].job_id]
    assert of_first == [4, 5]


# Forgetting


def test_old_jobs_are_forgotten(store: JobStore, clock: Clock) -> None:
    old = [store.create(new_job(idempotency_key=f"{i}"), LIMITS) for i in range(45)]  # several transactions
    ended = [store.finish(make_lease(claim_existing(store)), COMPLETED, keep_media_s=1) for _ in old]
    clock.advance(50)
    young = store.create(new_job(), LIMITS)
    store.cancel(young.job_id)
    waits, runs = store.create(new_job(), LIMITS), store.create(new_job(), LIMITS)
    running = claim_existing(store, lease_s=1000)
    clock.advance(51)
    assert running.job_id in (waits.job_id, runs.job_id)
    swept = store.sweep(100)
    assert sorted(swept, key=lambda job: job.job_id) == sorted(ended, key=lambda job: job.job_id)
    assert store.sweep(100) == []
    assert all(store.get(job.job_id) is None for job in old)
    assert store.create(new_job(idempotency_key="0", fingerprint="g"), LIMITS).job_id != old[0].job_id
    clock.advance(1000)
    assert [job.job_id for job in store.sweep(100)] == [young.job_id]
    assert reload(store, waits).job_id == waits.job_id
    assert reload(store, runs).job_id == runs.job_id


def test_beyond_the_bound_the_longest_ended_jobs_are_forgotten(store: JobStore, clock: Clock) -> None:
    jobs = [store.create(new_job(), LIMITS) for _ in range(5)]
    for job in (jobs[i] for i in (3, 1, 4, 0)):
        clock.advance(1)
        store.cancel(job.job_id)
    assert store.sweep(1e6, 4) == []
    assert [job.job_id for job in store.sweep(1e6, 2)] == [jobs[3].job_id, jobs[1].job_id]
    assert [job.job_id for job in store.sweep(1e6, 0)] == [jobs[4].job_id, jobs[0].job_id]
    assert reload(store, jobs[2]).state is JobState.QUEUED


def test_silent_runners_are_forgotten(store: JobStore, clock: Clock) -> None:
    claim(store, "runner1")
    clock.advance(60)
    claim(store, "runner2")
    claim(store, "runner3", model="super")
    assert list_runners(store, silent_s=100) == ("runner1", "runner2")
    assert list_runners(store, silent_s=50) == ("runner2",)
    store.renew("runner1", [], LEASE_S)
    assert list_runners(store, silent_s=50) == ("runner1", "runner2")
    clock.advance(60)
    claim(store, "runner2")
    store.sweep(50)
    assert list_runners(store, silent_s=1e9) == ("runner2",)


# Speed


def test_measured_speed_is_averaged_and_stored(store: JobStore, jobs_url: str) -> None:
    assert read_speed(store, Lane.VIDEO) is None
    store.note_speed(MODEL, Lane.VIDEO, Speed(100.0))
    store.note_speed(MODEL, Lane.IMAGE, Speed(7.0))
    store.note_speed("super", Lane.VIDEO, Speed(3.0))
    assert read_speed(store, Lane.VIDEO) == Speed(100.0)
    store.note_speed(MODEL, Lane.VIDEO, Speed(200.0, 1000.0))
    other = JobStore.open(jobs_url)
    assert read_speed(other, Lane.VIDEO) == Speed(pytest.approx(130.0), 1000.0)
    store.note_speed(MODEL, Lane.VIDEO, Speed(130.0))
    assert read_speed(other, Lane.VIDEO) == Speed(pytest.approx(130.0), 1000.0), "of a job without a file"
    assert read_speed(other, Lane.IMAGE) == Speed(7.0)
    other.close()


# Durability


def test_another_process_finds_everything(store: JobStore, jobs_url: str) -> None:
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    store.record(make_lease(job), Progress(step=1, sigma=0.1), [("step", {"sigma": 0.1})])
    store.close()
    other = JobStore.open(jobs_url)
    assert other.get(job.job_id) == reload(store, job)
    assert other.find_events({job.job_id: 0}) == store.find_events({job.job_id: 0})
    other.close()


def test_an_accepted_job_survives_sigkill(store: JobStore, jobs_url: str) -> None:
    ids = race("die", jobs_url, 0, 2)
    assert len(set(ids)) == 2
    for job_id in ids:
        accepted = store.get(job_id)
        assert accepted is not None
        assert accepted.state is JobState.QUEUED


def test_jobs_with_unexpired_files_are_forgotten_last(store: JobStore, clock: Any) -> None:
    """A cancelled job has no file to promise, so it is forgotten first."""
    for _ in range(3):
        store.create(new_job(), LIMITS)
        store.finish(make_lease(claim_existing(store)), COMPLETED, keep_media_s=1000.0)
    cancelled = store.create(new_job(), LIMITS)
    store.cancel(cancelled.job_id)
    assert [job.job_id for job in store.sweep(1e6, max_kept=1)] == [cancelled.job_id]
    clock.now_s += 1001
    assert len(store.sweep(1e6, max_kept=1)) == 2


def test_jobs_of_a_model_that_is_no_longer_served_fail(store: JobStore, clock: Any) -> None:
    job = store.create(new_job(), LIMITS)
    assert store.fail_unserved(1000.0) == 0
    clock.now_s += 1001
    assert store.fail_unserved(1000.0) == 1
    failed = store.get(job.job_id)
    assert failed is not None
    assert (failed.state, failed.error_code) == (JobState.FAILED, "not_served")
    assert "has not been served for" in failed.error_message
