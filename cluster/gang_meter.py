"""Interface through which a leader's loop reports its gang's work to metrics."""

from __future__ import annotations

# Ray shows metrics 10 s late, and forgets those that are not set again within 20 s.
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
        """Count the prompts of a request that the gang's cache had, and those that it had not."""


class BusyClock:
    """Measures a gang's busy share over the last few seconds; all times are of one clock."""

    def __init__(self, now_s: float) -> None:
        self._since_s = now_s
        self._busy_s = 0.0

    def add_work(self, start_s: float, end_s: float) -> None:
        """Add a span of work; it begins after the last one ended."""
        self._busy_s += end_s - start_s

    def share(self, now_s: float) -> float | None:
        """Return the busy share since the last report, in [0, 1]; None if that was moments ago."""
        passed_s = now_s - self._since_s
        if passed_s < _PERIOD_S:
            return None
        share = self._busy_s / passed_s
        self._since_s, self._busy_s = now_s, 0.0
        return min(1.0, share)
