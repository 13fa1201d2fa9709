"""Which leases and runners are silent: judged by this process's own clock, which never jumps.

Times in the database are of wall clocks, which are set back and forth, and stand still while a laptop sleeps. They only
tell who is suspect. A suspect whose time has not changed for a while, as often as it was looked at, is silent: a runner
that is alive renews its times several times a second. While the database is away, no time is read and no suspect
becomes silent.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Mapping


class SilenceWatch:
    """Suspects, and since when their times have not changed; for any number of threads."""

    def __init__(self, monotonic: Callable[[], float] | None = None) -> None:
        self._monotonic = monotonic or (lambda: time.monotonic())
        self._lock = threading.Lock()
        # Group -> suspect -> (its time in the database, since when it is that).
        self._groups: dict[Hashable, dict[str, tuple[float, float]]] = {}

    def find_silent(self, group: Hashable, suspects: Mapping[str, float], patience_s: float) -> dict[str, float]:
        """Look at all suspects of a group; return those that have not changed for ``patience_s``, with their times."""
        now_s = self._monotonic()
        with self._lock:
            before = self._groups.get(group, {})
            seen = {
                name: (time_s, before[name][1] if name in before and before[name][0] == time_s else now_s)
                for name, time_s in suspects.items()
            }
            if seen:
                self._groups[group] = seen
            else:
                self._groups.pop(group, None)
        return {name: time_s for name, (time_s, since_s) in seen.items() if now_s - since_s >= patience_s}
