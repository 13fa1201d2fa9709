"""What every leader of a gang does, whatever the gang works on: answer for its health, and end with it."""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod

from cluster.errors import GangFailed
from cluster.gang import Gang

# Long enough for the failures to reach their callers before the process ends.
_LAST_WORDS_S = 0.2


class GangLeader(ABC):
    """Base of the deployments that lead a gang. They hold no weights and touch no GPU."""

    _gang: Gang

    @property
    @abstractmethod
    def _failure(self) -> GangFailed | None:
        """What the gang failed with; None while it works."""

    async def check_health(self) -> None:
        """Serve's question. A failed gang answers by its end; this is the second net.

        Raises:
            GangFailed: the gang is gone.
        """
        if self._failure is not None:
            raise self._failure

    def _end_soon(self) -> None:
        """End the ranks and this process: Serve puts a new leader with a new gang in its place."""
        self._gang.stop()
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
