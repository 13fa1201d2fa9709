"""Calls to a gang for requests that come and go: one after the other, never cancelled once made.

A request that is cancelled must not take its calls with it: Ray drops those that wait at one rank and leaves those that
run at another, which then waits for its neighbour for ever. So one task makes every call, and a caller may leave:
a call that has begun runs to its end, and one still in the queue is not made.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import GangFailed
from cluster.gang import Gang
from cluster.leader_loop import LeaderLoop
from cosmos3_core.errors import Cosmos3Error

# For the answer of idle ranks to a check.
_ANSWER_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class _Call:
    method: str
    arguments: tuple[Any, ...]
    phase: str
    timeout_s: float
    is_for_rank_0: bool  # alone
    answer: asyncio.Future[Any]


class GangCalls(LeaderLoop[_Call]):
    """Queue of the calls to one gang. Its callers bound it: each has at most one call, and one that ends its clip."""

    def __init__(self, gang: Gang, on_failure: Callable[[], None]) -> None:
        super().__init__(gang, on_failure)
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()

    async def call(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        """Call a method on every rank, in its turn; return the results in rank order. See :meth:`Gang.call_or_refuse`.

        Args:
            timeout_s: from the call's turn on.

        Raises:
            Cosmos3Error: raised by every rank.
            OutOfMemory: it did not fit.
            GangFailed: the gang failed; :class:`GangLost` if it was at work on another call.
        """
        results: list[Any] = await self._enqueue(method, arguments, phase, timeout_s)
        return results

    async def call_rank_0(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> Any:
        """Call a method that exchanges nothing on rank 0 alone, in its turn; as :meth:`call` otherwise.

        Raises:
            Cosmos3Error: raised by rank 0; the gang is as it was.
            GangFailed: as :meth:`call`.
        """
        return await self._enqueue(method, arguments, phase, timeout_s, is_for_rank_0=True)

    def post(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> None:
        """Call as :meth:`call` does without waiting for the answer; does nothing once the gang has failed."""
        if self.failure is None:
            self._enqueue(method, arguments, phase, timeout_s)

    async def wait_while_up(self, awaitable: Awaitable[T]) -> T:
        """Wait for something outside the gang; raise GangLost if the gang fails first."""
        waiting = asyncio.ensure_future(awaitable)
        try:
            # The loop's task ends only with the gang.
            await asyncio.wait([waiting, self._task], return_when=asyncio.FIRST_COMPLETED)
            if not waiting.done():
                self._require_up()
            return await waiting
        finally:
            waiting.cancel()

    def _enqueue(
        self, method: str, arguments: tuple[Any, ...], phase: str, timeout_s: float, *, is_for_rank_0: bool = False
    ) -> asyncio.Future[Any]:
        self._require_up()
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Retrieve the error: asyncio must not log one whose caller has left.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._calls.put_nowait(_Call(method, arguments, phase, timeout_s, is_for_rank_0, answer))
        return answer

    async def _work(self) -> None:
        call = await self._wait_idle(self._calls.get(), _ANSWER_S)
        if call is None or call.answer.cancelled():
            return
        self._running = call
        try:
            result = await self._call_gang(call)
        except GangFailed:
            raise
        except Cosmos3Error as error:
            self._answer(call, error)
        else:
            if not call.answer.done():
                call.answer.set_result(result)

    async def _call_gang(self, call: _Call) -> Any:
        limits: dict[str, Any] = {"phase": call.phase, "timeout_s": call.timeout_s}
        if call.is_for_rank_0:
            return await self._gang.call_rank_0(call.method, *call.arguments, **limits, reraises=Cosmos3Error)
        return await self._gang.call_or_refuse(call.method, *call.arguments, **limits)

    def _pop_all(self) -> list[_Call]:
        waiting = [self._calls.get_nowait() for _ in range(self._calls.qsize())]
        return waiting if self._running is None else [self._running, *waiting]

    def _answer(self, item: _Call, error: Exception) -> None:
        if not item.answer.done():
            item.answer.set_exception(error)
