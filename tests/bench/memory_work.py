"""Work whose memory is known, for processes that tests start; loads in no time."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import numpy as np


def prepare(num_held_mb: int, num_worked_mb: int) -> Callable[[], object]:
    """Holds so much from the start, and so much more while it works."""
    held = np.ones(num_held_mb * 10**6, np.uint8)

    def work() -> int:
        return int(np.ones(num_worked_mb * 10**6, np.uint8).sum()) + held.size

    return work


def prepare_failing(how: str) -> Callable[[], object]:
    """Work that hangs or fails."""

    def work() -> None:
        if how == "raise":
            raise ValueError("the work's own trouble")
        if how == "die":
            os._exit(3)
        time.sleep(100)

    return work
