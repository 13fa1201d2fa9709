"""The queue: bounds, Retry-After, order, claims, and jobs of dead runners."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import sqlalchemy

from cluster.errors import OverloadedError
from deployments.config import JobsConfig
from deployments.jobs import estimates, queue
from deployments.jobs.estimates import (
    MAX_RETRY_S,
    MIN_RETRY_S,
    UNKNOWN_RETRY_S,
    ClassLoad,
    QueueBound,
    RetryEstimator,
    Speed,
    estimate_freed_s,
)
from deployments.jobs.job import Job, JobState, Lane, Outcome, Progress
from deployments.jobs.keys import KeyLimits, NewKey
from deployments.jobs.queue import ClaimRequest
from deployments.jobs.silence import SilenceWatch
from deployments.jobs.store import JobStore
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
    reload,
)
from tests.jobs.racing import race
from tests.virtual_time import set_clocks


def enqueue(store: JobStore, num: int = 1, **changes: Any) -> list[Job]:
    """Create queued jobs."""
    return [store.create(new_job(**changes), LIMITS) for _ in range(num)]


def claim_all(store: JobStore, **how: Any) -> list[Job]:
    """Claim all queued jobs; return them in that order."""
    jobs = []
    while (job := claim(store, **how)) is not None:
        jobs.append(job)
    return jobs


def create_refused(
    store: JobStore, key_limits: KeyLimits | None = None, limits: JobsConfig = LIMITS, **changes: Any
) -> OverloadedError:
    """Create a job that the queue refuses; return the error."""
    with pytest.raises(OverloadedError) as caught:
        store.create(new_job(**changes), limits, key_limits)
    return caught.value


# Bounds


def test_the_number_of_queued_jobs_is_bounded(store: JobStore) -> None:
    limits = limits_with(max_queued=3)
    for owner, name in [("", "standard"), ("key1", "batch"), ("key2", "standard")]:
        store.create(new_job(owner=owner, service_class=name), limits)
    error = create_refused(store, limits=limits, owner="key3")
    assert (error.what, error.limit) == ("videos that wait", 3)
    assert count_queued(store) == 3
    store.create(new_job(lane=Lane.IMAGE), limits)  # the other lane has its own bound
    store.create(new_job(model="super"), limits)  # another app's model in the same database
    claim_existing(store)
    store.create(new_job(), limits)
    create_refused(store, limits=limits)
    store.cancel(one_that_waits(store))
    store.create(new_job(), limits)


def one_that_waits(store: JobStore) -> str:
    """Queue a video; return its id."""
    page = store.list("", after=None, limit=100, is_ascending=True)
    jobs = (job for job in page.jobs if job.state is JobState.QUEUED and job.model == MODEL)
    return next(job.job_id for job in jobs if job.lane is Lane.VIDEO)


def test_the_number_of_a_keys_queued_jobs_is_bounded(store: JobStore) -> None:
    limits = limits_with(max_queued_per_key=2)
    for _ in range(2):
        store.create(new_job(owner="key1"), limits)
    error = create_refused(store, limits=limits, owner="key1")
    assert (error.what, error.limit) == ("videos of this API key that wait", 2)
    store.create(new_job(owner="key2"), limits)
    for _ in range(4):  # no such bound without keys
        store.create(new_job(), limits)
    store.create(new_job(owner="key1"), limits, KeyLimits(max_queued=3))
    assert create_refused(store, KeyLimits(max_queued=3), limits, owner="key1").limit == 3
    assert create_refused(store, KeyLimits(max_queued=1), limits, owner="key2").limit == 1
    assert create_refused(store, KeyLimits(), limits, owner="key1").limit == 2


# Retry-After


def simulate_wait(running: list[float], queued: list[float], num_places: int) -> float:
    """Simulate the waiting time in small steps."""
    left, waits, elapsed_s, step_s = list(running), list(queued), 0.0, 1e-4
    while num_places > 0:
        elapsed_s += step_s
        left = [seconds - step_s / len(left) for seconds in left]
        for i, seconds in enumerate(left):
            if seconds <= 0 and num_places > 0:
                num_places -= 1
                left[i] = waits.pop(0)
    return elapsed_s


@pytest.mark.parametrize("seed", range(3))
def test_place_times_follow_from_jobs_that_share_the_speed(seed: int) -> None:
    dice = random.Random(seed)
    running = [dice.uniform(0.05, 0.5) for _ in range(dice.randint(1, 3))]
    queued = [dice.uniform(0.05, 0.5) for _ in range(4)]
    for num_places in (1, 2, 4):
        expected_s = simulate_wait(running, queued, num_places)
        assert estimate_freed_s(running, queued, num_places) == pytest.approx(expected_s, abs=0.01)


def test_retry_after_of_a_full_queue_is_the_end_of_the_next_job(store: JobStore) -> None:
    limits = limits_with(max_queued=2)
    for work in (600.0, 400.0):
        store.create(new_job(work=work), limits)
    assert create_refused(store, limits=limits).retry_after_s == UNKNOWN_RETRY_S, "nothing runs"
    jobs = [claim_existing(store), claim_existing(store)]
    enqueue(store, work=1000.0)
    enqueue(store, work=500.0)
    assert create_refused(store, limits=limits).retry_after_s == UNKNOWN_RETRY_S, "nothing was measured"
    store.note_speed(MODEL, Lane.VIDEO, Speed(10.0))
    # Each gets 5 of 10 a second.
    assert create_refused(store, limits=limits).retry_after_s == pytest.approx(400 / 5)
    larger = max(jobs, key=lambda job: job.work)
    store.record(make_lease(larger), Progress(step=3), [])
    assert create_refused(store, limits=limits).retry_after_s == pytest.approx(600 / 4 / 5)
    claim(store, "runner2", lane=Lane.IMAGE)
    assert create_refused(store, limits=limits).retry_after_s == pytest.approx(600 / 4 / 10), "two runners"
    store.note_speed(MODEL, Lane.IMAGE, Speed(1.0))
    assert create_refused(store, limits=limits).retry_after_s == pytest.approx(600 / 4 / 10), (
        "the other lane is another's"
    )


def test_refused_callers_get_staggered_retry_times(store: JobStore) -> None:
    """Callers with different keys compete for the same places."""
    retry_estimator, limits = RetryEstimator(), limits_with(max_queued=1)
    store.create(new_job(work=10.0), limits)
    claim_existing(store)
    store.create(new_job(work=10.0), limits)
    store.note_speed(MODEL, Lane.VIDEO, Speed(1.0))
    waits_s = []
    for owner in ("a", "b", "c", "c", "d", "e", "f"):
        with pytest.raises(OverloadedError) as refused:
            store.create(new_job(owner=owner), limits, retry_estimator=retry_estimator)
        waits_s.append(refused.value.retry_after_s)
    assert waits_s[:5] == pytest.approx([10, 20, 30, 40, 50])
    assert waits_s[5:] == pytest.approx([50, 50]), "who does not wait as told makes it no worse for the others"
    with pytest.raises(OverloadedError) as refused:
        store.create(new_job(owner="a"), limits_with(max_queued_per_key=0), retry_estimator=retry_estimator)
    assert refused.value.retry_after_s < 20, "a key's own bound is another one"


def test_the_slower_of_denoising_and_decoding_sets_the_pace(store: JobStore) -> None:
    limits = limits_with(max_queued=2)
    size = {"num_frames": 10, "width": 100, "height": 100}  # 100,000 pixels
    for _ in range(2):
        store.create(new_job(work=10.0, **size), limits)
    claim_existing(store)
    store.create(new_job(work=10.0, **size), limits)
    store.note_speed(MODEL, Lane.VIDEO, Speed(10.0, 100_000.0 / 4))
    assert create_refused(store, limits=limits).retry_after_s == pytest.approx(4.0), "decoding takes 4 s, the rest 1"
    waits = store.find_positions(store.list("", after=None, limit=9, is_ascending=True).jobs)
    assert sorted(it.eta_s or 0.0 for it in waits.values()) == pytest.approx([8.0, 12.0])


class Waiting:
    """Callers of a full queue of one place, on a clock of their own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 1000.0
        set_clocks(monkeypatch, monotonic_s=lambda: self.now_s)
        self.estimator = RetryEstimator()
        self.bound = QueueBound(Lane.VIDEO, None, 1)

    def reject(self, caller: str) -> float:
        return self.estimator.promise(self.bound, caller, lambda num_before: 10.0 * (num_before + 1))

    def count_kept(self, caller: str) -> int:
        return self.estimator.count_kept(self.bound, caller)


def test_a_place_is_kept_for_a_caller_who_comes_back_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch)
    assert [waiting.reject(caller) for caller in "ab"] == [10.0, 20.0]
    waiting.now_s += 9.0
    assert [waiting.count_kept(caller) for caller in "abc"] == [0, 0, 0], "no place is free yet"
    waiting.now_s += 1.5
    assert [waiting.count_kept(caller) for caller in "abc"] == [0, 1, 1]
    waiting.estimator.fulfil("a")
    assert waiting.count_kept("c") == 0
    waiting.now_s += 10.0
    assert [waiting.count_kept(caller) for caller in "bc"] == [0, 1]
    waiting.now_s += 6.0
    assert waiting.count_kept("c") == 0, "b has not come"


def test_callers_with_the_same_request_each_have_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch)
    assert [waiting.reject("a") for _ in range(3)] == [10.0, 20.0, 30.0]
    for _ in range(3):
        waiting.now_s += 10.0
        assert (waiting.count_kept("a"), waiting.count_kept("other")) == (0, 1)
        waiting.estimator.fulfil("a")
        assert waiting.count_kept("other") == 0


def test_a_caller_whose_place_was_not_free_after_all_is_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = Waiting(monkeypatch)
    waiting.reject("a")
    waiting.now_s += 10.0
    assert waiting.reject("a") == 10.0
    assert waiting.count_kept("other") == 0


def test_a_kept_place_is_not_given_to_another(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting, limits = Waiting(monkeypatch), limits_with(max_queued=1)
    store.note_speed(MODEL, Lane.VIDEO, Speed(1.0))
    store.create(new_job(work=10.0), limits)
    claim_existing(store)
    store.create(new_job(work=10.0), limits)

    def create(fingerprint: str) -> Job:
        return store.create(new_job(fingerprint=fingerprint), limits, retry_estimator=waiting.estimator)

    with pytest.raises(OverloadedError):
        create("first")
    waiting.now_s += 10.0
    claim_existing(store, "runner2")  # the place is free
    with pytest.raises(OverloadedError):
        create("newcomer")
    assert create("first").fingerprint == "first"


def test_retry_after_of_a_key_is_the_start_of_its_next_job(store: JobStore) -> None:
    store.note_speed(MODEL, Lane.VIDEO, Speed(10.0))
    store.create(new_job(work=100.0), LIMITS)
    claim_existing(store)
    for owner, work in [("key1", 200.0), ("key2", 300.0)]:
        store.create(new_job(owner=owner, work=work), LIMITS)
    # The running job, then key1's.
    assert create_refused(store, KeyLimits(max_queued=1), owner="key1").retry_after_s == pytest.approx(10)
    assert create_refused(store, KeyLimits(max_queued=1), owner="key2").retry_after_s == pytest.approx(10 + 20)


def test_retry_after_is_bounded(store: JobStore) -> None:
    limits = limits_with(max_queued=1)
    store.create(new_job(work=1.0), limits)
    claim_existing(store)
    store.create(new_job(work=1.0), limits)
    store.note_speed(MODEL, Lane.VIDEO, Speed(1000.0))
    assert create_refused(store, limits=limits).retry_after_s == MIN_RETRY_S
    for _ in range(60):
        store.note_speed(MODEL, Lane.VIDEO, Speed(1e-9))
    assert create_refused(store, limits=limits).retry_after_s == MAX_RETRY_S


def test_silent_runners_do_not_count(store: JobStore, clock: Clock) -> None:
    limits = limits_with(max_queued=1)
    claim(store, "dead")
    clock.advance(estimates._ALIVE_S + 1)
    store.create(new_job(work=100.0), limits)
    claim_existing(store)
    store.create(new_job(), limits)
    store.note_speed(MODEL, Lane.VIDEO, Speed(10.0))
    assert create_refused(store, limits=limits).retry_after_s == pytest.approx(10)


# Order


def count_shares(jobs: list[Job], of: str) -> Mapping[str, int]:
    return Counter(getattr(job, of) for job in jobs)


def test_classes_share_by_weight(store: JobStore) -> None:
    for name in ("batch", "standard", "interactive"):
        enqueue(store, 16, service_class=name)
    order = claim_all(store)
    for begin in (0, 13):  # two whole rounds of 8 + 4 + 1
        assert count_shares(order[begin : begin + 13], "service_class") == {"interactive": 8, "standard": 4, "batch": 1}
    assert len(order) == 48


def test_shares_count_work_not_jobs(store: JobStore) -> None:
    enqueue(store, 30, service_class="interactive", work=8.0)
    enqueue(store, 60, service_class="standard", work=1.0)
    begun = Counter[str]()
    for job in claim_all(store):
        begun[job.service_class] += int(job.work)
        if begun["interactive"] == 80:
            break
    assert begun["standard"] == pytest.approx(40, abs=8)


def test_one_owner_with_many_jobs_does_not_starve_another(store: JobStore) -> None:
    enqueue(store, 60, owner="key1")
    enqueue(store, 10, owner="key2")
    order = claim_all(store)
    assert count_shares(order[:20], "owner") == {"key1": 10, "key2": 10}


def test_jobs_of_one_owner_keep_their_order(store: JobStore) -> None:
    jobs = [enqueue(store, work=work)[0].job_id for work in (9.0, 1.0, 5.0, 1.0)]
    assert [job.job_id for job in claim_all(store)] == jobs


def test_an_idle_owner_gains_no_credit(store: JobStore) -> None:
    enqueue(store, 40, owner="key1")
    for _ in range(20):
        claim_existing(store)
    enqueue(store, 20, owner="key2")  # idle while key1 had twenty
    order = claim_all(store)
    assert count_shares(order[:20], "owner") == {"key1": 10, "key2": 10}


def test_a_cancelled_job_costs_its_owner_nothing(store: JobStore) -> None:
    for job in enqueue(store, 20, owner="key1"):
        store.cancel(job.job_id)
    for job in enqueue(store, 20, owner="key1"):
        store.delete(job.job_id)
    enqueue(store, 2, owner="key2")
    enqueue(store, 2, owner="key1")
    assert count_shares(claim_all(store)[:2], "owner") == {"key1": 1, "key2": 1}


def test_lanes_do_not_wait_for_each_other(store: JobStore) -> None:
    enqueue(store, 5, work=1000.0)
    pictures = enqueue(store, 2, lane=Lane.IMAGE, work=1.0)
    assert [job.order for job in pictures] == [0.25, 0.5]
    assert [job.job_id for job in claim_all(store, lane=Lane.IMAGE)] == [job.job_id for job in pictures]


def test_a_released_job_is_claimed_next(store: JobStore) -> None:
    enqueue(store, 4)
    first = claim_existing(store)
    claim_existing(store)
    store.give_back(make_lease(first))
    assert claim_existing(store).job_id == first.job_id
    last = enqueue(store)[0]
    assert claim_all(store)[-1].job_id == last.job_id, "the order goes on where it was"


# Claims


def test_an_attached_job_goes_to_its_own_runner(store: JobStore) -> None:
    own = enqueue(store, attached_to="runner1")[0]
    free = enqueue(store)[0]
    assert claim_existing(store, "runner2").job_id == free.job_id
    assert claim(store, "runner2") is None
    assert claim_existing(store, "runner1").job_id == own.job_id


def test_a_draining_runner_claims_only_its_attached_jobs(store: JobStore, clock: Clock) -> None:
    enqueue(store)
    died = claim_existing(store, "dead")
    free, own = enqueue(store)[0], enqueue(store, attached_to="runner1")[0]
    clock.advance(LEASE_S + 1)
    store.renew("runner1", [], LEASE_S)
    assert claim_existing(store, "runner1", only_attached=True).job_id == own.job_id
    assert claim(store, "runner1", only_attached=True) is None
    assert [job.job_id for job in claim_all(store)] == [died.job_id, free.job_id]


def test_the_number_of_a_keys_running_jobs_is_bounded(store: JobStore) -> None:
    limits = limits_with(max_running_per_key=2)
    for owner in ("key1", "key2", ""):
        enqueue(store, 4, owner=owner)
    order = claim_all(store, limits=limits)
    assert count_shares(order, "owner") == {"key1": 2, "key2": 2, "": 4}
    assert claim(store, lane=Lane.IMAGE, limits=limits) is None
    (image,) = enqueue(store, lane=Lane.IMAGE, owner="key1")
    taken = claim(store, lane=Lane.IMAGE, limits=limits)
    assert taken is not None
    assert taken.job_id == image.job_id, "the other lane has a bound of its own"
    store.finish(make_lease(next(job for job in order if job.owner == "key1")), COMPLETED, keep_media_s=1)
    assert [job.owner for job in claim_all(store, limits=limits)] == ["key1"]


def test_a_keys_own_bound_applies(store: JobStore) -> None:
    few, _ = store.keys.create(NewKey(name="few", limits=KeyLimits(max_running=1)))
    many, _ = store.keys.create(NewKey(name="many", limits=KeyLimits(max_running=3)))
    any_, _ = store.keys.create(NewKey(name="any"))
    owners = [key.key_id for key in (few, many, any_)]
    for owner in owners:
        enqueue(store, 4, owner=owner)
    limited = claim_all(store, limits=limits_with(max_running_per_key=2))
    assert [count_shares(limited, "owner")[owner] for owner in owners] == [1, 3, 2]
    assert [job.owner for job in claim_all(store)] == [any_.key_id] * 2


# Dead runners


def test_a_dead_runners_job_is_claimed_first(store: JobStore, clock: Clock) -> None:
    job = enqueue(store)[0]
    claim_existing(store, "runner1")
    enqueue(store)
    clock.advance(LEASE_S)
    assert claim_existing(store, "runner2").job_id != job.job_id, "the lease is valid"
    clock.advance(0.1)
    assert (claim_existing(store, "runner2").job_id, reload(store, job).attempts) == (job.job_id, 2)


def test_a_job_fails_after_its_last_attempt_if_others_succeed(store: JobStore, clock: Clock) -> None:
    job, succeeds, other = enqueue(store, 3)
    for attempt in (1, 2):
        assert claim_existing(store, f"runner{attempt}", max_attempts=2).job_id == job.job_id
        if attempt == 2:
            assert claim_existing(store, "runner2", max_attempts=2).job_id == succeeds.job_id
            store.finish(make_lease(reload(store, succeeds)), Outcome(JobState.COMPLETED), keep_media_s=1e6)
        clock.advance(LEASE_S + 1)
    assert claim_existing(store, "runner3", max_attempts=2).job_id == other.job_id
    failed = reload(store, job)
    assert (failed.state, failed.error_code, failed.attempts) == (JobState.FAILED, "runner_died", 2)
    assert "died 2 times" in failed.error_message
    assert list_event_kinds(store, job) == ["started", "started", "failed"]


def test_a_job_whose_runners_die_waits_while_no_other_succeeds(store: JobStore, clock: Clock) -> None:
    (job,) = enqueue(store, 1)
    for attempt in range(6):
        assert claim_existing(store, f"runner{attempt}", max_attempts=2).job_id == job.job_id
        clock.advance(LEASE_S + 1)
        if reload(store, job).attempts == 2:
            assert claim(store, f"runner{attempt}+", max_attempts=2) is None
            waits = reload(store, job)
            assert (waits.state, waits.fault, waits.attempts) == (JobState.QUEUED, "runner_died", 1)
            assert waits.retry_at_s == clock() + 2.0 ** (waits.num_faults - 1)
            clock.advance(2.0 ** (waits.num_faults - 1))


@pytest.mark.parametrize("jump_s", [3600.0, -3600.0, LEASE_S + 1])
def test_a_clock_that_jumps_takes_no_job_from_a_live_runner(jump_s: float, store: JobStore, clock: Clock) -> None:
    """It goes on renewing its leases; a jump forward is what a suspended laptop meets, too."""
    running = claim_new(store, attached_to="runner1")
    waiting = enqueue(store, attached_to="runner1")[0]
    request = ClaimRequest("runner2", MODEL, Lane.VIDEO, LIMITS)
    now_s = 0.0
    store._watch = SilenceWatch(lambda: now_s)
    clock.advance(jump_s)
    for _ in range(int(2 * LEASE_S)):
        assert store.claim(request) is None
        now_s += 0.5
        clock.advance(0.5)
        assert store.renew("runner1", [make_lease(running)], LEASE_S) == (set(), set())
    assert [reload(store, job).state for job in (running, waiting)] == [JobState.IN_PROGRESS, JobState.QUEUED]


@pytest.mark.parametrize(("jump_s", "after_s"), [(3600.0, 3.0), (-3600.0, LEASE_S)])
def test_a_dead_runners_job_is_claimed_however_the_clock_jumps(
    jump_s: float, after_s: float, store: JobStore, clock: Clock
) -> None:
    job = claim_new(store)
    now_s = 0.0
    store._watch = SilenceWatch(lambda: now_s)
    clock.advance(jump_s)
    while (claimed := store.claim(ClaimRequest("runner2", MODEL, Lane.VIDEO, LIMITS))) is None:
        now_s += 0.5
        clock.advance(0.5)
    assert (claimed.job_id, now_s) == (job.job_id, after_s)


def claim_new(store: JobStore, **changes: Any) -> Job:
    """Enqueue a job, and claim it for its runner."""
    enqueue(store, **changes)
    return claim_existing(store, "runner1")


def test_a_cancelled_job_of_a_dead_runner_ends(store: JobStore, clock: Clock) -> None:
    job = enqueue(store)[0]
    claim_existing(store)
    store.cancel(job.job_id)
    clock.advance(LEASE_S + 1)
    assert claim(store, "runner2") is None
    assert reload(store, job).state is JobState.CANCELLED


def test_an_attached_job_ends_with_its_runner(store: JobStore, clock: Clock) -> None:
    runs = enqueue(store, attached_to="runner1")[0]
    claim_existing(store, "runner1")
    waits = enqueue(store, attached_to="runner1")[0]
    clock.advance(LEASE_S)
    assert claim(store, "runner2") is None
    assert reload(store, waits).state is JobState.QUEUED
    clock.advance(0.1)
    assert claim(store, "runner2") is None
    for job in (runs, waits):
        ended = reload(store, job)
        assert (ended.state, ended.error_code) == (JobState.FAILED, "abandoned")
        assert "silent for 20 s; send it again" in ended.error_message
        assert list_event_kinds(store, job)[-1] == "failed"


@pytest.mark.parametrize("sign", ["renew", "claim"])
def test_an_attached_job_waits_while_its_runner_is_alive(store: JobStore, clock: Clock, sign: str) -> None:
    claim(store, "runner1")
    job = enqueue(store, attached_to="runner1")[0]
    for _ in range(4):
        clock.advance(LEASE_S / 2)
        if sign == "renew":
            store.renew("runner1", [], LEASE_S)
        else:
            claim(store, "runner1", lane=Lane.IMAGE)
        assert claim(store, "runner2") is None
    assert claim_existing(store, "runner1").job_id == job.job_id


def test_a_late_runner_reclaims_its_attached_job(store: JobStore, clock: Clock) -> None:
    job = enqueue(store, attached_to="runner1")[0]
    claim_existing(store, "runner1")
    clock.advance(LEASE_S + 1)
    assert (claim_existing(store, "runner1").job_id, reload(store, job).attempts) == (job.job_id, 2)


def test_an_idle_runner_writes_seldom(store: JobStore, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    enqueue(store, attached_to="another")
    claim(store)
    monkeypatch.setattr(queue, "claim_next", lambda *_: pytest.fail("it wrote"))
    clock.advance(LEASE_S / 5)
    assert claim(store) is None
    monkeypatch.undo()
    clock.advance(LEASE_S / 5)
    claim(store)
    assert list_runners(store, silent_s=0) == ("runner",)


# Positions


def test_a_jobs_position_counts_the_jobs_ahead(store: JobStore) -> None:
    jobs = enqueue(store, 3, work=10.0)
    enqueue(store, lane=Lane.IMAGE)
    enqueue(store, model="super")
    assert [where(store, job) for job in jobs] == [(0, None), (1, None), (2, None)]
    running = claim_existing(store)
    store.record(make_lease(running), Progress(step=1), [])
    store.note_speed(MODEL, Lane.VIDEO, Speed(2.0))
    assert where(store, jobs[2]) == (2, (7.5 + 10.0 + 10.0) / 2.0)
    assert store.find_positions([reload(store, running), jobs[0]]) == {}, "neither job is queued in the database"
    sooner = enqueue(store, service_class="interactive", work=10.0)[0]
    assert where(store, sooner) == (1, (7.5 + 10.0) / 2.0)
    assert where(store, jobs[2]) == (3, (7.5 + 30.0) / 2.0)


def test_one_query_places_a_whole_page(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of two lanes and two models, each placed within its own lane."""
    videos, images = enqueue(store, 60, work=10.0), enqueue(store, 39, work=1.0, lane=Lane.IMAGE)
    others = enqueue(store, model="super")
    running = claim_existing(store)
    store.note_speed(MODEL, Lane.IMAGE, Speed(2.0))
    page, reading, transactions = [*videos, *images, *others], store._database.reading, []

    def count_reading() -> Any:
        transactions.append(1)
        return reading()

    monkeypatch.setattr(store._database, "reading", count_reading)
    positions = store.find_positions(page)
    assert len(transactions) == 1
    assert [positions[job.job_id].position for job in videos[1:]] == list(range(1, 60)), "behind the one that runs"
    assert [positions[job.job_id].eta_s for job in images] == [(i + 1) / 2.0 for i in range(39)]
    assert (positions[others[0].job_id].position, positions[others[0].job_id].eta_s) == (0, None)
    assert running.job_id not in positions
    assert store.find_positions([reload(store, running)]) == {}
    assert len(transactions) == 2, "of jobs that do not wait the database is not asked"


def where(store: JobStore, job: Job) -> tuple[int, float | None]:
    position = store.find_positions([job])[job.job_id]
    return position.position, position.eta_s


def test_the_load_counts_queued_and_running_jobs(store: JobStore) -> None:
    assert store.read_load(MODEL) == ()
    enqueue(store, 2, work=10.0)
    enqueue(store, service_class="batch", work=3.0)
    enqueue(store, lane=Lane.IMAGE, work=1.0)
    enqueue(store, model="super")
    running = claim_existing(store)
    store.record(make_lease(running), Progress(step=1), [])
    store.cancel(enqueue(store)[0].job_id)
    assert store.read_load(MODEL) == (
        ClassLoad(Lane.IMAGE, "standard", 1, 0),
        ClassLoad(Lane.VIDEO, "batch", 1, 0),
        ClassLoad(Lane.VIDEO, "standard", 1, 1),
    )


# Several processes


def test_no_job_is_claimed_twice(store: JobStore, jobs_url: str) -> None:
    jobs = {job.job_id for job in enqueue(store, 40)}
    claimed = [job_id for mine in race("claim", jobs_url, len(jobs), 3) for job_id in mine]
    assert len(claimed) == len(jobs)
    assert set(claimed) == jobs


def test_the_bound_holds_across_processes(store: JobStore, jobs_url: str) -> None:
    counts = race("create", jobs_url, 10, 3)
    assert sum(one["accepted"] for one in counts) == 10
    assert sum(one["refused"] for one in counts) == 3 * 20 - 10
    assert max(one["most"] for one in counts) <= 10
    assert count_queued(store) == 10


def test_an_idempotency_key_makes_one_job_across_processes(store: JobStore, jobs_url: str) -> None:
    ids = [job_id for mine in race("repeat", jobs_url, 5, 3) for job_id in mine]
    assert (len(ids), len(set(ids))) == (15, 1)
    assert count_queued(store) == 1


# Many jobs


def test_no_query_scans_all_jobs(store: JobStore, jobs_url: str) -> None:
    """Judged by SQLite's query plans, not by time."""
    if not jobs_url.startswith("sqlite"):
        pytest.skip("PostgreSQL reads small tables as a whole")
    asked: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, sql: str, values: Any, *_: Any) -> None:
        asked.append((sql, values))

    sqlalchemy.event.listen(store._database._engine, "before_cursor_execute", note)
    call_every_method(store)
    queries = [(sql, values) for sql, values in asked if sql.startswith(("SELECT", "UPDATE", "DELETE"))]
    with store._database.reading() as connection:
        for sql, values in queries:
            plan = [row[3] for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", values)]
            full = [step for step in plan if step.startswith(("SCAN jobs", "SCAN job_events")) and "INDEX" not in step]
            assert not full, (sql, plan)
    assert len({sql for sql, _ in queries}) > 20


def call_every_method(store: JobStore) -> None:
    """Call every method once."""
    store.create(new_job(owner="key1", idempotency_key="k"), LIMITS)
    enqueue(store, 4, owner="key1")
    for job in (claim_existing(store), claim_existing(store, only_attached=False)):
        store.renew("runner", [make_lease(job)], LEASE_S)
        store.record(make_lease(job), Progress(step=1), [("step", {})])
    store.give_back(make_lease(job))
    store.finish(make_lease(claim_existing(store)), COMPLETED, keep_media_s=1)
    create_refused(store, KeyLimits(max_queued=1), owner="key1")
    page = store.list("key1", after=None, limit=1, is_ascending=True)
    last = page.jobs[-1]
    for is_ascending in (True, False):
        store.list("key1", after=last.job_id, limit=10, is_ascending=is_ascending)
    store.find_events({last.job_id: 0})
    store.find_positions(enqueue(store))
    store.read_load(MODEL)
    store.find_folder_needs([last.job_id])
    store.find_ended(MODEL, 0.0, 10)
    store.cancel(enqueue(store)[0].job_id)
    store.delete(last.job_id)
    store.sweep(-1.0, 0)
