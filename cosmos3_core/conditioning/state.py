"""A request's input of the denoising loop, one value a modality. The loop never learns the mode.

Shape letters: B batch (always 1), C channels, T/H/W latent grid, S generated tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LatentState:
    """One modality at the start of denoising.

    Attributes:
        latent: where denoising starts, fp32: video [1, C, T, H, W], sound [C, T], actions [T, C].
        noise_mask: 1 where a latent frame is to be denoised, 0 where it is a clean condition; [T] fp32.
        moves: 1 where denoising changes a value, 0 where it stays as it is; fp32, of a shape that broadcasts to
            ``latent``'s.
        positions: of the modality's tokens before they move behind a prompt, [3, S] fp32.
    """

    latent: Tensor
    noise_mask: Tensor
    moves: Tensor
    positions: Tensor

    @property
    def is_fixed(self) -> bool:
        """Whether some of it stays as it is."""
        return not bool(self.moves.all())
