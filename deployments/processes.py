"""No process outlives the block that started it.

Ray ends its processes itself, but not all of them, and not soon, when it is stopped while it starts or when one of its
own daemons has died. They are found by a mark that they inherit with the environment; where there is no ``/proc``,
Ray's own care has to do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
import uuid
from collections.abc import Iterator, MutableMapping
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
