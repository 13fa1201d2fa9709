"""Tests set the monotonic clock of their own thread only: loops of apps in other threads would sleep for good."""

from __future__ import annotations

import re

from tests.app.in_process import REPOSITORY

_PATCH = re.compile(r"setattr\((?:[\w.]*time, \"monotonic\"|\"[\w.]*time\.monotonic\")")


def test_no_test_replaces_the_monotonic_clock_of_every_thread() -> None:
    found = [path.name for path in (REPOSITORY / "tests").rglob("*.py") if _PATCH.search(path.read_text())]
    assert not found, "use tests.virtual_time.set_clocks"
