"""Peak memory of some work: of the process, in a fresh one, where it runs on the CPU. No torch here.

What ran before leaves its mark on a process: its peak is not that of the work in question, and memory that was freed
but not given back hides what is taken next. So each side is measured in a process of its own, whose allocator gives
back at once what is freed: what it would keep depends on chance, tens of megabytes either way.
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
"""For one child: what takes longer is not measured this way."""

# glibc's name for the number of bytes from which an allocation is a mapping of its own; unmapped when it is freed.
_M_MMAP_THRESHOLD = -3
_OWN_MAPPING_BYTES = 64 * 1024

Prepare = Callable[..., Callable[[], object]]
"""Makes all that does not count, a model and its input say, and returns the work that does."""


def peak_growth_bytes(prepare: Prepare, *arguments: Any) -> int:
    """By how much the resident memory of a fresh process peaks over what it was before the work.

    Args:
        prepare: a function of a module; called in the child, as the work that it returns is.
        arguments: its arguments; they and the function's name are sent to the child.

    Raises:
        MeasureError: the work raised an error, its process died, or neither came to an end within an hour.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_measure, args=(sender, prepare, arguments), daemon=True)
    with receiver:
        with sender:
            child.start()
        try:
            # Closed on this side, the pipe ends when the child does.
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
        except Exception as error:  # noqa: BLE001 -- whatever it is, it is the caller's to say
            sender.send(f"{type(error).__name__}: {error}")


def _forget_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        allowed = "a Linux where a process may reset its own peak"
        raise CapabilityError("/proc/self/clear_refs", str(error), allowed) from None


def _resident_bytes(name: str) -> int:
    # Not getrusage: its peak counts the process before exec, too, which was its parent's copy.
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{name}:")[1].split()[0]) * 1024
