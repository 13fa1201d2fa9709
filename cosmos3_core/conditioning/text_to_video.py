"""Text to video, and to image as a clip of one frame: everything is noise, the prompt alone conditions."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.conditioning.noise import draw_noise
from cosmos3_core.conditioning.state import LatentState
from cosmos3_core.model.rope import grid_positions
from cosmos3_core.model.transformer import VIDEO
from cosmos3_core.shapes import Geometry, LatentShape


def text_to_video(
    latent_shape: LatentShape,
    *,
    fps: float,
    seed: int,
    noise: Mapping[str, Tensor] | None,
    geometry: Geometry,
    config: TransformerConfig,
) -> dict[str, LatentState]:
    """The latent states of a request without image, clip, sound or action.

    Args:
        latent_shape: latent frames, rows, columns.
        fps: pixel frames per second; sets the positions along time.
        seed: of the noise.
        noise: initial noise to use instead of drawing it.
        geometry, config: the checkpoint's.
    """
    drawn = draw_noise(seed, {VIDEO: (1, geometry.channels, *latent_shape)}, noise)
    grid = geometry.token_grid(latent_shape)
    positions = grid_positions(grid, fps=fps, temporal=geometry.temporal, config=config)
    return {VIDEO: LatentState(drawn[VIDEO], torch.ones(latent_shape.num_frames), positions)}
