"""Waits of tests inside an event loop that depend on no clock: a busy machine makes them slower, not wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

_TURNS = 500
_LIMIT_S = 60.0


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
