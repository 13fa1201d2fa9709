"""What a request puts into the denoising loop, one value a modality. The loop never learns the mode.

Shape letters: B batch (always 1), C channels, T/H/W latent grid, S generated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LatentState:
    """One modality at the start of denoising.

    Attributes:
        latent: where denoising starts, fp32; video is [1, C, T, H, W].
        noise_mask: 1 where a latent frame is to be denoised, 0 where it is a clean condition; [T] fp32 for video.
        positions: of the modality's tokens before they move behind a prompt, [3, S] fp32.
    """

    latent: Tensor
    noise_mask: Tensor
    positions: Tensor
