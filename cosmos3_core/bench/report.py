"""Measurements as a table and as JSON."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    """One stage: seconds of every counted run, ours and theirs; theirs empty where there is nothing to compare."""

    stage: str
    ours_s: list[float] = field(default_factory=list)
    theirs_s: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Median of ours over median of theirs; below 1 we are faster."""
        if not self.ours_s or not self.theirs_s:
            return None
        return statistics.median(self.ours_s) / statistics.median(self.theirs_s)

    def as_json(self) -> dict[str, Any]:
        """Medians, spreads and the ratio."""
        return {
            "stage": self.stage,
            "ours_s": _summary(self.ours_s),
            "diffusers_s": _summary(self.theirs_s),
            "ratio": self.ratio,
        }


def table(rows: list[Row]) -> str:
    """The rows as text: median seconds, their range, the ratio."""
    lines = [f"{'stage':<34}{'ours, s':>28}{'diffusers 0.42.1, s':>28}{'ratio':>8}"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        lines.append(f"{row.stage:<34}{_cell(row.ours_s):>28}{_cell(row.theirs_s):>28}{ratio:>8}")
    return "\n".join(lines)


def _cell(seconds: list[float]) -> str:
    if not seconds:
        return "-"
    return f"{statistics.median(seconds):.4f} ({min(seconds):.4f}-{max(seconds):.4f})"


def _summary(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds), "runs": len(seconds)}
