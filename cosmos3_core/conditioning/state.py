"""A request's input to the denoising loop, one value per modality. The loop never learns the mode.

Shape letters: B batch (always 1), C channels, T/H/W latent grid, S generated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LatentState:
    """One modality at the start of denoising.

    Attributes:
        latent: the start of denoising, fp32: video [1, C, T, H, W], sound [C, T], actions [T, C].
        noise_mask: [T] fp32, 1 where a latent frame is denoised, 0 where it is a clean condition.
        free_mask: fp32, 1 where denoising changes a value, 0 where it stays; broadcasts to ``latent``'s shape.
        positions: positions of the modality's tokens before a prompt shifts them, [3, S] fp32.
    """

    latent: Tensor
    noise_mask: Tensor
    free_mask: Tensor
    positions: Tensor

    @property
    def is_partly_fixed(self) -> bool:
        """Whether denoising leaves some of it unchanged."""
        return not bool(self.free_mask.all())

    def to(self, device: torch.device) -> LatentState:
        """Return the same state with its tensors on ``device``."""
        return LatentState(*(x.to(device) for x in (self.latent, self.noise_mask, self.free_mask, self.positions)))

    def restore(self, sample: Tensor) -> Tensor:
        """Return ``sample`` with the fixed values as they were at the start, bit for bit."""
        return torch.where(self.free_mask > 0, sample, self.latent)
