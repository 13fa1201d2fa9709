"""Progress of a run: one line that updates itself on a terminal, a few plain lines in a log."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TextIO

_BAR_COLUMNS = 24
_MAX_LINES = 10  # per run in a log, except the last one
_REDRAW_INTERVAL_S = 0.1
_CLEAR_TO_END = "\x1b[K"


class ProgressBar:
    """Reports steps to stderr.

    One bar serves any number of runs in turn: ``start``, ``update`` after each step, ``close``.

    Args:
        stream: stream to write to; None takes ``sys.stderr`` at each start.
        clock: monotonic clock, seconds.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._given_stream = stream
        self._clock = clock
        self._stream: TextIO | None = None  # set during a run

    def start(self, total: int, label: str) -> None:
        """Begin a run of ``total`` steps, shown as ``label``; ends the previous one."""
        self.close()
        self._stream = sys.stderr if self._given_stream is None else self._given_stream
        self._is_terminal = self._stream.isatty()
        self._total, self._label = total, label
        self._started_s = self._clock()
        self._last_drawn_s = float("-inf")
        self._lines_written = 0
        self._is_line_open = False

    def update(self, step: int) -> None:
        """Report that ``step`` steps of the run are done. Does nothing outside a run."""
        if self._stream is None:
            return
        now_s = self._clock()
        if self._is_terminal:
            if step >= self._total or now_s - self._last_drawn_s >= _REDRAW_INTERVAL_S:
                self._last_drawn_s = now_s
                self._is_line_open = True
                self._write(f"\r{self._bar(step)} {self._status(step, now_s)}{_CLEAR_TO_END}")
        elif step >= self._total or step * _MAX_LINES >= (self._lines_written + 1) * self._total:
            self._lines_written = step * _MAX_LINES // max(self._total, 1)
            self._write(f"{self._status(step, now_s)}\n")

    def close(self) -> None:
        """End the run, with the cursor on a new line; idempotent."""
        if self._stream is not None and self._is_line_open:
            self._write("\n")
        self._stream = None

    def _bar(self, step: int) -> str:
        filled = min(_BAR_COLUMNS * step // max(self._total, 1), _BAR_COLUMNS)
        return f"[{'#' * filled}{'.' * (_BAR_COLUMNS - filled)}]"

    def _status(self, step: int, now_s: float) -> str:
        status = f"{self._label} {step}/{self._total}"
        elapsed_s = now_s - self._started_s
        if step <= 0 or elapsed_s <= 0:
            return status
        steps_per_s = step / elapsed_s
        if step >= self._total:
            return f"{status}, {steps_per_s:.2f} steps/s, took {_clock_face(elapsed_s)}"
        return f"{status}, {steps_per_s:.2f} steps/s, {_clock_face((self._total - step) / steps_per_s)} left"

    def _write(self, text: str) -> None:
        assert self._stream is not None
        self._stream.write(text)
        self._stream.flush()


def _clock_face(seconds: float) -> str:
    """Format seconds: 75.2 -> "1:15", 3661 -> "1:01:01"."""
    minutes, rest_s = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest_s:02}" if hours else f"{minutes}:{rest_s:02}"
