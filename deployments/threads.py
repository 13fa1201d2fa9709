"""Work in a thread beside the event loop, which nobody leaves before it has ended."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


async def run_in_thread(work: Callable[..., T], *arguments: object) -> T:
    """As :func:`asyncio.to_thread`, but whoever is cancelled meanwhile goes on only when the work has ended.

    A thread cannot be stopped: what it works on would be closed under its hands.

    Raises:
        Exception: whatever the work raised.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        working.exception()  # or it would be reported as one that nobody asked for
        raise cancelled
    return working.result()
