"""Measurements as a table and as JSON. No torch here."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Unit -> decimal places.
UNITS = {"s": 4, "frames/s": 2, "MB": 1, "frames": 0, "bytes": 0}


@dataclass
class Row:
    """One measure, with the values of all counted runs.

    Attributes:
        measure: name of the measure.
        unit: unit of its values, one of ``UNITS``; MB are 10^6 bytes.
        ours, theirs: values of this project and the reference; empty if not measured.
    """

    measure: str
    unit: str = "s"
    ours: list[float] = field(default_factory=list)
    theirs: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Our median over theirs; None without both."""
        if not self.ours or not self.theirs or not statistics.median(self.theirs):
            return None
        return statistics.median(self.ours) / statistics.median(self.theirs)

    def as_json(self) -> dict[str, Any]:
        """Return medians, spreads and the ratio."""
        return {
            "measure": self.measure,
            "unit": self.unit,
            "ours": _summary(self.ours),
            "theirs": _summary(self.theirs),
            "ratio": self.ratio,
        }


@dataclass(frozen=True)
class Report:
    """The rows of a measurement, with its circumstances and its reference.

    Attributes:
        head: the circumstances: device, shape, versions.
        reference: name of "theirs".
        rows: the measures.
        notes: remarks on them, a sentence each; for instance why there is no reference.
    """

    head: dict[str, Any]
    reference: str
    rows: list[Row]
    notes: tuple[str, ...] = ()

    def text(self) -> str:
        """Return circumstances, table and notes as text."""
        head = ", ".join(f"{key} {value}" for key, value in self.head.items())
        return "\n".join((head, format_table(self.rows, self.reference), *self.notes))

    def write_json(self, path: Path) -> None:
        """Write the report as JSON."""
        body = {"reference": self.reference, "measures": [row.as_json() for row in self.rows], "notes": self.notes}
        path.write_text(json.dumps({**self.head, **body}, indent=2) + "\n")


def frames_per_second(row: Row, num_frames: int) -> Row:
    """Convert a row of seconds for ``num_frames`` frames to frames per second."""
    speeds = ([num_frames / seconds for seconds in side] for side in (row.ours, row.theirs))
    return Row(row.measure, "frames/s", *speeds)


def format_table(rows: list[Row], reference: str) -> str:
    """Format the rows as text: medians, their ranges, the ratio."""
    lines = [f"{'':<36}{'unit':>9}{'ours':>30}{reference:>30}{'ratio':>8}"]
    for row in rows:
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        ours, theirs = (_cell(side, UNITS[row.unit]) for side in (row.ours, row.theirs))
        lines.append(f"{row.measure:<36}{row.unit:>9}{ours:>30}{theirs:>30}{ratio:>8}")
    return "\n".join(lines)


def _cell(values: list[float], places: int) -> str:
    if not values:
        return "-"
    median = f"{statistics.median(values):.{places}f}"
    return median if len(values) == 1 else f"{median} ({min(values):.{places}f}-{max(values):.{places}f})"


def _summary(values: list[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"median": statistics.median(values), "min": min(values), "max": max(values), "runs": len(values)}
