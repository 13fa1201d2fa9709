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
        status: "ok", "FAIL" or "skip".
        detail: figures, or the reason.
        seconds: it took; 0 where it shares its run with others.
    """

    check: str
    status: str
    detail: str
    seconds: float = 0.0

    def __str__(self) -> str:
        return f"{self.status:<5} {self.check:<36} {self.seconds:7.1f} s  {self.detail}"


def run_check(check: str, run: Callable[[], str]) -> Verdict:
    """Run a check, which returns its figures; an exception is its failure."""
    start_s = time.monotonic()
    try:
        status, detail = "ok", run()
    except Exception as error:  # noqa: BLE001 # the other checks still have to run
        status, detail = "FAIL", f"{type(error).__name__}: {error}".strip()
    return Verdict(check, status, detail, time.monotonic() - start_s)
