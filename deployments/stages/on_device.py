"""Work on a device that may not have the memory for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cluster.errors import OutOfMemory

T = TypeVar("T")


def run_within_memory(device: Any, work: Callable[[], T]) -> T:
    """What ``work`` returns. For a thread beside the event loop.

    Args:
        device: a torch device.
        work: whatever it holds is let go of when it fails.

    Raises:
        OutOfMemory: it does not fit.
    """
    from cosmos3_core.device import forget_unused_memory, is_out_of_memory

    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0]
    # Only here: as long as the error is there, its traceback holds all that the failed work had in its hands.
    forget_unused_memory(device)
    raise OutOfMemory(what)
