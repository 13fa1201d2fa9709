"""What a leader's loop tells of its gang's work, for whoever counts and measures."""

from __future__ import annotations

from typing import Protocol

# Metrics of Ray are 10 s old, and forgotten when they are not set again within 20.
_PERIOD_S = 5.0


class GangMeter(Protocol):
    """Who is told. Lanes are "image" and "video". Nothing here may raise, or take long."""

    def record_steps(self, lane: str, num_steps: int, seconds: float) -> None:
        """A quantum was run."""
        ...

    def record_gang_wait(self, lane: str, seconds: float) -> None:
        """A request waited so long before it was begun."""
        ...

    def set_busy_share(self, share: float) -> None:
        """The gang was at work in this share of the last seconds."""
        ...

    def count_prompt_lookups(self, num_hits: int, num_misses: int) -> None:
        """So many of a request's prompts were kept from before, so many were not."""
        ...


class NoMeter:
    """Nobody is told."""

    def record_steps(self, lane: str, num_steps: int, seconds: float) -> None:
        """See :class:`GangMeter`."""

    def record_gang_wait(self, lane: str, seconds: float) -> None:
        """See :class:`GangMeter`."""

    def set_busy_share(self, share: float) -> None:
        """See :class:`GangMeter`."""

    def count_prompt_lookups(self, num_hits: int, num_misses: int) -> None:
        """See :class:`GangMeter`."""


class BusyClock:
    """The share of time in which a gang is at work, every few seconds anew.

    Args:
        now_s: by any clock; of all times here.
    """

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._busy_s = 0.0

    def worked(self, start_s: float, end_s: float) -> None:
        """The gang was at work, after the last time it was."""
        self._busy_s += end_s - start_s

    def share(self, now_s: float) -> float | None:
        """Of the time since the last one was told, in [0, 1]; None if that was moments ago."""
        passed_s = now_s - self._since_s
        if passed_s < _PERIOD_S:
            return None
        share = self._busy_s / passed_s
        self._since_s, self._busy_s = now_s, 0.0
        return min(1.0, share)
