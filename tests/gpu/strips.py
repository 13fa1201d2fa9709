"""Frames split over all devices against whole ones on each: the video VAE's decode and encode, over NCCL.

In fp32, with TF32 off, only the kernels' order of sums differs, which cuDNN picks by size. In bf16 every size rounds
otherwise: what is split may be as far from fp32 as what is whole, and half as far again.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_video_vae
from cosmos3_core.parallel.groups import Groups, connect
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.parallel.strips import strip_of
from cosmos3_core.vae.frame_part import WHOLE, FramePart
from tests.gpu.verdict import Verdict, run_check
from tests.ranks import run_layouts

FP32_TOLERANCE = 1e-4
BF16_FACTOR = 1.5

# Latent frames, rows, columns; latent frames a chunk. Columns are cut, then rows, and never evenly by 2, 3 or 4.
_CLIPS = (((4, 5, 13), 1), ((5, 13, 5), 2))

Distances = dict[str, float]
"""Of every result: a relative norm, or how many times one is another."""


def check_strips(checkpoint: Path, device: str, num_devices: int) -> list[Verdict]:
    """A verdict for each dtype; skipped where there is one device.

    Args:
        checkpoint: of any variant.
        device: "cuda", a GPU a rank, or "cpu".
        num_devices: how many ranks share a frame.
    """
    names = ["strips of frames, float32", "strips of frames, bfloat16"]
    if num_devices < 2:
        return [Verdict(name, "skip", "needs 2 devices, there is 1") for name in names]
    found: list[tuple[Distances, Distances]] = []

    def exact() -> str:
        found.extend(run_layouts(distances_in_both, [Layout(sp=num_devices)], checkpoint, device=device)[0])
        return _judge([distance for fp32, _ in found for distance in fp32.values()], FP32_TOLERANCE, "from the whole")

    def judge_served() -> str:
        ratios = [ratio for _, bf16 in found for ratio in bf16.values()]
        return _judge(ratios, BF16_FACTOR, "times as far from fp32 as the whole")

    return [run_check(name, run) for name, run in zip(names, (exact, judge_served), strict=True)]


def distances_in_both(groups: Groups, device: torch.device, checkpoint: Path) -> tuple[Distances, Distances]:
    """A rank's work: how far split is from whole in fp32; how many times as far from fp32 in bf16 as the whole is."""
    connect(groups.everyone, device)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        split, whole, split_bf16, whole_bf16 = (
            _results(groups, device, checkpoint, dtype, is_split=is_split)
            for dtype in (torch.float32, torch.bfloat16)
            for is_split in (True, False)
        )
    exact = {name: _distance(split[name], whole[name]) for name in whole}
    served = {
        name: _distance(split_bf16[name], whole[name]) / _distance(whole_bf16[name], whole[name]) for name in whole
    }
    return exact, served


def _results(
    groups: Groups, device: torch.device, checkpoint: Path, dtype: torch.dtype, *, is_split: bool
) -> dict[str, Tensor]:
    """Whole frames of every clip, decoded, and the latents of one of its size, encoded."""
    vae = load_video_vae(CheckpointLayout.open(checkpoint), device=device, dtype=dtype)
    results, generator = {}, torch.Generator().manual_seed(0)
    for grid, chunk_latents in _CLIPS:
        num_latents, height, width = grid
        strip = strip_of(groups.everyone, height, width)
        if strip.axis is None:
            raise AssertionError(f"{strip.ranks.num_ranks} devices are too many for {height} x {width} latents")
        part: FramePart = strip if is_split else WHOLE
        side, num_frames = vae.geometry.spatial, vae.geometry.num_pixel_frames(num_latents)
        latents = torch.randn((1, vae.geometry.channels, *grid), generator=generator)
        pixels = torch.rand((1, 3, num_frames, height * side, width * side), generator=generator) * 2 - 1
        chunks = [part.share(chunk) for chunk in vae.decode(latents, chunk_latents=chunk_latents, part=part)]
        results[f"decode {grid}"] = torch.cat(chunks, dim=2).float().cpu()
        results[f"encode {grid}"] = vae.encode(pixels, part=part).float().cpu()
    return results


def _judge(figures: list[float], allowed: float, unit: str) -> str:
    if not figures:
        raise AssertionError("no figures: the ranks failed")
    said = f"{max(figures):.1e} {unit}, allowed {allowed:.1e}"
    if not all(figure <= allowed for figure in figures):  # NaN is a fault too
        raise AssertionError(said)
    return said


def _distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
