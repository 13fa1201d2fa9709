"""A bound for several waits together."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

T = TypeVar("T")


class Deadline:
    """From now on. Every wait is a time-out of its own: an iterator may be asked by one task now, by another then.

    Args:
        limit_s: seconds in all.

    Attributes:
        limit_s: as given.
    """

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._at_s = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._at_s - time.monotonic())

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Wait for something, no longer than there is time.

        Raises:
            TimeoutError: it did not come.
        """
        # A time-out of zero still starts the wait, and ends it: what is never awaited would be left hanging.
        async with asyncio.timeout(self.left_s):
            return await awaitable
