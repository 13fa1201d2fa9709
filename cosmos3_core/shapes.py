"""The only home of the arithmetic pixels <-> latents <-> tokens, and frames <-> samples of sound.

The compression factors are not constants: :class:`Geometry` has those of the checkpoint's configs, so that another
model family can bring its own. No torch here: the HTTP edge validates sizes with this module.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from cosmos3_core.errors import RequestError

_MIN_FPS, _MAX_FPS = 1, 240


class LatentShape(NamedTuple):
    """Latent grid of one clip: frames, rows, columns."""

    num_frames: int
    height: int
    width: int


class TokenGrid(NamedTuple):
    """Token grid of one clip after patching: latent frames, patch rows, patch columns (padded up)."""

    num_frames: int
    height: int
    width: int

    @property
    def num_tokens(self) -> int:
        return self.num_frames * self.height * self.width


@dataclass(frozen=True)
class Geometry:
    """The compression factors of one checkpoint for video.

    Attributes:
        temporal: pixel frames per latent frame after the first, which stands alone (causal VAE; 4 for Wan 2.2).
        spatial: pixels per latent row or column (16).
        channels: latent channels (48).
        patch: latent rows or columns per token (2); odd grids are padded bottom and right.
    """

    temporal: int = 4
    spatial: int = 16
    channels: int = 48
    patch: int = 2

    def round_up_num_frames(self, num_frames: int) -> int:
        """Return the next clip length that the causal VAE can produce: 1 + k * temporal."""
        return -(-(num_frames - 1) // self.temporal) * self.temporal + 1

    def latent_shape(self, num_frames: int, height: int, width: int) -> LatentShape:
        """Return the latent grid of pixel frames, rows, columns; ``num_frames`` must be 1 + k * temporal."""
        return LatentShape(
            *pixel_to_latent_shape(num_frames, height, width, temporal=self.temporal, spatial=self.spatial)
        )

    def num_pixel_frames(self, num_latent_frames: int) -> int:
        """Return the number of pixel frames that latent frames decode to."""
        return (num_latent_frames - 1) * self.temporal + 1

    def token_grid(self, latent: LatentShape) -> TokenGrid:
        """Return the token grid of a latent grid, rows and columns padded up to whole patches."""
        return TokenGrid(latent.num_frames, -(-latent.height // self.patch), -(-latent.width // self.patch))

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """Return the generated video tokens of a clip given in pixels."""
        return self.token_grid(self.latent_shape(num_frames, height, width)).num_tokens


def pixel_to_latent_shape(
    num_frames: int, height: int, width: int, *, temporal: int = 4, spatial: int = 16
) -> tuple[int, int, int]:
    """Convert pixel (frames, rows, columns) to latent (frames, rows, columns).

    Name and result match PhyAI's function.
    """
    return (num_frames - 1) // temporal + 1, height // spatial, width // spatial


def chunk_latents(height: int, width: int, at_least: int) -> int:
    """Return how many latent frames to decode at a time: enough for ``at_least`` latent positions, 4 at most.

    Only the size of the frames decides (of the largest part, if they are split), so that clips of any length decode the
    same way. At most 4, because a stream of frames comes in these chunks.
    """
    return min(4, -(-at_least // (height * width)))


def frame_rate(fps: float | Fraction) -> Fraction:
    """Return the rational frame rate meant by ``fps``: 24 -> 24/1, 23.976 -> 24000/1001, 12.5 -> 25/2.

    Raises:
        RequestError: ``fps`` is not a number from 1 to 240.
    """
    is_number = isinstance(fps, int | float | Fraction) and not isinstance(fps, bool)
    if not is_number or not _MIN_FPS <= fps <= _MAX_FPS:  # NaN fails the comparison
        raise RequestError("fps", fps, f"a number from {_MIN_FPS} to {_MAX_FPS}", "use 16, 24 or 30")
    # The broadcast rates are written in decimals but mean n * 1000/1001.
    broadcast = Fraction(math.ceil(fps) * 1000, 1001)
    if abs(float(fps) - float(broadcast)) < 5e-4:
        return broadcast
    return Fraction(fps).limit_denominator(1001)


def sound_samples(num_frames: int, fps: float | Fraction, sampling_rate: int) -> int:
    """Return the samples per channel of a sound track that ends with its video, rounded down; exact arithmetic.

    Args:
        fps: frames per second, read as by :func:`frame_rate`.
        sampling_rate: samples per second (Hz).
    """
    return num_frames * sampling_rate // frame_rate(fps)


def num_sound_latents(num_frames: int, fps: float | Fraction, latent_fps: float) -> int:
    """Return the least number of sound latents that cover a clip; exact arithmetic.

    Args:
        fps: frames per second, read as by :func:`frame_rate`.
        latent_fps: sound latents per second (25).
    """
    return math.ceil(num_frames * Fraction(latent_fps) / frame_rate(fps))
