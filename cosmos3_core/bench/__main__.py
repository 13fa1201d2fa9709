"""The command line of the ruler; see :mod:`cosmos3_core.bench`."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from cosmos3_core import checks
from cosmos3_core.bench.ours import Ours
from cosmos3_core.bench.report import Row, table
from cosmos3_core.bench.subject import RANDOM_MODELS, Subject, Work, checkpoint_subject, random_subject
from cosmos3_core.bench.theirs import VERSION, Theirs
from cosmos3_core.device import DTYPES, describe, latents_to_fill, resolve_device, synchronize
from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.pixels import Frames, to_uint8
from cosmos3_core.presets import LIMITS
from cosmos3_core.shapes import chunk_latents


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the table, write the JSON; returns the exit status."""
    options = _parse(arguments)
    try:
        return _run(options)
    except (Cosmos3Error, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    device = resolve_device(options.device)
    dtype = DTYPES[options.dtype] if options.dtype else None
    if options.checkpoint is not None:
        subject = checkpoint_subject(options.checkpoint, device, dtype)
    else:
        default = torch.float32 if device.type == "cpu" else torch.bfloat16
        subject = random_subject(options.random_weights, device, dtype or default)
    for side in ("height", "width"):
        checks.pixels(side, getattr(options, side), subject.geometry.spatial, LIMITS.max_side_pixels)
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise RequestError("json", str(options.json), "a file in an existing directory")
    _, height, width = subject.geometry.latent_shape(1, options.height, options.width)
    chosen_chunk = chunk_latents(height, width, latents_to_fill(device))
    work = Work(
        num_frames=subject.geometry.round_up_num_frames(options.num_frames),
        height=options.height,
        width=options.width,
        text_tokens=options.text_tokens,
        negative_tokens=options.negative_tokens,
        runs=options.runs,
        chunk_latents=options.chunk_latents or chosen_chunk,
    )
    rows = measure(subject, work, compare=not options.no_compare)
    head = {
        "model": subject.name,
        "device": describe(device),
        "dtype": str(subject.dtype).removeprefix("torch."),
        "torch": torch.__version__,
        "work": vars(work),
        "video_tokens": subject.geometry.num_tokens(work.num_frames, work.height, work.width),
    }
    print(", ".join(f"{key} {value}" for key, value in head.items()))
    print(table(rows))
    if options.json is not None:
        options.json.write_text(json.dumps({**head, "stages": [row.as_json() for row in rows]}, indent=2) + "\n")
    return 0


@dataclass
class Stopwatch:
    """Rows of seconds, filled by timed calls; runs below 0 warm up and are not counted."""

    subject: Subject
    rows: dict[str, Row] = field(default_factory=dict)

    def ours(self, stage: str, run: int, of: Callable[..., Any], *arguments: Any) -> None:
        """Call ``of`` and count its seconds as ours."""
        seconds = self._seconds(of, arguments)
        if run >= 0:
            self._row(stage).ours_s.append(seconds)

    def theirs(self, stage: str, run: int, of: Callable[..., Any], *arguments: Any) -> None:
        """Call ``of`` and count its seconds as diffusers'."""
        seconds = self._seconds(of, arguments)
        if run >= 0:
            self._row(stage).theirs_s.append(seconds)

    def their_steps(self, stage: str, run: int, theirs: Theirs) -> None:
        """Let diffusers' own loop run two steps and count the second."""
        theirs.steps(1, self._row(stage).theirs_s.append if run >= 0 else lambda seconds: None)

    def _row(self, stage: str) -> Row:
        return self.rows.setdefault(stage, Row(stage))

    def _seconds(self, of: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        synchronize(self.subject.device)
        start_s = time.perf_counter()
        of(*arguments)
        synchronize(self.subject.device)
        return time.perf_counter() - start_s


def measure(subject: Subject, work: Work, *, compare: bool) -> list[Row]:
    """Seconds of every stage; ours and theirs take turns, so that a slow spell of the machine hits both.

    Args:
        subject: the model.
        work: the shape of the request, and how many runs count.
        compare: measure diffusers as well.

    Raises:
        ImportError: ``compare``, and diffusers is not installed in the version compared with.
    """
    watch = Stopwatch(subject)
    ours = Ours(subject, work)
    theirs = Theirs(subject, work) if compare else None
    for run in range(-1, work.runs):
        watch.ours("prefill, both prompts", run, ours.prefill)
        ours.start()
        watch.ours("step, both branches", run, ours.step)
        if theirs is not None:
            watch.their_steps("step, both branches", run, theirs)

    latents = torch.randn((1, subject.geometry.channels, *subject.latent_shape(work)), device=subject.device)
    frame = torch.rand((1, 3, 1, work.height, work.width), device=subject.device) * 2 - 1
    # First, then the chunk that fills the caches, then those like all that follow; the last may be shorter.
    num_following = subject.latent_shape(work).num_frames - 1
    for run in range(-1, work.runs):
        chunks = ours.vae.decode(latents, chunk_latents=work.chunk_latents)
        watch.ours("decode, first chunk", run, next, chunks)
        if num_following >= 2 * work.chunk_latents:
            next(chunks)
            watch.ours("decode, each later chunk", run, next, chunks)
        watch.ours("decode, whole clip", run, ours.decode_all, latents)
        watch.ours("encode of one frame (VAE)", run, ours.encode_frame, frame)
        if theirs is not None:
            watch.theirs("decode, whole clip", run, theirs.decode_all, latents)
            watch.theirs("encode of one frame (VAE)", run, theirs.encode_frame, frame)

    frames = to_uint8(ours.decode_all(latents)).cpu().numpy()
    with tempfile.TemporaryDirectory() as directory:
        for run in range(-1, work.runs):
            watch.ours("encode of the clip (mp4)", run, _write_mp4, frames, Path(directory) / "clip.mp4")
    return list(watch.rows.values())


def _write_mp4(frames: Frames, path: Path) -> None:
    _, height, width, _ = frames.shape
    with Mp4Writer(path, fps=24, height=height, width=width) as writer:
        writer.write(frames)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m cosmos3_core.bench",
        description=f"Seconds per stage, and diffusers {VERSION} on the same weights and shapes in the same run.",
    )
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--checkpoint", type=Path, help="checkpoint directory")
    model.add_argument("--random-weights", choices=tuple(RANDOM_MODELS), help="random weights made on the device")
    add = parser.add_argument
    add("--num-frames", type=_at_least(1), default=33)
    add("--height", type=_at_least(16), default=192)
    add("--width", type=_at_least(16), default=320)
    add("--text-tokens", type=_at_least(3), default=300, help="prompt length; NVIDIA's are some 1,550")
    add("--negative-tokens", type=_at_least(3), default=300, help="negative prompt length; NVIDIA's has some 3,300")
    add("--chunk-latents", type=_at_least(1), help="latent frames per decoded chunk; default: as served")
    add("--runs", type=_at_least(1), default=5, help="counted runs of each stage, after one to warm up")
    add("--no-compare", action="store_true", help="measure this project alone")
    add("--dtype", choices=tuple(DTYPES), help="default: as stored; random weights bfloat16 on a GPU, float32 on a CPU")
    add("--device", help="torch device; default the first GPU, else the CPU")
    add("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser.parse_args(arguments)


def _at_least(low: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < low:
            raise argparse.ArgumentTypeError(f"{value} is below {low}")
        return value

    return number


if __name__ == "__main__":
    sys.exit(main())
