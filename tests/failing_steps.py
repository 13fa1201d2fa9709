"""Acts (fails, kills) before this process's n-th change of files or the database."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable

import fsspec
import pytest
from sqlalchemy.engine.default import DefaultDialect

_CALLS = (
    *((os, name) for name in ("rename", "replace", "mkdir", "rmdir", "fsync", "unlink", "link")),
    *((type(fsspec.filesystem("memory")), name) for name in ("cp_file", "rm", "rm_file", "pipe_file")),
    *((DefaultDialect, name) for name in ("do_begin", "do_execute", "do_execute_no_params", "do_commit")),
)


def act_at(step: int, act: Callable[[], object], patch: pytest.MonkeyPatch) -> list[str]:
    """Call ``act`` before the ``step``-th change; return a list that gets the name of that call."""
    left = step
    reached: list[str] = []

    def count(call: Callable[..., object]) -> Callable[..., object]:
        def maybe(*arguments: object, **options: object) -> object:
            nonlocal left
            left -= 1
            if left == 0:
                reached.append(call.__name__)
                act()
            return call(*arguments, **options)

        return maybe

    for owner, name in _CALLS:
        patch.setattr(owner, name, count(getattr(owner, name)))
    return reached


def is_killed_at(step: int, work: Callable[[], object]) -> bool:
    """Run ``work`` in a fork that is killed (SIGKILL) before its ``step``-th change; False: it ended before that.

    For processes with one thread.
    """
    if os.fork() == 0:
        status = 1
        try:
            act_at(step, lambda: os.kill(os.getpid(), signal.SIGKILL), pytest.MonkeyPatch())
            work()
            status = 0
        except Exception:  # noqa: BLE001 - the caller sees the status
            traceback.print_exc()
        finally:
            os._exit(status)
    _, status = os.wait()
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL
        return True
    assert os.waitstatus_to_exitcode(status) == 0
    return False
