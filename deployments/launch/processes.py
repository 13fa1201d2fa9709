"""End the processes that a block or a command has started.

Ray ends its own processes, but late or not at all when it is stopped while it starts, or after one of its daemons has
died. This module finds them by a mark that they inherit with the environment. It needs ``/proc``; without it only Ray's
own clean-up works.
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
def kill_leftovers(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Kill the processes that were started inside the block and still run shortly after it.

    Args:
        environment: that they inherit, ``os.environ``.
    """
    environment[_NAME] = mark = uuid.uuid4().hex
    try:
        yield
    finally:
        del environment[_NAME]
        _await_end(mark)
        _kill(mark)


@contextmanager
def end_on_signals(signals: Collection[int], patience_s: float) -> Iterator[None]:
    """End this process, and those of `kill_leftovers`, if a signal comes and the block does not end in time.

    For native code that waits for a process which the same signal has killed (all processes of a group get it): Python
    runs its signal handlers only after that code. While the code holds Python's lock, this waits as well. The exit
    status is 130. Only for the main thread.

    Args:
        signals: with a Python handler.
        patience_s: from the signal to the end of the block.
    """
    reader, writer = socket.socketpair()
    is_left = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):  # until the writer is closed
            if number[0] in signals and not is_left.wait(patience_s):
                if mark := os.environ.get(_NAME):
                    _kill(mark)
                print("interrupted", file=sys.stderr, flush=True)
                os._exit(130)

    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="end_on_signals", daemon=True)
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
    for pid in _find_marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _await_end(mark)


def _await_end(mark: str) -> None:
    deadline_s = time.monotonic() + _GRACE_S
    while _find_marked(mark) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _find_marked(mark: str) -> list[int]:
    """Find the processes with the mark. Never this one: /proc shows the environment that a process started with."""
    entry = f"{_NAME}={mark}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        # The process has ended, or is another user's.
        with contextlib.suppress(OSError):
            if entry in path.read_bytes().split(b"\0"):
                pids.append(int(path.parent.name))
    return pids
