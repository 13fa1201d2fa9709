"""From a prompt to a file, in one process: the main path.

    python -m cosmos3_core.generate --checkpoint DIR --prompt "..." --out PREFIX     # writes PREFIX.mp4

:func:`generate` is the whole of it, stage by stage: resolve, tokenize, condition, denoise, decode, to uint8, encode.
The serving graph runs the same stages as separate deployments.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from cosmos3_core import checks
from cosmos3_core.actions import ACTIONS_SUFFIX, GeneratedActions, write_actions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import StepEvent
from cosmos3_core.device import DTYPES, collective_backend, local_device, resolve_device, synchronize
from cosmos3_core.engine import Engine
from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.media.output import OutputFile, path_with_suffix
from cosmos3_core.media.pixels import FrameHash, Frames
from cosmos3_core.media.sound import Samples
from cosmos3_core.media.writer import DiscardWriter, MediaWriter, open_writer
from cosmos3_core.model.transformer import ACTION, SOUND, VIDEO
from cosmos3_core.parallel.groups import ALONE, Groups, close_groups, init_groups
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.progress import ProgressBar
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from cosmos3_core.request_flags import add_engine_flags, add_request_flags, request_of
from cosmos3_core.resolve import resolve

# For ranks to meet, and for each exchange: longer than any step, loading included.
_COLLECTIVE_TIMEOUT_S = 1800.0

# For the first rank to come as far as the others, which have nothing to say.
_FIRST_RANK_S = 60.0

# In the order of the path, as reports show them.
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
        path: the file; None when latents or nothing but actions were asked for, and on every rank but the first.
        request: the request as it was run, every field decided; its ``notes`` say what was changed.
        negative_prompt_origin: ``given``, ``empty``, ``checkpoint`` or ``built-in``.
        frames_sha256: hash of the uint8 frames that went to the encoder; "" when there were none.
        timings_s: stage -> seconds; ``inference`` holds ``denoise`` and ``decode``.
        latents: modality -> final latents, see :meth:`Engine.denoise`, when they were asked for, else None.
        actions: those that were generated, else None.
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
    """Serve one request. Where the engine is one of several ranks, all of them call this; the first writes the file.

    Args:
        engine: a loaded checkpoint.
        request: what to generate.
        out: path without its ending: ``.mp4`` is added, or what else the output is.
        output: ``latent`` stops before decoding and returns the latents.
        on_step: called after every denoising step.

    Raises:
        RequestError: the request, the path or a setting is wrong; raised before anything large is allocated.
        MediaError: the file could not be written.
    """
    checks.choice("output", output, ("media", "latent"))
    clock = StageClock(engine.device)
    with clock.stage("preprocess"):
        resolved = resolve(request.packed(), engine.layout, is_sound_offered=engine.has_sound)
        conditional, unconditional = engine.tokenize(resolved)
        job = DenoiseRequest.of(resolved, conditional.ids, unconditional.ids, engine.layout.geometry)
    digest, has_file = FrameHash(), output == "media" and resolved.has_file
    # Opened before the long part, so that a place or a setting that cannot be is refused before it.
    path, writer = _open_writer(engine, out, resolved) if has_file else (None, DiscardWriter())
    with writer:
        if resolved.picture is not None:
            with clock.stage("condition"):
                job = job.with_clean_latents(engine.clean_latents(resolved.picture))
        with clock.stage("denoise"):
            latents = engine.denoise(job, on_step=on_step)
        for samples in _samples(engine, latents[SOUND], clock) if has_file and SOUND in latents else ():
            with clock.stage("encode"):
                writer.write_sound(samples)
        for frames in _frames(engine, latents[VIDEO], clock) if has_file and resolved.has_pictures else ():
            with clock.stage("encode"):
                digest.update(frames)
                writer.write(frames)
        with clock.stage("encode"):
            writer.close()
    sha256 = digest.hexdigest() if path is not None and resolved.has_pictures else ""
    kept, actions = latents if output == "latent" else None, _restore_actions(resolved, latents)
    return GenerationResult(path, resolved, unconditional.origin, sha256, clock.timings_s, kept, actions)


def _open_writer(engine: Engine, out: str | Path | None, resolved: ResolvedRequest) -> tuple[Path | None, MediaWriter]:
    """Open the file on the first rank; the others decode their share of it and write nothing."""
    if engine.ranks.rank > 0:
        return None, DiscardWriter()
    clip_format = resolved.clip_format()
    path = path_with_suffix(out, clip_format.suffix)
    return path, open_writer(path, clip_format)


def _restore_actions(resolved: ResolvedRequest, latents: dict[str, Tensor]) -> GeneratedActions | None:
    if resolved.action is None or not resolved.has_generated_actions:
        return None
    return resolved.action.result(latents[ACTION][:, : resolved.action.width].cpu().numpy())


def _frames(engine: Engine, latents: Tensor, clock: StageClock) -> Iterator[Frames]:
    """Yield decoded chunks as uint8 frames on the CPU; of pixels, one chunk exists at a time."""
    chunks = engine.frames(latents)
    while True:
        with clock.stage("decode"):
            chunk = next(chunks, None)
        if chunk is None:
            return
        with clock.stage("to_cpu"):
            frames = chunk.cpu().numpy()
        del chunk
        yield frames


def _samples(engine: Engine, latents: Tensor, clock: StageClock) -> Iterator[Samples]:
    """Yield decoded samples on the CPU, chunk by chunk."""
    chunks = engine.decode_sound(latents)
    while True:
        with clock.stage("decode_sound"):
            chunk = next(chunks, None)
            samples = None if chunk is None else chunk.cpu().numpy()
        if samples is None:
            return
        yield samples


@dataclass
class StageClock:
    """Adds up the seconds of named stages, waiting for the device at both ends of each."""

    device: torch.device
    stages_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what happens inside towards ``name``."""
        synchronize(self.device)
        start_s = time.perf_counter()
        try:
            yield
        finally:
            synchronize(self.device)
            self.stages_s[name] = self.stages_s.get(name, 0.0) + time.perf_counter() - start_s

    @property
    def timings_s(self) -> dict[str, float]:
        """Stages in the order of the path; ``inference`` = denoise + decode."""
        known = dict(self.stages_s)
        if "denoise" in known:
            known["inference"] = known["denoise"] + known.get("decode", 0.0)
        return {name: known[name] for name in _STAGES if name in known}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
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
    """Generate what the flags of :mod:`cosmos3_core.request_flags` describe, and print the result.

    Raises:
        Cosmos3Error: it cannot be done.
    """
    with _report_once():
        request = request_of(options)
        # Before gigabytes are read.
        resolved = resolve(request.packed(), CheckpointLayout.open(options.checkpoint))
        if resolved.has_generated_actions:
            OutputFile(path_with_suffix(options.out, ACTIONS_SUFFIX))  # refuses a place that cannot be
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
            return  # the first one writes and says everything
        for note in result.request.notes:
            print(f"note: {note}", file=sys.stderr)
        actions_path = None if result.actions is None else write_actions(result.actions, options.out)
        _report(result, actions_path, {**clock.timings_s, **result.timings_s})
    finally:
        progress.close()
        close_groups()


@contextmanager
def _report_once() -> Iterator[None]:
    """Report an error of the ``with`` block once: every rank meets it alike, and the first one prints it."""
    try:
        yield
    except Cosmos3Error:
        if int(os.environ.get("RANK", "0")) > 0:
            # torchrun ends all ranks when one ends: the first one has to be that one.
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
        sound = "" if request.sound is None else ", with sound"
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
