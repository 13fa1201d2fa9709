"""No process outlives the block that started it, or a signal.

Ray ends its processes itself, but not all of them, and not soon, when it is stopped while it starts or when one of its
own daemons has died. They are found by a mark that they inherit with the environment; where there is no ``/proc``,
Ray's own care has to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path

_NAME = "COSMOS3_STARTED_BY"
_GRACE_S = 2.0
_POLL_S = 0.05


@contextmanager
def no_leftovers(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Kill the processes that were started inside the block and are still there a moment after it.

    Args:
        environment: the one that they inherit, ``os.environ``.
    """
    environment[_NAME] = mark = uuid.uuid4().hex
    try:
        yield
    finally:
        del environment[_NAME]
        _await_end(mark)
        _kill(mark)


@contextmanager
def ended_by(signals: Collection[int], patience_s: float) -> Iterator[None]:
    """End this process, and those of `no_leftovers`, where a signal comes and the block is not left because of it.

    For native code that waits for a process which the same signal has killed, as when all processes of a group get it:
    Python's own handlers have to wait for that code. Where it does not let go of Python's lock, this waits with them.
    The exit status is 130. To be called by the main thread.

    Args:
        signals: that have a handler of Python's.
        patience_s: from the signal to the end of the block.
    """
    reader, writer = socket.socketpair()
    is_left = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):  # until it is closed
            if number[0] in signals and not is_left.wait(patience_s):
                if mark := os.environ.get(_NAME):
                    _kill(mark)
                print("interrupted", file=sys.stderr, flush=True)
                os._exit(130)

    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="ended_by", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_left.set()
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()


def _kill(mark: str) -> None:
    for pid in _marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _await_end(mark)


def _await_end(mark: str) -> None:
    deadline_s = time.monotonic() + _GRACE_S
    while _marked(mark) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _marked(mark: str) -> list[int]:
    """Processes with the mark. Not this one: what it started with shows there, not what it has set since."""
    entry = f"{_NAME}={mark}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        # Gone in the meantime, or another user's.
        with contextlib.suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids
