"""A job's events over HTTP: history, live, resumed; and bounds on followers."""

from __future__ import annotations

import asyncio
import contextvars
import json
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded
from deployments.api import generations
from deployments.errors import JobsError
from deployments.jobs import feed as feeds
from deployments.jobs.job import Progress
from tests.api.fake_service import Api, Follower
from tests.jobs.making import make_lease


def events_of(body: bytes) -> list[tuple[int, str, dict[str, Any]]]:
    """Parse (number or 0, kind, data) of each event; skips comments and retry times."""
    found = []
    for block in body.decode().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n") if line and not line.startswith(":"))
        if "event" in fields:
            found.append((int(fields.get("id", 0)), fields["event"], json.loads(fields["data"])))
    return found


def path_of(video: dict[str, Any]) -> str:
    return f"/v1/videos/{video['id']}/events"


def test_an_ended_job_sends_its_whole_history(api: Api) -> None:
    video = api.create({"prompt": "a", "num_inference_steps": 2})
    job = api.claim()
    api.step(job, 1, 0.5)
    api.step(job, 2, 0.0)
    api.complete(job)
    answer = api.get(path_of(video))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    events = events_of(answer.content)
    assert [(seq, kind) for seq, kind, _ in events] == [
        (1, "started"),
        (2, "step"),
        (3, "step"),
        (4, "file"),
        (5, "completed"),
    ]
    assert events[1][2]["sigma"] == 0.5
    assert events[-1][2] == api.get(f"/v1/videos/{video['id']}").json(), "the whole job"


@pytest.mark.parametrize("how", ["failed", "cancelled"])
def test_a_failed_job_ends_with_the_reason(how: str, api: Api) -> None:
    video = api.create()
    if how == "failed":
        api.fail(api.claim())
    else:
        api.post(f"/v1/videos/{video['id']}/cancel")
    *_, (_, kind, data) = events_of(api.get(path_of(video)).content)
    assert kind == how
    assert (data["status"], data["error"]["code"]) == ("failed", "stage_failed" if how == "failed" else "cancelled")


def test_last_event_id_resumes_after_that_event(api: Api) -> None:
    video = api.create({"prompt": "a", "num_inference_steps": 2})
    job = api.claim()
    api.step(job, 1)
    api.complete(job, None)
    last = events_of(api.get(path_of(video)).content)[-1][0]
    for seq in range(last):
        got = events_of(api.get(path_of(video), headers={"Last-Event-ID": str(seq)}).content)
        assert [it for it, _, _ in got] == list(range(seq + 1, last + 1))
    for seq in (last, last + 5):
        answer = api.get(path_of(video), headers={"Last-Event-ID": str(seq)})
        assert (answer.status_code, answer.content) == (204, b""), "browsers then stop asking"


@pytest.mark.parametrize("value", ["x", "-1", "1.5", "9" * 19, "²"])
def test_an_invalid_last_event_id_is_refused(value: str, api: Api) -> None:
    video = api.create()
    error = api.expect_refusal("GET", path_of(video), 422, headers={b"Last-Event-ID": value.encode("utf-8")})
    assert error["param"] == "Last-Event-ID"
    assert api.service.jobs.feed._followers == set()


def test_events_are_sent_as_they_happen(api: Api) -> None:
    first, second = (api.create({"prompt": prompt, "num_inference_steps": 3}) for prompt in "ab")

    async def follow() -> None:
        follower = await Follower(api, path_of(second)).begin()
        body = await follower.until(b"event: queued")
        assert events_of(body) == [(0, "queued", {"position": 1, "eta_s": None})]
        job = api.claim()
        assert job.job_id == first["id"]
        api.complete(job, None)
        await follower.until(b'"position": 0')
        job = api.claim()
        await follower.until(b"event: started")
        for step in (1, 2, 3):
            api.step(job, step, 1 - step / 3)
            body = await follower.until(b'"step": %d' % step)
        assert events_of(body)[-1][2]["pid"] == 7
        api.store.record(make_lease(job), Progress(), [("preview", {"step": 3, "b64_json": "AAAA"})])
        assert events_of(await follower.until(b"event: preview"))[-1][2]["b64_json"] == "AAAA"
        api.complete(job, None)
        body = await follower.to_its_end()
        assert events_of(body)[-1][1] == "completed"
        assert follower.is_whole
        await idle(api)

    api.run(follow())


async def idle(api: Api) -> None:
    """Wait until no follower is left and no query runs."""
    while api.service.jobs.feed._followers or api.service.jobs.feed._polling is not None:
        await asyncio.sleep(0.01)


def test_without_followers_the_database_is_not_polled(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    video = api.create()
    looks = []
    events = api.store.find_events

    def look(*arguments: Any) -> Any:
        looks.append(arguments)
        return events(*arguments)

    monkeypatch.setattr(api.store, "find_events", look)

    async def come_and_go() -> None:
        follower = await Follower(api, path_of(video)).begin()
        await follower.until(b"event: queued")
        assert looks
        await follower.leave()
        await idle(api)
        looks.clear()
        await asyncio.sleep(3 * feeds._POLL_S)
        assert looks == []
        await (follower := await Follower(api, path_of(video)).begin()).until(b"event: queued")
        await follower.leave()
        await idle(api)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    api.run(come_and_go())


def test_a_future_last_event_id_hides_no_event(api: Api) -> None:
    video = api.create()
    job = api.claim()

    async def follow() -> None:
        follower = await Follower(api, path_of(video), {"last-event-id": "5000"}).begin()
        api.complete(job, None)
        assert b"event: completed" in await follower.to_its_end()
        await idle(api)

    api.run(follow())


def test_a_follower_with_the_last_event_gets_no_events(api: Api) -> None:
    video = api.create()
    last = api.complete(api.claim(), None).last_seq

    async def follow() -> None:
        assert [event async for event in api.service.jobs.feed.follow(video["id"], last, 60.0)] == []
        await idle(api)

    api.run(follow())


def test_polling_outlives_the_first_followers_request(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve cancels what runs in a request's context, such as the first follower's."""
    video, inside = api.create(), contextvars.ContextVar("inside", default=False)
    seen, get = [], api.store.get

    def look(*arguments: Any) -> Any:
        seen.append(inside.get())
        return get(*arguments)

    monkeypatch.setattr(api.store, "get", look)

    async def follow() -> None:
        inside.set(True)
        events = api.service.jobs.feed.follow(video["id"], 0, 60.0)
        await anext(events)
        await events.aclose()
        await idle(api)

    api.run(follow())
    assert seen
    assert not any(seen)


def test_one_query_serves_all_followers(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    videos = [api.create({"prompt": str(index)}) for index in range(3)]
    looks: list[dict[str, int]] = []
    events = api.store.find_events

    def look(cursors: dict[str, int], limit: int) -> Any:
        looks.append(dict(cursors))
        return events(cursors, limit)

    async def follow() -> None:
        followers = [await Follower(api, path_of(it)).begin() for it in (*videos, videos[0])]
        for follower in followers:
            await follower.until(b"event: queued")
        monkeypatch.setattr(api.store, "find_events", look)
        while not looks:
            await asyncio.sleep(0.01)
        assert looks[0] == {it["id"]: 0 for it in videos}
        for follower in followers:
            await follower.leave()
        await idle(api)

    api.run(follow())


def test_followers_beyond_the_bound_get_a_429(make_api: Any) -> None:
    api = make_api(max_followers=2)
    video = api.create()

    async def follow() -> None:
        followers = [await Follower(api, path_of(video)).begin() for _ in range(2)]
        answer = await api.asend("GET", path_of(video))
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert int(answer.headers["retry-after"]) > 0
        await followers[0].leave()
        await (third := await Follower(api, path_of(video)).begin()).until(b"event: queued")
        for follower in (followers[1], third):
            await follower.leave()
        await idle(api)

    api.run(follow())


def test_followers_of_a_deleted_job_get_the_deleted_event(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_CHECK_S", 0.05)
    video = api.create()

    async def follow() -> None:
        follower = await Follower(api, path_of(video)).begin()
        await follower.until(b"event: queued")
        await api.asend("DELETE", f"/v1/videos/{video['id']}")
        *_, (seq, kind, data) = events_of(await follower.to_its_end())
        assert (seq, kind, data["deleted"]) == (0, "deleted", True)
        await idle(api)

    api.run(follow())


def test_a_silent_job_sends_keepalives(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "_KEEP_ALIVE_S", 0.05)
    video = api.create()

    async def follow() -> None:
        follower = await Follower(api, path_of(video)).begin()
        await follower.until(b": keep-alive\n\n: keep-alive\n\n")
        await follower.leave()
        await idle(api)

    api.run(follow())


def test_a_followers_connection_ends_after_its_time(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generations, "_LONGEST_S", 0.2)
    video = api.create()
    answer = api.get(path_of(video))
    assert answer.status_code == 200
    assert answer.text.startswith("retry: 2000\n\n")
    assert api.service.jobs.feed._followers == set()

    async def follow() -> None:
        with pytest.raises(DeadlineExceeded):
            async for _ in api.service.jobs.feed.follow(video["id"], 0, 0.1):
                pass

    api.run(follow())


def test_a_database_outage_ends_the_connections(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    video = api.create()

    def away(*arguments: Any) -> Any:
        raise JobsError("/a/secret/place is away")

    async def follow() -> None:
        follower = await Follower(api, path_of(video)).begin()
        await follower.until(b"event: queued")
        monkeypatch.setattr(api.store, "find_events", away)
        body = await follower.to_its_end()
        assert b"secret" not in body
        assert follower.is_whole
        await idle(api)

    api.run(follow())


def test_a_slow_follower_delays_nobody_and_misses_nothing(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feeds, "_BUFFER_BYTES", 3 * feeds._EVENT_BYTES)
    monkeypatch.setattr(feeds, "_MAX_EVENTS", 7)
    video = api.create({"prompt": "a", "num_inference_steps": 30})
    job = api.claim()
    for step in range(1, 31):
        api.step(job, step)
    api.complete(job, None)

    async def follow() -> None:
        slow = api.service.jobs.feed.follow(video["id"], 0, 60.0)
        first = await anext(slow)
        (held,) = api.service.jobs.feed._followers
        fast = [event.seq async for event in api.service.jobs.feed.follow(video["id"], 0, 60.0)]
        assert fast == list(range(1, 33))
        assert len(held.events) <= 4
        assert [first.seq] + [event.seq async for event in slow] == fast
        await idle(api)

    api.run(follow())
