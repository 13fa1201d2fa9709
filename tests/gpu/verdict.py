"""One line of the table."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """The result of one check.

    Attributes:
        check: its name.
        word: "ok", "FAIL" or "skip".
        detail: figures, or the reason.
        seconds: it took; 0 where it shares its run with others.
    """

    check: str
    word: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.word:<5} {self.check:<36} {self.seconds:7.1f} s  {self.detail}"


def checked(check: str, run: Callable[[], str]) -> Verdict:
    """Run a check, which returns its figures; an exception is its failure."""
    start_s = time.monotonic()
    try:
        word, detail = "ok", run()
    except Exception as error:  # noqa: BLE001 # the other checks still have to run
        word, detail = "FAIL", f"{type(error).__name__}: {error}".strip()
    return Verdict(check, word, detail, time.monotonic() - start_s)
