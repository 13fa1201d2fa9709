"""Calls to a gang: sequential, never withdrawn, and failed at once when the gang fails."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any, cast

import pytest

from cluster import leader_loop
from cluster.errors import GangFailed, GangLost, OutOfMemory, PreviewFailed
from cluster.gang import Gang
from cluster.gang_calls import GangCalls
from cosmos3_core.errors import Cosmos3Error, RequestError
from tests.settling import run, settle


class FakeGang:
    """Returns its arguments once the gate is open; fails on demand."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.failures: dict[str, Exception] = {}
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_at_once = 0

    async def call_or_refuse(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        assert self.num_at_once == 0
        self.num_at_once += 1
        try:
            await self.gate.wait()
            self.made.append(method)
            if method in self.failures:
                raise self.failures[method]
            return [arguments]
        finally:
            self.num_at_once -= 1

    call = call_or_refuse

    async def call_rank_0(
        self, method: str, *arguments: Any, phase: str, timeout_s: float, reraises: type[Cosmos3Error]
    ) -> Any:
        assert reraises is Cosmos3Error, "a refusal would fail the gang"
        return (await self.call_or_refuse(f"first {method}", *arguments, phase=phase, timeout_s=timeout_s))[0]


class Ended:
    count = 0

    def __call__(self) -> None:
        self.count += 1


def calls_of(gang: FakeGang, on_failure: Any = lambda: None) -> GangCalls:
    return GangCalls(cast(Gang, gang), on_failure)


def test_calls_are_made_one_after_the_other_and_answered() -> None:
    async def body() -> None:
        gang = FakeGang()
        calls = calls_of(gang)
        answers = await asyncio.gather(*(calls.call(f"m{i}", i, phase="decode", timeout_s=5) for i in range(4)))
        assert answers == [[(0,)], [(1,)], [(2,)], [(3,)]]
        assert gang.made == ["m0", "m1", "m2", "m3"]

    run(body())


def test_a_leaving_caller_withdraws_only_calls_not_yet_made() -> None:
    async def body() -> None:
        gang = FakeGang()
        gang.gate.clear()
        calls = calls_of(gang)
        leaving = [asyncio.create_task(calls.call(f"m{i}", phase="decode", timeout_s=5)) for i in range(2)]
        await settle()
        for task in leaving:
            task.cancel()
        await asyncio.wait(leaving)
        gang.gate.set()
        assert await calls.call("m2", phase="decode", timeout_s=5) == [()]
        assert gang.made == ["m0", "m2"], "m0 was at the ranks already, m1 at none"

    run(body())


def test_a_notification_is_sent_even_if_its_caller_leaves() -> None:
    async def body() -> None:
        gang = FakeGang()
        gang.gate.clear()
        calls = calls_of(gang)

        async def clip() -> None:
            try:
                await calls.call("next_strip", phase="decode", timeout_s=5)
            finally:
                calls.post("end", phase="decode", timeout_s=5)

        leaving = asyncio.create_task(clip())
        await settle()
        leaving.cancel()
        await asyncio.wait([leaving])
        gang.gate.set()
        await calls.call("begin", phase="decode", timeout_s=5)
        assert gang.made == ["next_strip", "end", "begin"]

    run(body())


def test_a_wait_for_something_else_ends_with_the_gang() -> None:
    async def body() -> None:
        gang = FakeGang()
        gang.failures["next_strip"] = GangFailed("decode", "died", 1)
        calls, credit = calls_of(gang), asyncio.Event()
        before = asyncio.all_tasks()
        credit.set()
        assert await calls.wait_while_up(credit.wait()) is True
        credit.clear()
        waiting = asyncio.create_task(calls.wait_while_up(credit.wait()))
        leaving = asyncio.create_task(calls.wait_while_up(credit.wait()))
        await settle()
        leaving.cancel()
        await asyncio.wait([leaving])
        with pytest.raises(GangFailed, match="rank 1"):
            await calls.call("next_strip", phase="decode", timeout_s=5)
        with pytest.raises(GangLost, match="rank 1"):
            await waiting
        with pytest.raises(GangLost):
            await calls.wait_while_up(credit.wait())
        await settle()
        assert asyncio.all_tasks() <= before, "waits that were left hanging"

    run(body())


def test_the_task_does_not_inherit_its_makers_context() -> None:
    """Serve cancels the calls made in a request's context together with the request."""
    request: contextvars.ContextVar[str] = contextvars.ContextVar("request")

    class Looking(FakeGang):
        async def call_or_refuse(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
            return [request.get("none")]

    async def body() -> None:
        request.set("the first one")
        assert await calls_of(Looking()).call("begin", phase="decode", timeout_s=5) == ["none"]

    run(body())


def test_a_refusal_by_the_ranks_fails_only_its_caller() -> None:
    async def body() -> None:
        gang, ended = FakeGang(), Ended()
        calls = calls_of(gang, ended)
        gang.failures = {"encode": RequestError("image", 1, "2"), "next_strip": OutOfMemory("no room")}
        for method, error in gang.failures.items():
            with pytest.raises(type(error)):
                await calls.call(method, phase="decode", timeout_s=5)
        assert await calls.call("begin", phase="decode", timeout_s=5) == [()]
        assert ended.count == 0

    run(body())


def test_a_call_to_rank_0_alone_waits_its_turn_and_may_be_refused() -> None:
    async def body() -> None:
        gang, ended = FakeGang(), Ended()
        gang.gate.clear()
        calls = calls_of(gang, ended)
        before = asyncio.create_task(calls.call("next_strip", phase="decode", timeout_s=5))
        asked = asyncio.create_task(calls.call_rank_0("preview_map", 7, phase="previews", timeout_s=5))
        await settle()
        assert gang.num_at_once == 1
        gang.gate.set()
        assert await before == [()]
        assert await asked == (7,)
        assert gang.made == ["next_strip", "first preview_map"]
        gang.failures["first preview_map"] = PreviewFailed("no memory")
        with pytest.raises(PreviewFailed, match="no memory"):
            await calls.call_rank_0("preview_map", phase="previews", timeout_s=5)
        assert await calls.call("next_strip", phase="decode", timeout_s=5) == [()]
        assert ended.count == 0

    run(body())


@pytest.mark.parametrize("error", [GangFailed("decode", "died", 1), ZeroDivisionError("a bug")], ids=repr)
def test_a_gang_failure_fails_all_callers_and_ends_the_leader_once(error: Exception) -> None:
    async def body() -> None:
        gang, ended = FakeGang(), Ended()
        gang.gate.clear()
        gang.failures["m0"] = error
        calls = calls_of(gang, ended)
        asked = [asyncio.create_task(calls.call(f"m{i}", phase="decode", timeout_s=5)) for i in range(3)]
        await settle()
        gang.gate.set()
        raised = await asyncio.gather(*asked, return_exceptions=True)
        assert [type(it) for it in raised] == [GangFailed, GangLost, GangLost]
        with pytest.raises(GangLost):
            await calls.call("m3", phase="decode", timeout_s=5)
        calls.post("end", phase="decode", timeout_s=5)
        await settle()
        assert gang.made == ["m0"]
        assert ended.count == 1

    run(body())


def test_out_of_memory_on_some_ranks_is_reported_as_such() -> None:
    async def body() -> None:
        gang = FakeGang()
        failure = GangFailed("decode", "next_strip() raised OutOfMemory", 1)
        failure.__cause__ = OutOfMemory("no room")
        gang.failures["next_strip"] = failure
        calls = calls_of(gang)
        with pytest.raises(OutOfMemory):
            await calls.call("next_strip", phase="decode", timeout_s=5)
        assert calls.failure is failure

    run(body())


def test_idle_ranks_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leader_loop, "_IDLE_S", 0.01)

    async def body() -> None:
        gang, ended = FakeGang(), Ended()
        gang.failures["describe"] = GangFailed("idle", "died", 0)
        calls = calls_of(gang, ended)
        while not ended.count:
            await settle()
        assert calls.failure is not None

    run(body())
