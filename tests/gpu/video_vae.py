"""The video VAE on the device against the CPU: other kernels, another layout in memory, larger chunks, one clip."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_video_vae
from cosmos3_core.device import resolve_device
from tests.gpu.verdict import Verdict, checked

FP32_TOLERANCE = 1e-4
# Of bf16 runs, relative to the error that the CPU's own bf16 run makes.
BF16_FACTOR = 1.5

_GRID = (4, 7, 9)


def check_video_vae(checkpoint: Path, device: str) -> list[Verdict]:
    """A verdict for each dtype."""
    return [
        checked("video VAE's decode, float32", lambda: _exact(checkpoint, device)),
        checked("video VAE's decode, bfloat16", lambda: _served(checkpoint, device)),
    ]


def _exact(checkpoint: Path, device: str) -> str:
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = _decoded(checkpoint, "cpu", torch.float32, 1)
        # One by one, and in chunks that end with a shorter one.
        differences = [
            _distance(_decoded(checkpoint, device, torch.float32, chunk_latents), expected) for chunk_latents in (1, 2)
        ]
    said = f"{', '.join(f'{difference:.1e}' for difference in differences)} away from the CPU"
    if not all(difference <= FP32_TOLERANCE for difference in differences):  # NaN is a fault too
        raise AssertionError(f"{said}, allowed {FP32_TOLERANCE:.1e}")
    return f"{said}, allowed {FP32_TOLERANCE:.1e}"


def _served(checkpoint: Path, device: str) -> str:
    expected = _decoded(checkpoint, "cpu", torch.float32, 1)
    allowed = BF16_FACTOR * _distance(_decoded(checkpoint, "cpu", torch.bfloat16, 1), expected)
    difference = _distance(_decoded(checkpoint, device, torch.bfloat16, 1), expected)
    said = f"{difference:.1e} away from fp32, allowed {allowed:.1e}"
    if not difference <= allowed:
        raise AssertionError(said)
    return said


def _decoded(checkpoint: Path, device: str, dtype: torch.dtype, chunk_latents: int) -> Tensor:
    vae = load_video_vae(
        CheckpointLayout.open(checkpoint), device=resolve_device(device), dtype=dtype, with_encoder=False
    )
    latents = torch.randn((1, 48, *_GRID), generator=torch.Generator().manual_seed(0))
    return torch.cat([chunk.float().cpu() for chunk in vae.decode(latents, chunk_latents=chunk_latents)], dim=2)


def _distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
