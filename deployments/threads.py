"""Run blocking work in a thread; cancellation waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run work as :func:`asyncio.to_thread` does, but wait for its end before a cancellation is raised.

    A thread cannot be stopped, so the caller must not close what the thread still works on.

    Raises:
        Exception: as ``work`` raises.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        working.exception()  # marks it as retrieved, so that asyncio does not log it
        raise cancelled
    return working.result()
