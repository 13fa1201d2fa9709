"""How much memory a process has taken since a moment, and how much at its peak. For Linux."""

from __future__ import annotations

from pathlib import Path

MIB = 2**20


class ProcessMemory:
    """See the module; from when it is made.

    Args:
        pid: of the process; None for this one.
    """

    def __init__(self, pid: int | None = None) -> None:
        self._directory = Path("/proc") / ("self" if pid is None else str(pid))
        (self._directory / "clear_refs").write_text("5")  # the peak begins anew
        self._begun = self._now()

    def grown_bytes(self) -> tuple[int, int]:
        """More than then: memory of its own now, and all of it at the peak."""
        now = self._now()
        return now["RssAnon"] - self._begun["RssAnon"], now["VmHWM"] - self._begun["VmHWM"]

    def check(self, what: str, *, max_left_bytes: int, max_peak_bytes: int) -> None:
        """It is bounded, while there is work and when it is done."""
        left, peak = self.grown_bytes()
        print(f"{what}: {left / MIB:.1f} MiB more than before, {peak / MIB:.1f} MiB more at the peak")
        assert left < max_left_bytes
        assert peak < max_peak_bytes

    def _now(self) -> dict[str, int]:
        lines = (line.partition(":") for line in (self._directory / "status").read_text().splitlines())
        return {name: int(value.split()[0]) * 1024 for name, _, value in lines if name in ("RssAnon", "VmHWM")}
