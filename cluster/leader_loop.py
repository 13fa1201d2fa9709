"""The loop of a gang's leader: one task makes every call to the ranks, one after the other.

When the gang fails, every waiting caller gets the failure, later ones too: the leader ends and is replaced.
"""

from __future__ import annotations

import asyncio
import contextvars
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from cluster.errors import GangFailed, GangLost, OutOfMemory
from cluster.gang import Gang

# Between two checks of idle ranks.
_IDLE_S = 5.0

ItemT = TypeVar("ItemT")
T = TypeVar("T")


class LeaderLoop(ABC, Generic[ItemT]):
    """Base of the loops over waiting items. Create it inside the event loop that will use it.

    Args:
        gang: up and warm.
        on_failure: called once, when the gang has failed and every item has its error.
    """

    def __init__(self, gang: Gang, on_failure: Callable[[], None]) -> None:
        self._gang = gang
        self._on_failure = on_failure
        self._running: ItemT | None = None
        self.failure: GangFailed | None = None
        # A context of its own: a task made inside a request would be cancelled with that request.
        self._task = asyncio.get_running_loop().create_task(self._run(), context=contextvars.Context())

    @abstractmethod
    async def _work(self) -> None:
        """Wait for the next item and work on it, with the item in ``_running`` while the ranks do."""

    @abstractmethod
    def _pop_all(self) -> list[ItemT]:
        """Remove and return every item without an answer, the running one included."""

    @abstractmethod
    def _answer(self, item: ItemT, error: Exception) -> None:
        """Give an item its error."""

    async def _run(self) -> None:
        while self.failure is None:
            self._running = None
            try:
                await self._work()
            except GangFailed as error:
                self._fail(error)
            except Exception as error:  # noqa: BLE001 - our own bug; an endless wait for an answer would hide it
                self._fail(GangFailed("call", f"the leader met {type(error).__name__}: {error}"))

    async def _wait_idle(self, work: Awaitable[T], check_timeout_s: float) -> T | None:
        """Wait for work; if none comes, check the ranks, so that a death is noticed before a request meets it."""
        try:
            async with asyncio.timeout(_IDLE_S):
                return await work
        except TimeoutError:
            await self._gang.call("describe", phase="idle", timeout_s=check_timeout_s)
            return None

    def _require_up(self) -> None:
        if self.failure is not None:
            raise GangLost.of(self.failure)

    def _fail(self, error: GangFailed) -> None:
        """Fail every item; only the running one may be to blame."""
        self.failure = error
        # Only some ranks were out of memory: the running item's fault, but the gang has failed.
        running_error = error.__cause__ if isinstance(error.__cause__, OutOfMemory) else error
        for item in self._pop_all():
            self._answer(item, running_error if item is self._running else GangLost.of(error))
        self._on_failure()
