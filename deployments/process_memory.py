"""The memory of this process."""

from __future__ import annotations

import ctypes
import gc
import sys
import threading

LARGE_BYTES = 1 << 20
"""Requests of more bytes are large: others run while they are parsed, and their memory is given back."""

_AFTER_S = 1.0
_is_due = threading.Lock()  # held from the first request for it until memory is given back


def give_memory_back() -> None:
    """Give memory of a large request back to the system soon; the C library would keep it for the next one."""
    if not _is_due.acquire(blocking=False):
        return
    trimming = threading.Timer(_AFTER_S, _give_back)  # its frames, and what Ray sends for it, end meanwhile
    trimming.daemon = True
    trimming.start()


def _give_back() -> None:
    _is_due.release()
    _trim()


def _trim() -> None:
    gc.collect()  # errors and their frames, which hold bodies, refer to each other
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)
