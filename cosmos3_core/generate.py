"""The main path: from a prompt to a file, in one process.

    python -m cosmos3_core.generate --checkpoint DIR --prompt "..." --out PREFIX     # writes PREFIX.mp4

:func:`generate` runs it stage by stage: resolve, tokenize, condition, denoise, decode, to uint8, encode. The serving
graph runs the same stages as separate deployments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cosmos3_core import checks
from cosmos3_core.actions import GeneratedActions, write_actions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import StepEvent
from cosmos3_core.device import DTYPES, collective_backend, local_device, resolve_device, synchronize
from cosmos3_core.engine import Engine
from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.media.file_kinds import ACTIONS_SUFFIX
from cosmos3_core.media.output import MediaWriter, OutputFile, path_with_suffix
from cosmos3_core.media.pixels import FrameHash
from cosmos3_core.media.writer import ClipFormat, DiscardWriter, open_writer
from cosmos3_core.model.transformer import ACTION, SOUND, VIDEO
from cosmos3_core.parallel.groups import ALONE, Groups, close_groups, init_groups
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.progress import ProgressBar
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from cosmos3_core.request_flags import add_engine_flags, add_request_flags, request_of
from cosmos3_core.resolve import resolve

# Timeout of joining the ranks and of each exchange: longer than any step and than loading.
_COLLECTIVE_TIMEOUT_S = 1800.0

# Time that the other ranks give the first one to report an error.
_FIRST_RANK_S = 60.0

# In the order of the path, for reports.
_STAGES = (
    "model_load",
    "preprocess",
    "condition",
    "inference",
    "denoise",
    "decode",
    "decode_sound",
    "to_cpu",
    "encode",
)


@dataclass(frozen=True)
class GenerationResult:
    """The result of a request.

    Attributes:
        path: the file; None for latents or actions alone, and on every rank but the first.
        request: the request with every field decided; its ``notes`` list the changes.
        negative_prompt_origin: ``given``, ``empty``, ``checkpoint`` or ``built-in``.
        frames_sha256: hash of the encoded uint8 frames; "" if no frame was encoded.
        timings_s: stage -> seconds; ``inference`` is the sum of ``denoise`` and ``decode``.
        latents: modality -> final latents, see :meth:`Engine.denoise`; None unless they were requested.
        actions: the generated actions; None without any.
    """

    path: Path | None
    request: ResolvedRequest
    negative_prompt_origin: str
    frames_sha256: str
    timings_s: dict[str, float]
    latents: dict[str, Tensor] | None = None
    actions: GeneratedActions | None = None


def generate(
    engine: Engine,
    request: GenerationRequest,
    out: str | Path | None = None,
    *,
    output: Literal["media", "latent"] = "media",
    on_step: Callable[[StepEvent], None] | None = None,
) -> GenerationResult:
    """Serve one request. Every rank calls this; the first one writes the file.

    Args:
        out: path without its suffix, which follows from the kind of file, such as ``.mp4``.
        output: ``latent`` stops before decoding and returns the latents.

    Raises:
        RequestError: the request, the path or a setting is wrong; raised before denoising.
        MediaError: the file could not be written.
    """
    checks.choice("output", output, ("media", "latent"))
    clock = StageClock(engine.device)
    with clock.stage("preprocess"):
        resolved = resolve(request.packed(), engine.layout, is_sound_offered=engine.has_sound)
        conditional, unconditional = engine.tokenize(resolved)
        job = DenoiseRequest.of(resolved, conditional.ids, unconditional.ids, engine.layout.geometry)
    file, digest = resolved.file if output == "media" else None, FrameHash()
    has_sound, has_pictures = file is not None and file.sound is not None, file is not None and file.has_pictures
    # Opened before denoising, to refuse a bad path or setting early.
    path, writer = _open_writer(engine, out, file)
    with writer:
        if resolved.picture is not None:
            with clock.stage("condition"):
                job = replace(job, clean_latents=engine.clean_latents(resolved.picture))
        with clock.stage("denoise"):
            latents = engine.denoise(job, on_step=on_step)
        for samples in clock.iterate("decode_sound", engine.decode_sound(latents[SOUND])) if has_sound else ():
            with clock.stage("encode"):
                writer.write_sound(samples.cpu().numpy())
        for chunk in clock.iterate("decode", engine.frames(latents[VIDEO])) if has_pictures else ():
            with clock.stage("to_cpu"):
                frames = chunk.cpu().numpy()
            del chunk  # or it would live until the next one is there
            with clock.stage("encode"):
                digest.update(frames)
                writer.write(frames)
        with clock.stage("encode"):
            writer.close()
    sha256 = digest.hexdigest() if path is not None and has_pictures else ""
    kept_latents, actions = latents if output == "latent" else None, _make_actions(resolved, latents)
    return GenerationResult(path, resolved, unconditional.origin, sha256, clock.timings_s, kept_latents, actions)


def _open_writer(engine: Engine, out: str | Path | None, file: ClipFormat | None) -> tuple[Path | None, MediaWriter]:
    """Open the file on the first rank; the others decode their strips and write nothing."""
    if file is None or engine.ranks.rank > 0:
        return None, DiscardWriter()
    path = path_with_suffix(out, file.suffix)
    return path, open_writer(path, file)


def _make_actions(resolved: ResolvedRequest, latents: dict[str, Tensor]) -> GeneratedActions | None:
    if resolved.action is None or not resolved.has_generated_actions:
        return None
    return resolved.action.restore(latents[ACTION][:, : resolved.action.width].cpu().numpy())


@dataclass
class StageClock:
    """Sums the seconds of named stages; waits for the device at both ends of each."""

    device: torch.device
    stages_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the ``with`` block to ``name``."""
        synchronize(self.device)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.stages_s[name] = self.stages_s.get(name, 0.0) + time.perf_counter() - start_s

    def iterate(self, name: str, items: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the items of an iterator, and add the seconds that each takes to ``name``."""
        while True:
            with self.stage(name):
                item = next(items, None)
            if item is None:
                return
            yield item
            del item  # or it would live until the next one is there

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds of the stages in the order of the path, with ``inference`` = denoise + decode."""
        known = dict(self.stages_s)
        if "denoise" in known:
            known["inference"] = known["denoise"] + known.get("decode", 0.0)
        return {name: known[name] for name in _STAGES if name in known}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m cosmos3_core.generate", description="Make a video (or, with one frame, an image) from a prompt."
    )
    add_request_flags(parser)
    add_engine_flags(parser)
    options = parser.parse_args(arguments)
    try:
        run(options)
    except Cosmos3Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run(options: argparse.Namespace) -> None:
    """Run the request that the flags of :mod:`cosmos3_core.request_flags` describe, and print the result.

    Raises:
        Cosmos3Error: the request failed.
    """
    with _report_once():
        request = request_of(options)
        # Before the weights are read.
        resolved = resolve(request.packed(), CheckpointLayout.open(options.checkpoint))
        if resolved.has_generated_actions:
            OutputFile(path_with_suffix(options.out, ACTIONS_SUFFIX))  # refuses an unusable path early
        layout = _layout(options)
    groups, device = _join_ranks(layout, options.device)
    progress = ProgressBar()
    try:
        clock = StageClock(device)
        with clock.stage("model_load"):
            dtype = None if options.dtype is None else DTYPES[checks.choice("dtype", options.dtype, tuple(DTYPES))]
            engine = Engine(options.checkpoint, dtype=dtype, device=device, groups=groups)
        with engine:
            if groups.rank == 0:
                progress.start(resolved.num_inference_steps, "denoising")
            result = generate(engine, request, options.out, on_step=lambda event: progress.update(event.step))
        progress.close()
        if groups.rank > 0:
            return  # the first rank reports
        for note in result.request.notes:
            print(f"note: {note}", file=sys.stderr)
        actions_path = None if result.actions is None else write_actions(result.actions, options.out)
        _report(result, actions_path, {**clock.timings_s, **result.timings_s})
    finally:
        progress.close()
        close_groups()


@contextmanager
def _report_once() -> Iterator[None]:
    """Report an error of the ``with`` block once: every rank raises it, and the first one prints it."""
    try:
        yield
    except Cosmos3Error:
        if int(os.environ.get("RANK", "0")) > 0:
            # torchrun ends all ranks when one exits: the first to exit must be the one that prints.
            time.sleep(_FIRST_RANK_S)
            sys.exit(2)
        raise


def _layout(options: argparse.Namespace) -> Layout:
    """Return the layout that the flags name, checked against the running processes and the checkpoint."""
    layout = Layout(options.tp, options.cfg, options.sp)
    num_processes = int(os.environ.get("WORLD_SIZE", "1"))
    if num_processes != layout.num_ranks:
        raise RequestError(
            "tp x cfg x sp",
            f"{layout}, {layout.num_ranks} ranks",
            f"as many ranks as there are processes, {num_processes}",
            f"choose --tp, --cfg and --sp whose product is {num_processes}, or start with: "
            f"torchrun --nproc_per_node={layout.num_ranks} -m cosmos3_core.generate ...",
        )
    layout.check(CheckpointLayout.open(options.checkpoint).transformer)
    return layout


def _join_ranks(layout: Layout, device: str | None) -> tuple[Groups, torch.device]:
    """Return this process's groups and device: alone, or one of torchrun's ranks."""
    if layout.num_ranks == 1:
        return ALONE, resolve_device(device)
    mine = local_device(device, int(os.environ["LOCAL_RANK"]))
    rank, backend = int(os.environ["RANK"]), collective_backend(mine)
    return init_groups(layout, rank, backend=backend, timeout_s=_COLLECTIVE_TIMEOUT_S), mine


def _report(result: GenerationResult, actions_path: Path | None, timings_s: dict[str, float]) -> None:
    request = result.request
    said = f"seed {request.seed}, {request.schedule} schedule, negative prompt: {result.negative_prompt_origin}"
    if result.path is not None:
        sound = ", with sound" if request.num_sound_latents else ""
        shape = f"{request.num_frames} frames, {request.width}x{request.height}, {request.fps:g} fps{sound}"
        print(f"{result.path}: {shape}, {said}")
    if result.actions is not None:
        steps, width = result.actions.values.shape
        space = "normalised, for want of statistics" if result.actions.is_normalised else "as the embodiment has them"
        print(f"{actions_path}: {steps} actions of {width} numbers ({result.actions.domain_name}), {space}, {said}")
    for name, seconds in timings_s.items():
        indent = "  " if name in ("denoise", "decode") else ""
        print(f"  {indent + name:<14}{seconds:9.2f} s")


if __name__ == "__main__":
    sys.exit(main())
