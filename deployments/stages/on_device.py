"""Run work on a device, and report an out-of-memory error as :class:`OutOfMemory`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from cluster.errors import OutOfMemory

T = TypeVar("T")


def run_within_memory(device: Any, work: Callable[[], T]) -> T:
    """Run ``work`` and return its result. Call it in a thread, not in the event loop.

    Args:
        device: a torch device.
        work: its tensors are released when it fails.

    Raises:
        OutOfMemory: the work does not fit into the device's memory.
    """
    from cosmos3_core.device import forget_unused_memory, is_out_of_memory

    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        what = str(error).splitlines()[0]
    # After the except block: its traceback would keep the failed work's tensors alive.
    forget_unused_memory(device)
    raise OutOfMemory(what)
