"""Positions and rotary embedding: interleaved multi-axis RoPE (mRoPE) as in Qwen3-VL, with Cosmos3's time axis.

Shape letters: L text tokens, S generated tokens, D head dim, N heads. Positions are [3, tokens] float32, rows t, h, w.
Absolute positions exceed 15,000, so frequencies are computed in fp32 for any dtype of the model.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.shapes import TokenGrid


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of one token sequence, each [tokens, head_dim / 2], contiguous, in the model's dtype."""

    cos: Tensor
    sin: Tensor


def text_positions(num_tokens: int) -> Tensor:
    """Return the positions of a prompt's tokens: 0, 1, 2, ... on all three axes; [3, num_tokens] float32."""
    return torch.arange(num_tokens, dtype=torch.float32).expand(3, -1)


def grid_positions(grid: TokenGrid, *, fps: float, temporal: int, config: TransformerConfig) -> Tensor:
    """Return the positions of a clip's tokens before :func:`after_text` shifts them.

    A latent frame stands for ``temporal`` pixel frames, so frame i sits at i * base_fps / fps: the same second has the
    same position at every frame rate. A single frame has no rate and is not scaled. Tokens go by frame, then row.

    Returns:
        [3, grid.num_tokens] float32.
    """
    t_T = _times(grid.num_frames, rate=fps / temporal, base_rate=config.base_fps / temporal, first=0, config=config)
    t = t_T[:, None, None].expand(*grid)
    h = torch.arange(grid.height, dtype=torch.float32)[None, :, None].expand(*grid)
    w = torch.arange(grid.width, dtype=torch.float32)[None, None, :].expand(*grid)
    return torch.stack((t, h, w)).reshape(3, grid.num_tokens)


def track_positions(
    num_steps: int, *, rate: float, base_rate: float, config: TransformerConfig, first: int = 0
) -> Tensor:
    """Return the positions of a track with one token per step, sound or actions: only on the clip's time axis.

    Args:
        rate: steps per second.
        base_rate: positions per second.
        first: number of the first step.

    Returns:
        [3, num_steps] float32.
    """
    t = _times(num_steps, rate=rate, base_rate=base_rate, first=first, config=config)
    return torch.stack((t, torch.zeros_like(t), torch.zeros_like(t)))


def _times(num_steps: int, *, rate: float, base_rate: float, first: int, config: TransformerConfig) -> Tensor:
    t = torch.arange(num_steps, dtype=torch.float32) + first
    if config.enable_fps_modulation and num_steps > 1:
        # Two roundings, in this order: the published pipelines divide by the rate first, then multiply.
        t = t / rate * base_rate
    return t


def after_text(positions: Tensor, num_text_tokens: int, config: TransformerConfig) -> Tensor:
    """Shift the positions of generated tokens past a prompt; [3, S] -> [3, S].

    They start a fixed margin after the text, so that the two guidance branches, with prompts of different lengths,
    place the same clip differently.
    """
    offset = float(num_text_tokens + config.unified_3d_mrope_temporal_modality_margin)
    moved = (True, not config.unified_3d_mrope_reset_spatial_ids, not config.unified_3d_mrope_reset_spatial_ids)
    return torch.stack([axis + offset if move else axis for axis, move in zip(positions, moved, strict=True)])


def rope_table(positions: Tensor, config: TransformerConfig, *, device: torch.device, dtype: torch.dtype) -> RopeTable:
    """Return the rotary table of tokens at ``positions`` [3, tokens].

    Frequency slot k of head_dim / 2 turns with the row position if k % 3 == 1, with the column position if k % 3 == 2
    (each only within its section's share) and with time otherwise, so that all axes get high and low frequencies.
    """
    slots = torch.arange(config.head_dim // 2)
    axis = torch.zeros_like(slots)
    for index in (1, 2):
        axis[(slots % 3 == index) & (slots < 3 * config.rope_axes_dim[index])] = index
    frequency = 1.0 / config.rope_theta ** (torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim)
    angle = positions.to(device)[axis.to(device)].T.contiguous() * frequency.to(device)
    return RopeTable(cos=angle.cos().to(dtype), sin=angle.sin().to(dtype))


def apply_rope(x_SND: Tensor, rope: RopeTable) -> Tensor:
    """Rotate each head's pairs (i, i + D/2); [tokens, heads, D] -> the same, in x's dtype."""
    first, second = x_SND.chunk(2, dim=-1)
    cos, sin = rope.cos[:, None], rope.sin[:, None]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
