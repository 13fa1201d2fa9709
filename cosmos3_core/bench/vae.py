"""`bench vae`: measures the video VAE chunk by chunk as served, beside diffusers' with the whole clip at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from cosmos3_core.bench.flags import BenchModel
from cosmos3_core.bench.ours import video_vae
from cosmos3_core.bench.peak import peak_growth_bytes
from cosmos3_core.bench.report import Row, frames_per_second
from cosmos3_core.bench.stopwatch import Stopwatch
from cosmos3_core.bench.subject import Clip, Subject, open_subject
from cosmos3_core.bench.theirs import TheirVAE
from cosmos3_core.device import peak_allocated_bytes, synchronize
from cosmos3_core.vae.video import VideoVAE

Side = Literal["ours", "theirs"]

WHOLE_CLIP = "decode, whole clip"
PEAK = "decode, peak memory"
PEAK_NOTE = (
    "Peak memory is what decoding adds to weights and latents: allocated on a GPU, or resident in a process of its own."
)


def measure_vae(subject: Subject, model: BenchModel, clip: Clip, *, runs: int, compare: bool) -> list[Row]:
    """Measure the speed of decoding and of encoding a conditioning frame, and the memory of decoding.

    Args:
        model: its name, for the processes that measure memory on a CPU.

    Raises:
        ImportError: ``compare``, and diffusers is not installed in the version compared with.
        MeasureError: the memory could not be measured.
    """
    watch = Stopwatch(partial(synchronize, subject.device))
    ours, theirs = video_vae(subject), TheirVAE(subject) if compare else None
    time_vae(watch, subject, clip, ours, theirs, runs)
    speed = frames_per_second(watch.row(WHOLE_CLIP), clip.num_frames)
    peak = Row(PEAK, "MB")
    peak.ours.append(_peak_mb(subject, model, clip, "ours", partial(decode_dropping, ours, clip)))
    if theirs is not None:
        peak.theirs.append(_peak_mb(subject, model, clip, "theirs", theirs.decode))
    return [*watch.rows, speed, peak]


def time_vae(
    watch: Stopwatch, subject: Subject, clip: Clip, ours: VideoVAE, theirs: TheirVAE | None, runs: int
) -> None:
    """Time both sides in turns, so that a slow machine slows both."""
    latents_BCTHW = subject.latents(clip)
    frame_BCFYX = torch.rand((1, 3, 1, clip.height, clip.width), device=subject.device) * 2 - 1
    # The first chunk, then the one that fills the caches, then equal ones; the last may be shorter.
    num_following = subject.latent_shape(clip).num_frames - 1
    for run in range(-1, runs):
        chunks = ours.decode(latents_BCTHW, chunk_latents=clip.chunk_latents)
        watch.time_ours("decode, first chunk", run, next, chunks)
        if num_following >= 2 * clip.chunk_latents:
            next(chunks)
            watch.time_ours("decode, each later chunk", run, next, chunks)
        watch.time_ours(WHOLE_CLIP, run, decode_dropping, ours, clip, latents_BCTHW)
        watch.time_ours("encode of one frame (VAE)", run, ours.encode, frame_BCFYX)
        if theirs is not None:
            watch.time_theirs(WHOLE_CLIP, run, theirs.decode, latents_BCTHW)
            watch.time_theirs("encode of one frame (VAE)", run, theirs.encode, frame_BCFYX)


def prepare_decode(model: BenchModel, clip: Clip, side: Side) -> Callable[[], object]:
    """Return one side's decode of the clip on the CPU, with everything loaded, for :mod:`cosmos3_core.bench.peak`."""
    subject = open_subject(model, torch.device("cpu"))
    decode = TheirVAE(subject).decode if side == "theirs" else partial(decode_dropping, video_vae(subject), clip)
    # Loading at the first use, of libraries' code above all, does not count.
    spatial = subject.geometry.spatial
    decode(subject.latents(replace(clip, num_frames=subject.geometry.temporal * 2 + 1, height=spatial, width=spatial)))
    return partial(decode, subject.latents(clip))


def decode_dropping(vae: VideoVAE, clip: Clip, latents_BCTHW: Tensor) -> None:
    """Decode as served: each chunk is freed before the next one is computed."""
    for chunk_BCFYX in vae.decode(latents_BCTHW, chunk_latents=clip.chunk_latents):
        del chunk_BCFYX


def _peak_mb(subject: Subject, model: BenchModel, clip: Clip, side: Side, decode: Callable[[Tensor], object]) -> float:
    if subject.device.type == "cuda":
        latents_BCTHW = subject.latents(clip)
        num_bytes = peak_allocated_bytes(subject.device, lambda: decode(latents_BCTHW))
    else:
        num_bytes = peak_growth_bytes(prepare_decode, model, clip, side)
    return num_bytes / 1e6
