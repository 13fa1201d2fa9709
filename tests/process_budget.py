"""Counts what a test run starts, and bounds it for ``make test``.

Counted are Ray sessions and apps, and the Python processes that the tests' own processes start, a Ray session's few
services among them: not its workers, which are as many as its apps want. With several workers the one in charge adds
up. Hooks for ``tests/conftest.py``.
"""

from __future__ import annotations

import multiprocessing.util
import os
import subprocess
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

SESSIONS, APPS, PROCESSES = "Ray sessions", "Ray apps", "Python processes"
BUDGET = {SESSIONS: 1, APPS: 2, PROCESSES: 200}
MARKS = "not slow and not gpu and not serve"
"""What ``make test`` selects; other selections are counted and not judged."""

started: Counter[str] = Counter()


def count(command: list[Any]) -> None:
    """Count a process that is about to start."""
    names = [os.path.basename(os.fsdecode(part)) for part in command[:1]]
    if names == ["gcs_server"]:
        started[SESSIONS] += 1
    elif names and names[0].startswith("python"):
        started[PROCESSES] += 1


def overspent(counts: Counter[str]) -> list[str]:
    """List what exceeds the budget, a line each."""
    return [f"{name}: {counts[name]}, at most {most}" for name, most in BUDGET.items() if counts[name] > most]


def _count_run(start: Callable[..., int]) -> Callable[..., int]:
    def counting(command: list[Any], *arguments: Any) -> int:
        count(list(command))
        return start(command, *arguments)

    return counting


def _count_spawned(start: Callable[..., int]) -> Callable[..., int]:
    def counting(path: Any, command: list[Any], *arguments: Any) -> int:
        count(list(command))
        return start(path, command, *arguments)

    return counting


def _count_forked() -> None:
    started[PROCESSES] += 1


def pytest_configure() -> None:
    """Count from here on, by every way that the standard library has."""
    subprocess._fork_exec = _count_run(subprocess._fork_exec)  # type: ignore[attr-defined]
    multiprocessing.util.spawnv_passfds = _count_spawned(multiprocessing.util.spawnv_passfds)
    os.register_at_fork(after_in_parent=_count_forked)  # does not run for the two above


def _is_judged(config: pytest.Config) -> bool:
    is_whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return is_whole and config.option.markexpr == MARKS


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Add what a worker has started."""
    started.update(getattr(node, "workeroutput", {}).get("started", {}))


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Hand a worker's counts to the one in charge, which fails a run that started too much."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["started"] = dict(started)
    elif _is_judged(session.config) and overspent(started) and not session.exitstatus:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Report what was started."""
    terminalreporter.section("started")
    terminalreporter.write_line(", ".join(f"{started[name]} {name}" for name in BUDGET))
    if _is_judged(config):
        for line in overspent(started):
            terminalreporter.write_line(f"FAILED tests/process_budget.py: {line}", red=True)
