"""Waits of tests for states, in an event loop or a thread: a busy machine makes them slower, not wrong."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

_TURNS = 500
_LIMIT_S = 60.0

T = TypeVar("T")


def run(work: Awaitable[T]) -> T:
    """Run a test's coroutine in an event loop of its own.

    Raises:
        TimeoutError: it takes more than a minute.
    """

    async def in_time() -> T:
        async with asyncio.timeout(_LIMIT_S):
            return await work

    return asyncio.run(in_time())


def eventually(holds: Callable[[], bool], timeout_s: float = _LIMIT_S) -> bool:
    """Whether a condition that processes or threads bring about becomes true in time."""
    deadline_s = time.monotonic() + timeout_s
    while time.monotonic() < deadline_s:
        if holds():
            return True
        time.sleep(0.05)
    return False


async def settle() -> None:
    """Let the loop's tasks go on until each waits for something, by turns of the loop."""
    for _ in range(_TURNS):
        await asyncio.sleep(0)


async def until(holds: Callable[[], Awaitable[bool] | bool]) -> None:
    """Wait for a state that other tasks or threads bring about.

    Raises:
        TimeoutError: the state is not reached.
    """
    async with asyncio.timeout(_LIMIT_S):
        while not (result if isinstance(result := holds(), bool) else await result):
            await asyncio.sleep(0.005)
