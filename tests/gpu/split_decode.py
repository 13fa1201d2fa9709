"""How long the video VAE's decode takes on one device, and split over all of them.

    python -m tests.gpu.split_decode                  # all GPUs: 189 frames of 1280 x 720, Nano's size, bf16
    python -m tests.gpu.split_decode --num-devices 2
    python -m tests.gpu.split_decode --device cpu --num-devices 2 --model tiny --num-frames 9 --height 96 --width 160

Weights are random and latents are noise: of neither do the seconds depend. It starts a process a device by itself.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from cosmos3_core.bench.ours import video_vae
from cosmos3_core.bench.subject import RANDOM_MODELS, random_subject
from cosmos3_core.device import DTYPES, describe
from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.parallel.groups import Groups, connect
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.parallel.strips import strip_of
from cosmos3_core.shapes import LatentShape
from cosmos3_core.vae.frame_part import WHOLE, FramePart
from cosmos3_core.vae.video import VideoVAE
from tests.ranks import run_layouts

ONE, OWN, GATHERED = "one, whole frames", "all, each its strip", "all, gathered on the first"

Seconds = dict[str, tuple[float, float, float]]
"""Variant -> medians of a rank's seconds to its first chunk on the host and to the last, and its peak in GiB."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Time them; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.split_decode", description="Time split decode.")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    parser.add_argument("--num-devices", type=int, help="default: all GPUs, 2 ranks on the CPU")
    parser.add_argument("--model", choices=tuple(RANDOM_MODELS), default="nano", help="default %(default)s")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="bfloat16", help="default %(default)s")
    parser.add_argument("--num-frames", type=int, default=189, help="default %(default)s")
    parser.add_argument("--height", type=int, default=720, help="default %(default)s")
    parser.add_argument("--width", type=int, default=1280, help="default %(default)s")
    parser.add_argument("--runs", type=int, default=3, help="counted ones, after one that is not; default %(default)s")
    options = parser.parse_args(arguments)
    available = torch.cuda.device_count() if options.device == "cuda" else options.num_devices or 2
    num_devices = options.num_devices or available
    if not 2 <= num_devices <= available:
        print(f"{num_devices} devices asked for, there are {available}; 2 or more are needed", file=sys.stderr)
        return 2
    clip = (options.num_frames, options.height, options.width)
    (ranks,) = run_layouts(
        time_variants, [Layout(sp=num_devices)], options.model, options.dtype, clip, options.runs, device=options.device
    )
    print(
        f"{options.num_frames} frames of {options.width}x{options.height}, {options.model}'s VAE, {options.dtype}, "
        f"{num_devices} x {describe(torch.device(options.device))}; medians of {options.runs}, the slowest rank's"
    )
    print(f"{'devices':<28}{'first chunk s':>14}{'whole clip s':>14}{'faster by':>11}{'peak GiB':>10}")
    slowest = {
        variant: [max(figures) for figures in zip(*(rank[variant] for rank in ranks), strict=True)]
        for variant in ranks[0]
    }
    for variant, (first_s, whole_s, peak_gib) in slowest.items():
        print(f"{variant:<28}{first_s:14.3f}{whole_s:14.3f}{slowest[ONE][1] / whole_s:11.2f}{peak_gib:10.2f}")
    return 0


def time_variants(
    groups: Groups, device: torch.device, model: str, dtype: str, clip: tuple[int, int, int], runs: int
) -> Seconds:
    """A rank's work. Whole frames are decoded by all ranks at once, each by itself: as one does it alone."""
    subject = random_subject(model, device, DTYPES[dtype])
    vae = video_vae(subject)
    grid = vae.geometry.latent_shape(*clip)
    latents = torch.randn((1, vae.geometry.channels, *grid), generator=torch.Generator().manual_seed(0)).to(device)
    return {
        variant: _medians(groups, device, chunks, runs)
        for variant, chunks in _find_variants(groups, vae, latents, grid).items()
    }


def _find_variants(
    groups: Groups, vae: VideoVAE, latents: Tensor, grid: LatentShape
) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """Variant -> chunks as they come to the host, in bytes; nothing on a rank that gets none."""
    strip = strip_of(groups.everyone, grid.height, grid.width)

    def own(part: FramePart) -> Iterator[Tensor]:
        return (to_uint8(chunk).cpu() for chunk in vae.decode(latents, part=part))

    def gather() -> Iterator[Tensor]:
        for chunk in vae.decode(latents, part=strip):
            frames = strip.collect(to_uint8(chunk))
            yield torch.empty(0) if frames is None else frames.cpu()

    return {ONE: lambda: own(WHOLE), OWN: lambda: own(strip), GATHERED: gather}


def _medians(
    groups: Groups, device: torch.device, chunks_of: Callable[[], Iterator[Tensor]], runs: int
) -> tuple[float, float, float]:
    timed = []
    for run in range(runs + 1):
        connect(groups.everyone, device)  # all of them start together
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
        start_s = time.perf_counter()
        chunks = chunks_of()
        next(chunks)
        first_s = time.perf_counter() - start_s
        for _ in chunks:
            pass
        if run:  # kernels are compiled and chosen in the first
            timed.append((first_s, time.perf_counter() - start_s))
    peak_gib = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")
    return *(statistics.median(figures) for figures in zip(*timed, strict=True)), peak_gib


if __name__ == "__main__":
    sys.exit(main())
