"""Actions of a request, given or generated, and their conversion between the robot's numbers and the model's.

The model was trained on normalised actions. A checkpoint may carry the statistics of an embodiment as
``assets/action_stats/NAME.json``, with the keys of NVIDIA's cosmos-framework: ``q01`` and ``q99``, ``min`` and ``max``,
or ``mean`` and ``std`` (the first pair found counts), each a list with one number per action value, optionally inside a
"global" object. With statistics, given actions are normalised and generated ones restored; without, they stay as they
are. No published checkpoint carries such a file yet: put your data set's there. No torch here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos3_core import checks
from cosmos3_core.checkpoint.configs import read_json_object
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.modes import ActionRole, Mode
from cosmos3_core.embodiments import Embodiment, find_embodiment
from cosmos3_core.errors import CorruptFileError, MediaError, RequestError
from cosmos3_core.media.file_kinds import ACTIONS_SUFFIX
from cosmos3_core.media.output import OutputFile, path_with_suffix
from cosmos3_core.presets import LIMITS, ActionPreset
from cosmos3_core.request import DIFFUSERS_BEHAVIOUR, FIELDS, VIEW_POINTS, GenerationRequest

ActionArray = npt.NDArray[np.float32]
"""float32 [steps, width]: one action a row."""

"""Suffix of the files that :func:`write_actions` writes."""

_FOLDER = Path("assets") / "action_stats"
# As in cosmos-framework: a value that never changed must not be divided by zero.
_SMALLEST_SCALE = 1e-8


@dataclass(frozen=True, eq=False)
class ActionStatistics:
    """Statistics of an embodiment's actions: normalised = (action - offset) / scale, number by number.

    Attributes:
        offset, scale: float32 [width].
    """

    offset: ActionArray
    scale: ActionArray

    @classmethod
    def of(cls, checkpoint_dir: Path, domain_name: str, width: int) -> ActionStatistics | None:
        """Read the statistics of an embodiment; None where the checkpoint has none.

        Raises:
            CorruptFileError: the file is not a JSON object of such lists, or their length is not ``width``.
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
    # A number too large for float32 becomes infinite, which callers refuse: no warning is needed.
    with np.errstate(over="ignore"):
        return np.array(values, dtype=np.float32)


def _numbers(path: Path, name: str, values: Any, width: int) -> ActionArray:
    try:
        numbers = _as_float32(values)
    except (TypeError, ValueError, OverflowError):
        numbers = np.empty((0,), np.float32)
    if numbers.shape != (width,) or not np.isfinite(numbers).all():
        raise CorruptFileError(path, f"{name} is not a list of {width} finite numbers")
    return numbers


@dataclass(frozen=True)
class ActionTrack:
    """The actions of a resolved request.

    Attributes:
        chunk_size: number of actions, one between two frames.
        domain_name, domain_id: the embodiment.
        width: numbers in an action.
        view_point: the camera's, for the caption.
        given: given actions in the model's numbers, ``chunk_size`` rows of ``width``; None where they are generated.
        statistics: the embodiment's, if the checkpoint carries them.
    """

    chunk_size: int
    domain_name: str
    domain_id: int
    width: int
    view_point: str
    given: tuple[tuple[float, ...], ...] | None
    statistics: ActionStatistics | None = field(default=None, compare=False)

    def restore(self, actions: ActionArray) -> GeneratedActions:
        """Convert generated actions [chunk_size, width] from the model's numbers to the user's."""
        restored = actions if self.statistics is None else self.statistics.restore(actions)
        return GeneratedActions(restored, self.domain_name, self.domain_id, self.statistics is None)


@dataclass(frozen=True, eq=False)
class GeneratedActions:
    """Actions that were generated.

    Attributes:
        values: float32 [steps, width].
        domain_name, domain_id: the embodiment.
        is_normalised: the values are the model's numbers, as there are no statistics; otherwise the robot's.
    """

    values: ActionArray
    domain_name: str
    domain_id: int
    is_normalised: bool

    def as_json(self) -> dict[str, Any]:
        """Return the actions for an answer or a file; the keys ``data`` to ``domain_id`` are vLLM-Omni's."""
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
        """Rebuild the actions from :meth:`as_json`, bit for bit."""
        rows = np.array(values["data"], dtype=np.float32)
        return cls(rows, values["domain_name"], values["domain_id"], values["is_normalised"])


def write_actions(actions: GeneratedActions, out: str | Path) -> Path:
    """Write generated actions as ``out`` + ``.actions.json``; returns that path.

    Raises:
        RequestError: the path cannot hold a file.
        MediaError: the file could not be written.
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
    """Convert a user's actions to the model's numbers; repeats the last row or cuts the end to reach ``chunk_size``.

    Args:
        values: rows of numbers, as nested lists or an array.
        width: numbers in an action; None takes the rows' own.
        chunk_size: rows of the result.

    Raises:
        RequestError: see :func:`action_rows`.
    """
    rows = action_rows(field_name, values, width)
    if statistics is not None:
        rows = statistics.normalise(rows)
    rows = np.concatenate([rows, np.repeat(rows[-1:], max(0, chunk_size - len(rows)), axis=0)])[:chunk_size]
    return tuple(tuple(row) for row in rows.tolist())


def action_rows(field_name: str, values: Any, width: int | None) -> ActionArray:
    """Read the rows that a user gave, unconverted: float32 [rows, width].

    Raises:
        RequestError: not rows of numbers, none, too many, of another width, or with numbers that no action has.
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


def resolve_actions(
    mode: Mode, request: GenerationRequest, preset: ActionPreset, layout: CheckpointLayout, notes: list[str]
) -> ActionTrack:
    """Check the actions of a request against a checkpoint and fill their gaps; appends to ``notes``.

    Raises:
        RequestError: a field is out of bounds, or contradicts another.
    """
    domain_name = request.domain_name
    if domain_name is None and request.domain_id is None:
        domain_name = preset.domain_name
    embodiment = find_embodiment(domain_name, request.domain_id, layout.transformer.num_embodiment_domains)
    width = _choose_width(request.raw_action_dim, embodiment, preset, layout.transformer.action_dim)
    num_given = 0
    if mode.actions is ActionRole.GIVEN:
        if request.actions is None:
            raise RequestError("actions", None, f"the actions that {mode.name} carries out, [steps, width]")
        num_given, width = action_rows("actions", request.actions, width).shape
    if width is None:
        hint = "it depends on the data set; give it"
        raise RequestError("raw_action_dim", None, f"the numbers in an action of {embodiment.name}", hint)
    checks.integer("raw_action_dim", width, 1, layout.transformer.action_dim)
    chunk_size = request.action_chunk_size
    if chunk_size is None and request.num_frames is not None:
        chunk_size = checks.integer("num_frames", request.num_frames, 2, LIMITS.max_actions + 1) - 1
    if chunk_size is None:
        chunk_size = num_given or preset.chunk_size
    FIELDS["action_chunk_size"].check("action_chunk_size", chunk_size)
    if request.num_frames is not None and request.num_frames != chunk_size + 1:
        raise RequestError("num_frames", request.num_frames, f"{chunk_size + 1}, one more than the actions")
    if num_given > chunk_size:
        notes.append(f"of {num_given} given actions the first {chunk_size} are used")
    elif 0 < num_given < chunk_size:
        notes.append(f"the last of {num_given} given actions is repeated, for {chunk_size}")
    statistics = None
    if request.compat != DIFFUSERS_BEHAVIOUR:
        statistics = ActionStatistics.of(layout.directory, embodiment.name, width)
    view_point = VIEW_POINTS[0] if request.view_point is None else request.view_point
    return ActionTrack(
        chunk_size=chunk_size,
        domain_name=embodiment.name,
        domain_id=embodiment.domain_id,
        width=width,
        view_point=FIELDS["view_point"].check("view_point", view_point),
        given=convert_actions("actions", request.actions, width, chunk_size, statistics) if num_given else None,
        statistics=statistics,
    )


def _choose_width(given: int | None, embodiment: Embodiment, preset: ActionPreset, max_width: int) -> int | None:
    """Return the numbers in an action; None where neither the request nor the embodiment names them."""
    known = [embodiment.raw_action_dim] if embodiment.raw_action_dim is not None else []
    if embodiment.name == preset.domain_name and preset.raw_action_dim is not None:
        known.insert(0, preset.raw_action_dim)
    if given is None:
        return known[0] if known else None
    if checks.integer("raw_action_dim", given, 1, max_width) not in (known or [given]):
        allowed = f"{' or '.join(map(str, known))}, the numbers in an action of {embodiment.name}"
        raise RequestError("raw_action_dim", given, allowed, "leave it out for the first of them")
    return given
