"""Times calls, ours and the reference's, row by row. No torch here."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from cosmos3_core.bench.report import Row


class Stopwatch:
    """Rows of seconds, filled by timed calls; runs below 0 warm up and are not counted.

    Args:
        synchronize: waits for the device's queue, before the clock is read.
    """

    def __init__(self, synchronize: Callable[[], None] = lambda: None) -> None:
        self._synchronize = synchronize
        self._rows: dict[str, Row] = {}

    @property
    def rows(self) -> list[Row]:
        """All rows, in the order of their first call."""
        return list(self._rows.values())

    def row(self, measure: str) -> Row:
        """Return the row of a measure, created if missing."""
        return self._rows.setdefault(measure, Row(measure))

    def time_ours(self, measure: str, run: int, call: Callable[..., Any], *arguments: Any) -> None:
        """Call ``call`` and count its seconds as ours."""
        seconds = self._seconds(call, arguments)
        if run >= 0:
            self.row(measure).ours.append(seconds)

    def time_theirs(self, measure: str, run: int, call: Callable[..., Any], *arguments: Any) -> None:
        """Call ``call`` and count its seconds as the reference's."""
        seconds = self._seconds(call, arguments)
        if run >= 0:
            self.row(measure).theirs.append(seconds)

    def _seconds(self, call: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        self._synchronize()
        start_s = time.perf_counter()
        call(*arguments)
        self._synchronize()
        return time.perf_counter() - start_s
