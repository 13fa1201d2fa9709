"""Work in threads that hangs ends the process."""

from __future__ import annotations

import time

import pytest

from deployments import threads
from deployments.threads import run_in_thread_or_exit
from tests.settling import run


@pytest.fixture
def exits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The times at which the process would have exited."""
    found: list[float] = []
    monkeypatch.setattr(threads, "exit_soon", lambda: found.append(time.monotonic()))
    return found


def test_work_that_takes_too_long_ends_the_process(exits: list[float]) -> None:
    run(run_in_thread_or_exit(0.05, time.sleep, 0.5))
    assert len(exits) == 1


def test_work_in_time_returns_its_result(exits: list[float]) -> None:
    assert run(run_in_thread_or_exit(0.2, divmod, 7, 2)) == (3, 1)
    with pytest.raises(ZeroDivisionError):
        run(run_in_thread_or_exit(0.2, divmod, 7, 0))
    time.sleep(0.3)
    assert exits == []
