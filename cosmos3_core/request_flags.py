"""The flags of a generation, and the request that they describe, for every command with a prompt. No torch here."""

from __future__ import annotations

import argparse
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from cosmos3_core.errors import RequestError
from cosmos3_core.field_spec import FieldSpec, ValueKind
from cosmos3_core.request import FIELDS, GenerationRequest

_SCHEDULES = {"auto": "shipped", "true": "karras", "false": "native"}

# Field -> flag, if their names differ.
_FLAGS = {
    "generate_sound": "--sound",
    "condition_frame_indexes_vision": "--condition-frames",
    "condition_video_keep": "--condition-keep",
    "num_inference_steps": "--steps",
}

# Fields without a flag; --use-karras-sigmas chooses the schedule.
_WITHOUT_FLAG = ("schedule", "use_system_prompt", "append_metadata", "negative_metadata", "noise")

_MEDIA = (ValueKind.IMAGE, ValueKind.VIDEO)


def add_request_flags(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each field of a request, and ``--out``."""
    add = parser.add_argument
    for field in fields(GenerationRequest):
        if field.name not in _WITHOUT_FLAG:
            spec, flag = FIELDS[field.name], _FLAGS.get(field.name, f"--{field.name.replace('_', '-')}")
            names = dict.fromkeys((flag, f"--{field.name.replace('_', '-')}"))
            add(*names, dest=field.name, default=field.default, help=_describe(spec), **_argparse_options(spec))
    add(
        "--use-karras-sigmas",
        choices=tuple(_SCHEDULES),
        help="noise schedule: false = native (default), true = karras, auto = what the checkpoint ships",
    )
    add(
        "--out",
        default="cosmos3",
        metavar="FILE",
        help="writes FILE.mp4, FILE.png ..., FILE.actions.json; an ending may be given",
    )


def _describe(spec: FieldSpec) -> str:
    """Describe a field and its bounds in one line of help."""
    if spec.kind in _MEDIA:
        return spec.about.partition(":")[0]  # the rest describes values in Python
    if spec.choices:
        return f"{spec.about}: {', '.join(map(str, spec.choices))}"
    if spec.low is None or spec.high is None:
        return spec.about
    multiple = f", a multiple of {spec.multiple_of}" if spec.multiple_of > 1 else ""
    return f"{spec.about}; {spec.low} to {spec.high}{multiple}"


def _argparse_options(spec: FieldSpec) -> dict[str, Any]:
    """Return argparse's options for a value; ``resolve`` checks bounds and choices, with a hint."""
    match spec.kind:
        case ValueKind.FLAG:
            return {"action": "store_true"}
        case ValueKind.INTEGER:
            return {"type": int, "metavar": "N"}
        case ValueKind.NUMBER:
            return {"type": float, "metavar": "X"}
        case ValueKind.INTEGERS:
            return {"type": int, "metavar": "N", "nargs": "+"}
        case ValueKind.NUMBERS:
            return {"type": float, "metavar": "X", "nargs": spec.num_items}
        case ValueKind.ROWS:
            return {"metavar": "JSON_FILE"}
        case kind if kind in _MEDIA:
            return {"metavar": "FILE"}
    return {"metavar": "TEXT"}


def add_engine_flags(parser: argparse.ArgumentParser, *, is_checkpoint_required: bool = True) -> None:
    """Add the flags of an engine in this process: checkpoint, device, dtype, ranks."""
    add = parser.add_argument
    help_text = "a directory, or what `cosmos3 download` was given"
    add("--checkpoint", "--model", required=is_checkpoint_required, metavar="MODEL", help=help_text)
    add("--dtype", help="dtype of the weights: float32, bfloat16 or float16; default as stored")
    add("--device", help="torch device; default the first GPU, else the CPU")
    add("--tp", type=int, default=1, help="ranks that share heads and FFN columns; start with torchrun")
    add("--cfg", type=int, default=1, help="2 runs the guidance branches side by side; start with torchrun")
    add("--sp", type=int, default=1, help="ranks that share the generated tokens; start with torchrun")


def request_of(options: argparse.Namespace) -> GenerationRequest:
    """Make the request that the flags of :func:`add_request_flags` describe.

    Raises:
        RequestError: the file of actions cannot be read.
    """
    values = {name: getattr(options, name) for name in FIELDS if name not in _WITHOUT_FLAG}
    if options.actions is not None:
        values["actions"] = _read_actions(Path(options.actions))
    if options.use_karras_sigmas is not None:
        values["schedule"] = _SCHEDULES[options.use_karras_sigmas]
    return GenerationRequest(**values)


def _read_actions(path: Path) -> Any:
    """Read rows of numbers from a JSON file: bare, or the ``data`` of a file of generated actions."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RequestError("actions", str(path), "a JSON file with rows of numbers", str(error)) from None
    return content["data"] if isinstance(content, dict) and "data" in content else content
