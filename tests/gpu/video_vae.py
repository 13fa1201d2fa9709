"""The video VAE on the device against the CPU: other kernels, another layout in memory, larger chunks, one clip."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_video_vae
from cosmos3_core.device import HostCopies, resolve_device
from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.vae.to_host import frames_on_host
from tests.gpu.verdict import Verdict, run_check

FP32_TOLERANCE = 1e-4
# Of bf16 runs, relative to the error that the CPU's own bf16 run makes.
BF16_FACTOR = 1.5

_GRID = (4, 7, 9)
# Pixel frames of chunks: larger and smaller ones, so that buffers grow and are used in part.
_CHUNK_FRAMES = (1, 4, 4, 2, 8, 3, 8, 16, 1, 16, 16, 5)


def check_video_vae(checkpoint: Path, device: str) -> list[Verdict]:
    """A verdict for each dtype, and for the way to the host."""
    return [
        run_check("video VAE's decode, float32", lambda: _exact(checkpoint, device)),
        run_check("video VAE's decode, bfloat16", lambda: _check_served(checkpoint, device)),
        run_check("frames on their way to the host", lambda: _on_host(resolve_device(device))),
    ]


def _exact(checkpoint: Path, device: str) -> str:
    with torch.backends.cudnn.flags(allow_tf32=False):
        expected = _decode(checkpoint, "cpu", torch.float32, 1)
        # One by one, and in chunks that end with a shorter one.
        differences = [
            _distance(_decode(checkpoint, device, torch.float32, chunk_latents), expected) for chunk_latents in (1, 2)
        ]
    said = f"{', '.join(f'{difference:.1e}' for difference in differences)} away from the CPU"
    if not all(difference <= FP32_TOLERANCE for difference in differences):  # NaN is a fault too
        raise AssertionError(f"{said}, allowed {FP32_TOLERANCE:.1e}")
    return f"{said}, allowed {FP32_TOLERANCE:.1e}"


def _check_served(checkpoint: Path, device: str) -> str:
    expected = _decode(checkpoint, "cpu", torch.float32, 1)
    allowed = BF16_FACTOR * _distance(_decode(checkpoint, "cpu", torch.bfloat16, 1), expected)
    difference = _distance(_decode(checkpoint, device, torch.bfloat16, 1), expected)
    said = f"{difference:.1e} away from fp32, allowed {allowed:.1e}"
    if not difference <= allowed:
        raise AssertionError(said)
    return said


def _on_host(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    made = [(torch.rand((1, 3, frames, 192, 320), generator=generator) * 2 - 1).to(device) for frames in _CHUNK_FRAMES]
    expected = [to_uint8(pixels).cpu().numpy() for pixels in made]
    busy = torch.ones((4096, 4096) if device.type == "cuda" else (1, 1), device=device)

    def chunks() -> Iterator[Tensor]:
        for pixels in made:
            work = busy
            for _ in range(8):
                work = work @ busy  # a copy that did not wait for this would find another chunk's bytes
            yield pixels + 0 * work[0, 0].clamp(0, 1)

    num_chunks = 0
    for frames, wanted in zip(frames_on_host(chunks(), HostCopies(device)), expected, strict=True):
        if not np.array_equal(frames, wanted):
            raise AssertionError(f"chunk {num_chunks} has other bytes")
        num_chunks += 1
    return f"{num_chunks} chunks of {min(_CHUNK_FRAMES)} to {max(_CHUNK_FRAMES)} frames, the bytes of a plain copy"


def _decode(checkpoint: Path, device: str, dtype: torch.dtype, chunk_latents: int) -> Tensor:
    vae = load_video_vae(
        CheckpointLayout.open(checkpoint), device=resolve_device(device), dtype=dtype, with_encoder=False
    )
    latents = torch.randn((1, 48, *_GRID), generator=torch.Generator().manual_seed(0))
    return torch.cat([chunk.float().cpu() for chunk in vae.decode(latents, chunk_latents=chunk_latents)], dim=2)


def _distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
