"""Memory growth of a process since a moment, now and at its peak. Linux only."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20


class ProcessMemory:
    """Memory of one process since the object was made.

    Args:
        pid: the process; None for this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._directory = Path("/proc") / ("self" if pid is None else str(pid))
        (self._directory / "clear_refs").write_text("5")  # resets the peak
        self._begun = self._now()

    def grown_bytes(self) -> tuple[int, int]:
        """Return the growth of anonymous memory now, and of resident memory at the peak."""
        now = self._now()
        return now["RssAnon"] - self._begun["RssAnon"], now["VmHWM"] - self._begun["VmHWM"]

    def check(self, what: str, *, max_left_bytes: int, max_peak_bytes: int) -> None:
        """Check both against bounds."""
        left, peak = self.grown_bytes()
        print(f"{what}: {left / MIB:.1f} MiB more than before, {peak / MIB:.1f} MiB more at the peak")
        assert left < max_left_bytes
        assert peak < max_peak_bytes

    def _now(self) -> dict[str, int]:
        lines = (line.partition(":") for line in (self._directory / "status").read_text().splitlines())
        return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in ("RssAnon", "VmHWM")}
