"""Interface through which a leader's loop reports its gang's work to metrics."""

from __future__ import annotations

# Metrics of Ray are 10 s old, and forgotten when they are not set again within 20.
_PERIOD_S = 5.0


class GangMeter:
    """Receives a gang's counts and times; this base discards them. Lanes are "image" and "video".

    No method may raise, or take long.
    """

    def record_steps(self, lane: str, num_steps: int, seconds: float) -> None:
        """Record the steps and seconds of a quantum."""

    def record_gang_wait(self, lane: str, seconds: float) -> None:
        """Record how long a request waited at its gang."""

    def set_busy_share(self, share: float) -> None:
        """Set the share of the last seconds in which the gang was busy."""

    def count_prompt_lookups(self, num_hits: int, num_misses: int) -> None:
        """Count how many prompts of a request the gang's cache had, and how many it had not."""


class BusyClock:
    """Measures the share of time in which a gang is at work, every few seconds anew.

    Args:
        now_s: the time now, by the clock of all times here.
    """

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._busy_s = 0.0

    def add_work(self, start_s: float, end_s: float) -> None:
        """Add a span of work; it begins after the last one ended."""
        self._busy_s += end_s - start_s

    def share(self, now_s: float) -> float | None:
        """Return the busy share of the time since the last report, in [0, 1]; None if that was moments ago."""
        passed_s = now_s - self._since_s
        if passed_s < _PERIOD_S:
            return None
        share = self._busy_s / passed_s
        self._since_s, self._busy_s = now_s, 0.0
        return min(1.0, share)
