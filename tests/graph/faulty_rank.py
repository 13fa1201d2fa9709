"""A rank for actors of tests, in a module of its own because each actor loads what its module imports."""

from __future__ import annotations

import os
import time

from cluster.errors import OutOfMemory
from cosmos3_core.errors import RequestError


class FaultyRank:
    """A rank that fails, hangs or dies on demand."""

    def __init__(self, part: str) -> None:
        self._part = part

    def step(self) -> str:
        if self._part == "sleep":
            time.sleep(100)
        if self._part == "refuse":
            raise RequestError("seed", 1, "2")
        if self._part == "bug":
            raise ZeroDivisionError("a rank's own trouble")
        if self._part == "no memory":
            raise OutOfMemory("of 1 GiB")
        if self._part == "die":
            time.sleep(0.3)
            os._exit(1)
        return "done"
