"""A clock that tests advance."""

from __future__ import annotations


class Clock:
    """A clock in seconds since 1970 that stands still until it is advanced."""

    def __init__(self, now_s: float = 1_800_000_000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds
