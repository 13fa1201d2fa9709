"""The feed of events on every database; over HTTP it is tested in tests/api/test_job_events.py."""

from __future__ import annotations

import asyncio

import pytest

from deployments.jobs import feed as feeds
from deployments.jobs.feed import EventFeed
from deployments.jobs.job import JobEvent, Progress
from deployments.jobs.store import JobStore
from tests.jobs.making import COMPLETED, LIMITS, claim_existing, make_lease, new_job

DEADLINE_S = 60.0


@pytest.mark.parametrize(("after", "seqs"), [(-5, [1, 2]), (0, [1, 2]), (1, [2]), (2, []), (2**31, []), (2**70, [])])
def test_any_integer_is_accepted_as_an_event_number(after: int, seqs: list[int], store: JobStore) -> None:
    """One too large for the database must not break the query that other followers share."""
    first, other = new_job(), new_job()
    for new in (first, other):
        store.create(new, LIMITS)
        job = claim_existing(store)
        store.finish(make_lease(job), COMPLETED, keep_media_s=60.0)

    async def both() -> list[list[JobEvent]]:
        feed = EventFeed(store, max_followers=2)

        async def events(job_id: str, number: int) -> list[JobEvent]:
            return [event async for event in feed.follow(job_id, number, DEADLINE_S)]

        return await asyncio.gather(events(first.job_id, after), events(other.job_id, 0))

    mine, others = asyncio.run(both())
    assert [event.seq for event in mine] == seqs
    assert [event.kind for event in others] == ["started", "completed"]


def test_followers_of_one_job_get_what_is_after_their_own_numbers(store: JobStore) -> None:
    """One poll reads for all of them, from the smallest number on."""
    store.create(new_job(), LIMITS)
    job = claim_existing(store)
    store.finish(make_lease(job), COMPLETED, keep_media_s=60.0)

    async def follow_all() -> list[list[int]]:
        feed = EventFeed(store, max_followers=3)

        async def follow(after: int) -> list[int]:
            return [event.seq async for event in feed.follow(job.job_id, after, DEADLINE_S)]

        return await asyncio.gather(*map(follow, (0, 1, 2)))

    assert asyncio.run(follow_all()) == [[1, 2], [2], []]


def test_followers_of_long_histories_take_turns(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """No follower waits for another's end, and full pages are read without pause."""
    monkeypatch.setattr(feeds, "_MAX_EVENTS", 10)
    monkeypatch.setattr(feeds, "_POLL_S", DEADLINE_S / 10)
    ids = []
    for _ in range(4):
        store.create(new_job(), LIMITS)
        job = claim_existing(store)
        store.record(make_lease(job), Progress(step=1), [("step", {"step": number}) for number in range(30)])
        store.finish(make_lease(job), COMPLETED, keep_media_s=60.0)
        ids.append(job.job_id)
    order: list[str] = []

    async def all_of_them() -> None:
        feed = EventFeed(store, max_followers=4)

        async def follow(job_id: str) -> None:
            async for _ in feed.follow(job_id, 0, DEADLINE_S):
                order.append(job_id)

        async with asyncio.timeout(DEADLINE_S / 2):
            await asyncio.gather(*map(follow, ids))

    asyncio.run(all_of_them())
    assert len(order) == 4 * 32
    firsts = [order.index(job_id) for job_id in ids]
    ends = [len(order) - 1 - order[::-1].index(job_id) for job_id in ids]
    assert max(firsts) < min(ends)
