"""Measures the peak memory of work on the CPU in a fresh process. No torch here.

Earlier work distorts the figure: it may have a higher peak, and its freed memory hides later allocations. So each side
runs in a process of its own, whose allocator returns freed memory at once; otherwise chance decides tens of megabytes.
"""

from __future__ import annotations

import ctypes
import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from cosmos3_core.errors import CapabilityError, MeasureError

_LIMIT_S = 3600.0
"""Time limit of one child, seconds."""

# glibc's setting: allocations from this size on are mappings of their own, which are unmapped when freed.
_M_MMAP_THRESHOLD = -3
_OWN_MAPPING_BYTES = 64 * 1024

Prepare = Callable[..., Callable[[], object]]
"""Prepares work uncounted, for instance a model and its input, and returns the work to measure."""


def peak_growth_bytes(prepare: Prepare, *arguments: Any) -> int:
    """Return the peak of a fresh process's resident memory during the work, less its memory before.

    Args:
        prepare: a function of a module, called in the child; so is the work that it returns.

    Raises:
        MeasureError: the work raised an error, its process died, or it took more than an hour.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, prepare, arguments), daemon=True)
    with receiver:
        with sender:
            child.start()
        try:
            # With this side closed, the pipe ends with the child.
            if not receiver.poll(_LIMIT_S):
                raise MeasureError(f"peak memory: {prepare.__name__}{arguments} took more than {_LIMIT_S:.0f} s")
            answer = receiver.recv()
        except EOFError:
            child.join(10)
            text = f"peak memory: the process of {prepare.__name__}{arguments} died with exit status {child.exitcode}"
            raise MeasureError(f"{text}; the machine may be out of memory") from None
        finally:
            child.kill()
            child.join()
    if isinstance(answer, str):
        raise MeasureError(f"peak memory: {answer}")
    return int(answer)


def _measure(sender: Connection, prepare: Prepare, arguments: tuple[Any, ...]) -> None:
    with sender:
        try:
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _OWN_MAPPING_BYTES)
            work = prepare(*arguments)
            _forget_peak()
            before = _resident_bytes("VmRSS")
            work()
            sender.send(max(0, _resident_bytes("VmHWM") - before))
        except Exception as error:  # noqa: BLE001 -- any error is reported to the caller
            sender.send(f"{type(error).__name__}: {error}")


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        allowed = "a Linux where a process may reset its own peak"
        raise CapabilityError("/proc/self/clear_refs", str(error), allowed) from None


def _resident_bytes(name: str) -> int:
    # Not getrusage: its peak includes the process before exec, a copy of its parent.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
