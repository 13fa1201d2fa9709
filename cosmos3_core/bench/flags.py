"""The flags of the benchmarks' commands, each defined once. No torch here."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cosmos3_core import checks
from cosmos3_core.bench.random_models import RANDOM_MODELS
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import FIELDS


@dataclass(frozen=True)
class BenchModel:
    """The name of a measured model, with which another process can open it.

    Attributes:
        checkpoint: a checkpoint's directory; None with random weights.
        random_weights: a name of ``RANDOM_MODELS``; None with a checkpoint.
        dtype: name of the weights' dtype; None takes the stored one, or the one that suits the device.
    """

    checkpoint: Path | None = None
    random_weights: str | None = None
    dtype: str | None = None


def make_parser(prog: str, description: str, *, epilog: str = "") -> argparse.ArgumentParser:
    """Return a parser with the flags of every command: ``--runs`` and ``--json``."""
    made = argparse.ArgumentParser(prog=prog, description=description, epilog=epilog)
    made.add_argument("--runs", type=at_least(1), default=5, help="counted runs of each, after one to warm up")
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE as well")
    return made


def add_clip_flags(parser: argparse.ArgumentParser, *, num_frames: int, height: int, width: int) -> None:
    """Add the flags of a clip's shape, with these defaults."""
    add = parser.add_argument
    add("--num-frames", type=at_least(1), default=num_frames, help="default %(default)s")
    add("--height", type=at_least(1), default=height, help="pixels; default %(default)s")
    add("--width", type=at_least(1), default=width, help="pixels; default %(default)s")


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of the model, its device and dtype, the decoded chunks and the comparison."""
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="checkpoint directory")
    model.add_argument("--random-weights", choices=tuple(RANDOM_MODELS), help="random weights made on the device")
    add = parser.add_argument
    add("--chunk-latents", type=at_least(1), help="latent frames per decoded chunk; default: as served")
    add("--dtype", help="float32, bfloat16 or float16; default as stored, of random weights bfloat16, float32 on a CPU")
    add("--device", help="torch device; default the first GPU, else the CPU")
    add("--without-diffusers", action="store_true", help="measure this project alone")


def model_of(options: argparse.Namespace) -> BenchModel:
    """Return the model that the flags of :func:`add_model_flags` name."""
    return BenchModel(options.checkpoint, options.random_weights, options.dtype)


def check_clip(options: argparse.Namespace, multiple: int) -> None:
    """Refuse a clip beyond this project's limits, before anything of its size is allocated.

    Args:
        multiple: divisor of height and width, pixels.

    Raises:
        RequestError: the clip exceeds a limit.
    """
    FIELDS["num_frames"].check("num_frames", options.num_frames)
    for side in ("height", "width"):
        checks.pixels(side, getattr(options, side), multiple, LIMITS.max_side_pixels)


def check_json(path: Path | None) -> None:
    """Refuse a path that cannot be written, before anything is measured.

    Raises:
        RequestError: its directory does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise RequestError("json", str(path), "a file in an existing directory")


def at_least(low: int) -> Callable[[str], int]:
    """Return a parser of whole numbers that refuses those below ``low``."""

    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        return value

    return number
