"""Actions of a request: given ones, generated ones, and the way between the robot's numbers and the model's.

The model was trained on normalised actions. Where a checkpoint carries the statistics of an embodiment, as
``assets/action_stats/NAME.json`` with the keys of NVIDIA's cosmos-framework (``q01`` and ``q99``, ``min`` and ``max``,
or ``mean`` and ``std``, the first pair that is there; a list of one number per action value each, perhaps inside a
"global" object), given actions are normalised and generated ones brought back. Without it they stay as they are. No
published checkpoint carries such a file yet: put the one of your data set there. No torch here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos3_core.checkpoint.configs import read_json_object
from cosmos3_core.errors import CorruptFileError, MediaError, RequestError
from cosmos3_core.media.output import OutputFile, path_with_suffix
from cosmos3_core.presets import LIMITS

ActionArray = npt.NDArray[np.float32]
"""float32 [steps, width]: one action a row."""

ACTIONS_SUFFIX = ".actions.json"
"""Of the files that :func:`write_actions` writes."""

_FOLDER = Path("assets") / "action_stats"
# Of cosmos-framework: a value that never changed must not be divided by zero.
_SMALLEST_SCALE = 1e-8


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """Normalised = (action - offset) / scale, number by number.

    Attributes:
        offset, scale: float32 [width].
    """

    offset: ActionArray
    scale: ActionArray

    @classmethod
    def of(cls, checkpoint_dir: Path, domain_name: str, width: int) -> ActionStatistics | None:
        """Read the statistics of an embodiment; None where the checkpoint has none.

        Raises:
            CorruptFileError: the file is no JSON object of such lists, or they have another length than ``width``.
        """
        path = checkpoint_dir / _FOLDER / f"{domain_name}.json"
        if not path.is_file():
            return None
        raw = read_json_object(path)
        raw = raw["global"] if isinstance(raw.get("global"), dict) else raw
        for low_name, high_name in (("q01", "q99"), ("min", "max")):
            if low_name in raw and high_name in raw:
                low, high = (_numbers(path, name, raw[name], width) for name in (low_name, high_name))
                half = np.float32(0.5)
                return cls((high + low) * half, np.maximum(high - low, np.float32(_SMALLEST_SCALE)) * half)
        if "mean" in raw and "std" in raw:
            mean, std = (_numbers(path, name, raw[name], width) for name in ("mean", "std"))
            return cls(mean, np.maximum(std, np.float32(_SMALLEST_SCALE)))
        raise CorruptFileError(path, "has none of q01 and q99, min and max, mean and std")

    def normalise(self, actions: ActionArray) -> ActionArray:
        """Convert the robot's numbers to the model's."""
        return ((actions - self.offset) / self.scale).astype(np.float32)

    def restore(self, actions: ActionArray) -> ActionArray:
        """Convert the model's numbers to the robot's."""
        return (actions * self.scale + self.offset).astype(np.float32)


def _as_float32(values: Any) -> ActionArray:
    # What float32 cannot hold becomes infinite; whoever asks refuses that, and needs no warning.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32)


def _numbers(path: Path, name: str, values: Any, width: int) -> ActionArray:
    try:
        numbers = _as_float32(values)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty((0,), np.float32)
    if numbers.shape != (width,) or not np.isfinite(numbers).all():
        raise CorruptFileError(path, f"{name} is no list of {width} finite numbers")
    return numbers


@dataclass(frozen=True)
class ActionTrack:
    """The actions of a resolved request.

    Attributes:
        chunk_size: how many; one between two frames.
        domain_name, domain_id: of the embodiment.
        width: numbers in an action.
        view_point: where the camera is, for the caption.
        given: as the model knows them, ``chunk_size`` rows of ``width``; None where they are generated.
        statistics: of the embodiment, where the checkpoint carries them.
    """

    chunk_size: int
    domain_name: str
    domain_id: int
    width: int
    view_point: str
    given: tuple[tuple[float, ...], ...] | None
    statistics: ActionStatistics | None = field(default=None, compare=False)

    def result(self, actions: ActionArray) -> GeneratedActions:
        """Convert generated actions [chunk_size, width] from the model's numbers to the user's."""
        restored = actions if self.statistics is None else self.statistics.restore(actions)
        return GeneratedActions(restored, self.domain_name, self.domain_id, self.statistics is None)


@dataclass(frozen=True, eq=False)
class GeneratedActions:
    """Actions that were generated.

    Attributes:
        values: float32 [steps, width].
        domain_name, domain_id: of the embodiment.
        is_normalised: they are as the model knows them, for want of statistics; else as the robot does.
    """

    values: ActionArray
    domain_name: str
    domain_id: int
    is_normalised: bool

    def as_json(self) -> dict[str, Any]:
        """For an answer or a file; the keys ``data`` to ``domain_id`` are those of vLLM-Omni."""
        return {
            "data": self.values.tolist(),
            "shape": list(self.values.shape),
            "dtype": "float32",
            "raw_action_dim": self.values.shape[1],
            "domain_id": self.domain_id,
            "domain_name": self.domain_name,
            "is_normalised": self.is_normalised,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> GeneratedActions:
        """Rebuild the actions from :meth:`as_json`, the same numbers to the bit."""
        rows = np.array(values["data"], dtype=np.float32)
        return cls(rows, values["domain_name"], values["domain_id"], values["is_normalised"])


def write_actions(actions: GeneratedActions, out: str | Path) -> Path:
    """Write generated actions as ``out`` + ``.actions.json``; returns that path.

    Raises:
        RequestError: no place for a file.
        MediaError: it could not be written.
    """
    path = path_with_suffix(out, ACTIONS_SUFFIX)
    file = OutputFile(path)
    try:
        file.path.write_text(json.dumps(actions.as_json()) + "\n", encoding="utf-8")
    except OSError as error:
        file.discard()
        raise MediaError(f"{path}: cannot be written: {error}") from error
    file.commit()
    return path


def convert_actions(
    field_name: str, values: Any, width: int | None, chunk_size: int, statistics: ActionStatistics | None
) -> tuple[tuple[float, ...], ...]:
    """Convert a user's actions to the model's numbers: the last row of short ones is repeated, long ones are cut.

    Args:
        field_name: for messages.
        values: rows of numbers: nested lists, an array.
        width: numbers in an action; None takes the rows' own.
        chunk_size: rows wanted.
        statistics: of the embodiment.

    Raises:
        RequestError: no such rows, none, too many, of another width, or with values that no action has.
    """
    rows = action_rows(field_name, values, width)
    if statistics is not None:
        rows = statistics.normalise(rows)
    rows = np.concatenate([rows, np.repeat(rows[-1:], max(0, chunk_size - len(rows)), axis=0)])[:chunk_size]
    return tuple(tuple(row) for row in rows.tolist())


def action_rows(field_name: str, values: Any, width: int | None) -> ActionArray:
    """Read the rows that a user gave, unconverted: float32 [rows, width].

    Raises:
        RequestError: as there.
    """
    columns = "numbers" if width is None else f"{width} numbers"
    allowed = f"1 to {LIMITS.max_actions} rows of {columns} each"
    try:
        rows = _as_float32(values)
    except (TypeError, ValueError, OverflowError):
        raise RequestError(field_name, values, allowed) from None
    if rows.ndim != 2 or not 1 <= len(rows) <= LIMITS.max_actions or rows.shape[1] < 1:
        raise RequestError(field_name, f"an array of shape {list(rows.shape)}", allowed)
    if width is not None and rows.shape[1] != width:
        raise RequestError(field_name, f"rows of {rows.shape[1]} numbers", allowed, "the embodiment decides")
    if not (np.abs(rows) <= LIMITS.max_action_value).all():  # NaN fails the comparison
        raise RequestError(field_name, "a value out of range", f"finite numbers within {LIMITS.max_action_value:g}")
    return rows
