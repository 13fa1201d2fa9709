"""A video VAE of the published layout and a few channels, and clips for it. Needs torch, no pytest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import VideoVAEConfig


def small_config() -> VideoVAEConfig:
    values = torch.rand(2, 48, generator=torch.Generator().manual_seed(5))
    return VideoVAEConfig(
        base_dim=8,
        decoder_base_dim=8,
        z_dim=48,
        latents_mean=tuple((values[0] - 0.5).tolist()),
        latents_std=tuple((values[1] + 0.5).tolist()),
    )


def random_latents(grid: Sequence[int], *, batch: int = 1, seed: int = 1) -> Tensor:
    return torch.randn(batch, 48, *grid, generator=torch.Generator().manual_seed(seed))


def random_pixels(num_frames: int, height: int, width: int, *, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, num_frames, height, width, generator=torch.Generator().manual_seed(2)) * 2 - 1
