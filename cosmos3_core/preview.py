"""Previews: cheap small pictures of a clip while it is denoised.

Every step of the solver predicts x_0; a linear map turns its channels into colours, one pixel a latent position.
:mod:`cosmos3_core.preview_fit` fits the map of a VAE. No torch here: a process can pass a map on without it.

Shape letters: B batch, C latent channels, R the three colours, T/H/W latent frames, rows, columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cosmos3_core.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

Colour = tuple[float, float, float]

MAX_PREVIEWS = 32
"""Most previews of one request."""


@dataclass(frozen=True)
class PreviewMap:
    """Latents -> colours: the mean colour of a latent position's pixels, as a linear function of its channels.

    Attributes:
        weights: red, green and blue per latent channel; colours are in [-1, 1], latents normalised.
        bias: red, green and blue of all-zero channels.

    Raises:
        RequestError: these are not finite numbers of these shapes.
    """

    weights: tuple[Colour, ...]
    bias: Colour

    def __post_init__(self) -> None:
        for row in (*self.weights, self.bias):
            if len(row) != 3 or not all(math.isfinite(value) for value in row):
                raise RequestError("preview_map", row, "three finite numbers a channel, and three for the bias")

    def colours(self, x0_BCTHW: Tensor) -> Tensor:
        """Convert a prediction to colours, on its device.

        Costs T x H x W x C x 3 x 2 FLOP: 0.05 GFLOP for 189 frames of 720 x 1280; a denoising step takes 3,650,000
        GFLOP.

        Args:
            x0_BCTHW: [1, C, T, H, W], normalised; ``x0[0]`` of a :class:`cosmos3_core.sampler.unipc.SolverState`.

        Returns:
            uint8 RGB [T, H, W, 3].

        Raises:
            RequestError: the prediction has another shape.
        """
        import torch

        from cosmos3_core.media.pixels import to_uint8

        shape, num_channels = tuple(x0_BCTHW.shape), len(self.weights)
        if len(shape) != 5 or shape[:2] != (1, num_channels):
            raise RequestError("x0", shape, f"(1, {num_channels}, frames, rows, columns)", "the map is another VAE's")
        weights_CR = torch.tensor(self.weights, dtype=torch.float32, device=x0_BCTHW.device)
        bias_R = torch.tensor(self.bias, dtype=torch.float32, device=x0_BCTHW.device)
        colours_BRTHW = torch.einsum("bcthw,cr->brthw", x0_BCTHW.float(), weights_CR) + bias_R.view(3, 1, 1, 1)
        return to_uint8(colours_BRTHW)


@dataclass(frozen=True)
class PreviewOrder:
    """The previews that a request orders.

    Attributes:
        num_previews: upper bound of their number, spread evenly over the steps; 1 to :data:`MAX_PREVIEWS`.
        duration_s: playing time of the clip.
        preview_map: map of the VAE that will decode it.
    """

    num_previews: int
    duration_s: float
    preview_map: PreviewMap

    def period_steps(self, num_steps: int) -> int:
        """Return the steps between previews; none follows the last step, because the clip itself does."""
        return -(-num_steps // (self.num_previews + 1))

    def fps(self, num_frames: int) -> float:
        """Return the frames per second of a preview: it plays as long as the clip, at one second per frame at most."""
        return max(num_frames / self.duration_s, 1.0)


def pick_evenly(num_items: int, at_most: int) -> list[int]:
    """Return the indices of up to ``at_most`` of ``num_items`` items, evenly spaced from the first one."""
    num_taken = min(num_items, at_most)
    return [index * num_items // num_taken for index in range(num_taken)]
