"""Calls to a gang for requests that come and go: one after the other, never cancelled once made.

A request that is cancelled must not take its calls with it: Ray drops those that wait at one rank and leaves those that
run at another, which then waits for its neighbour for ever. So one task makes every call, and a caller may leave:
a call that has begun runs to its end, and one still in the queue is not made. The task also checks idle ranks, so that
a death is noticed before a request meets it.

When the gang fails, every caller gets the failure, later ones too: the leader ends and is replaced.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from cluster.errors import GangFailed, GangLost, OutOfMemory
from cluster.gang import Gang
from cosmos3_core.errors import Cosmos3Error

# Between two checks of idle ranks, and for their answer.
_IDLE_S = 5.0
_ANSWER_S = 60.0

T = TypeVar("T")


@dataclass(frozen=True)
class _Call:
    method: str
    arguments: tuple[Any, ...]
    phase: str
    timeout_s: float
    is_for_first: bool  # rank 0 alone
    answer: asyncio.Future[Any]


class GangCalls:
    """Queue of the calls to one gang, made one at a time. Create it inside the event loop that will use it.

    The queue is bounded by its callers: each has one call at a time, and one at its end.

    Args:
        gang: up and warm.
        on_failure: called once, when the gang has failed and every caller has its error.
    """

    def __init__(self, gang: Gang, on_failure: Callable[[], None]) -> None:
        self._gang = gang
        self._on_failure = on_failure
        self._calls: asyncio.Queue[_Call] = asyncio.Queue()
        self.failure: GangFailed | None = None
        self._failed = asyncio.Event()
        # A context of its own: a task made inside a request would be cancelled with that request.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    async def ask(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> list[Any]:
        """Call a method on every rank, in its turn; return the results in rank order. See :meth:`Gang.ask`.

        Args:
            timeout_s: from the call's turn on.

        Raises:
            Cosmos3Error: raised by every rank.
            OutOfMemory: it did not fit.
            GangFailed: the gang failed; :class:`GangLost` if it was at work on another call.
        """
        results: list[Any] = await self._put(method, arguments, phase, timeout_s)
        return results

    async def first(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> Any:
        """Call a method that exchanges nothing on rank 0 alone, in its turn; as :meth:`ask` otherwise.

        Raises:
            Cosmos3Error: raised by rank 0; the gang is as it was.
            GangFailed: as :meth:`ask`.
        """
        return await self._put(method, arguments, phase, timeout_s, is_for_first=True)

    def tell(self, method: str, *arguments: Any, phase: str, timeout_s: float) -> None:
        """Call as :meth:`ask` does without waiting for the answer; does nothing once the gang has failed."""
        if self.failure is None:
            self._put(method, arguments, phase, timeout_s)

    async def while_up(self, awaitable: Awaitable[T]) -> T:
        """Wait for something outside the gang; raise GangLost if the gang fails first."""
        waiting, failed = asyncio.ensure_future(awaitable), asyncio.ensure_future(self._failed.wait())
        try:
            await asyncio.wait([waiting, failed], return_when=asyncio.FIRST_COMPLETED)
            if self.failure is not None and not waiting.done():
                raise GangLost(self.failure.phase, self.failure.reason, self.failure.rank)
            return await waiting
        finally:
            waiting.cancel()
            failed.cancel()

    def _put(
        self, method: str, arguments: tuple[Any, ...], phase: str, timeout_s: float, *, is_for_first: bool = False
    ) -> asyncio.Future[Any]:
        if self.failure is not None:
            raise GangLost(self.failure.phase, self.failure.reason, self.failure.rank)
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        # Retrieve the error: asyncio must not log one whose caller has left.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._calls.put_nowait(_Call(method, arguments, phase, timeout_s, is_for_first, answer))
        return answer

    async def _run(self) -> None:
        while self.failure is None:
            call: _Call | None = None
            try:
                async with asyncio.timeout(_IDLE_S):
                    call = await self._calls.get()
            except TimeoutError:
                pass
            if call is not None and call.answer.cancelled():
                continue
            try:
                await self._make(call)
            except GangFailed as error:
                self._fail(error, call)
            except Exception as error:  # noqa: BLE001 - our own bug; an endless wait for an answer would hide it
                self._fail(GangFailed("call", f"the leader met {type(error).__name__}: {error}"), call)

    async def _make(self, call: _Call | None) -> None:
        if call is None:
            await self._gang.call("describe", phase="idle", timeout_s=_ANSWER_S)
            return
        try:
            result = await self._make_call(call)
        except GangFailed:
            raise
        except Cosmos3Error as error:
            if not call.answer.done():
                call.answer.set_exception(error)
        else:
            if not call.answer.done():
                call.answer.set_result(result)

    async def _make_call(self, call: _Call) -> Any:
        limits: dict[str, Any] = {"phase": call.phase, "timeout_s": call.timeout_s}
        if call.is_for_first:
            return await self._gang.first(call.method, *call.arguments, **limits, passes_on=Cosmos3Error)
        return await self._gang.ask(call.method, *call.arguments, **limits)

    def _fail(self, error: GangFailed, running: _Call | None) -> None:
        """Fail every call; only the running one may be to blame."""
        self.failure = error
        if running is not None and not running.answer.done():
            # Only some ranks were out of memory: the call's fault, but the gang has failed.
            running.answer.set_exception(error.__cause__ if isinstance(error.__cause__, OutOfMemory) else error)
        while not self._calls.empty():
            waiting = self._calls.get_nowait()
            if not waiting.answer.done():
                waiting.answer.set_exception(GangLost(error.phase, error.reason, error.rank))
        self._failed.set()
        self._on_failure()
