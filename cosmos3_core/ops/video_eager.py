"""Plain PyTorch operators of the video VAE: the CPU runs them, and fast implementations are compared with them.

Axes are named as in :mod:`cosmos3_core.vae.video_blocks`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# The least divisor of a vector; a shorter vector is divided by this instead of its length.
MIN_NORM = 1e-12


def channel_norm(x_BC: Tensor, gain_C: Tensor) -> Tensor:
    """Scale every position's channel vector to length sqrt(C), times a gain per channel.

    Args:
        x_BC: [B, C, ...].
        gain_C: gain, with an axis of one for each axis after the channels.

    Returns:
        The same shape, a new tensor. Lengths and quotients are fp32 for any dtype of ``x``.
    """
    wide = torch.promote_types(x_BC.dtype, torch.float32)
    length_B1 = torch.linalg.vector_norm(x_BC, dim=1, keepdim=True, dtype=wide).clamp_min_(MIN_NORM)
    # `out` rounds the fp32 quotient into place, without an fp32 copy of the activations.
    unit_BC = torch.div(x_BC, length_B1, out=torch.empty_like(x_BC))
    return unit_BC.mul_(x_BC.shape[1] ** 0.5).mul_(gain_C)


def window(
    x_BCTHW: Tensor,
    history_BCTHW: Tensor | None,
    num_history: int,
    border_HW: tuple[int, int],
    memory_format: torch.memory_format,
    gain_C111: Tensor | None,
    bias_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Build the input of a causal convolution: history, then the chunk, inside a border of zeros.

    Args:
        x_BCTHW: the chunk, before an optional norm and SiLU.
        history_BCTHW: the frames before it with their border, [B, C, num_history, H + 2 border, W + 2 border]; None
            stands for zeros.
        num_history: number of those frames, at least 1.
        border_HW: rows and columns of zeros on every side.
        gain_C111: gain of a norm to apply to the chunk, followed by SiLU; None for neither.
        bias_C: bias of the previous convolution, to add to the chunk first.

    Returns:
        The window [B, C, num_history + T, H + 2 border, W + 2 border], and a copy of its last ``num_history`` frames.
    """
    if bias_C is not None:
        x_BCTHW = x_BCTHW + bias_C.view(-1, 1, 1, 1)
    if gain_C111 is not None:
        x_BCTHW = F.silu(channel_norm(x_BCTHW, gain_C111), inplace=True)
    batch, channels, num_frames, height, width = x_BCTHW.shape
    border_H, border_W = border_HW
    # One buffer, each element written once; joining and padding would write the frames twice.
    window_BCTHW = torch.empty(
        (batch, channels, num_history + num_frames, height + 2 * border_H, width + 2 * border_W),
        dtype=x_BCTHW.dtype,
        device=x_BCTHW.device,
        memory_format=memory_format,
    )
    past, present = window_BCTHW.split([num_history, num_frames], dim=2)
    if history_BCTHW is None:
        past.zero_()
    else:
        past.copy_(history_BCTHW)
    if border_H:
        present[:, :, :, :border_H].zero_()
        present[:, :, :, -border_H:].zero_()
    if border_W:
        present[..., :border_W].zero_()
        present[..., -border_W:].zero_()
    present[:, :, :, border_H : border_H + height, border_W : border_W + width].copy_(x_BCTHW)
    # A copy: a view would keep the whole window alive until the next chunk.
    return window_BCTHW, window_BCTHW[:, :, -num_history:].clone()


def upsample(x_BCTHW: Tensor, num_parts: int) -> Tensor:
    """Repeat every pixel 2 x 2 times, and every frame as many times as the channels have parts.

    Args:
        x_BCTHW: [B, parts C, T, H, W].
        num_parts: 2 to double frames, the first half of the channels being the earlier frame; otherwise 1.

    Returns:
        [B T parts, C, 2H, 2W]: frames folded into the batch; copied values, exact in any dtype.
    """
    x_KCHW = x_BCTHW.unflatten(1, (num_parts, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 2)
    return F.interpolate(x_KCHW, scale_factor=2.0, mode="nearest-exact")


def add_shortcut(
    y_BCTHW: Tensor,
    x_BCTHW: Tensor,
    factors: tuple[int, int, int],
    picks: tuple[int, int, int],
    y_bias_C: Tensor | None,
    x_bias_C: Tensor | None,
) -> Tensor:
    """Add ``x`` to ``y`` in place, each voxel of ``x`` to its finer voxels in ``y``; return ``y``.

    Along an axis that picks, each finer voxel has its own channel: channel c of ``y`` reads one of channels c r to
    c r + r - 1 of ``x``, r the product of ``picks``, counted time slowest, columns fastest.

    Args:
        y_BCTHW: [B, C, t T, h H, w W]; or for a single frame of ``x`` one frame, the last of its t.
        x_BCTHW: [B, r C, T, H, W].
        factors: t, h, w, finer voxels along time, rows, columns; all 1 for a plain sum.
        picks: per axis its factor, or 1 if its finer voxels share a channel.
        y_bias_C, x_bias_C: biases to add, of the convolutions that made ``y`` and ``x``; ``x_bias`` only in a plain
            sum.
    """
    if y_bias_C is not None:
        y_BCTHW.add_(y_bias_C.view(-1, 1, 1, 1))
    if x_bias_C is not None:
        x_BCTHW = x_BCTHW + x_bias_C.view(-1, 1, 1, 1)
    time_factor, height_factor, width_factor = factors
    source_BCTtHhWw = x_BCTHW.unflatten(1, (-1, *picks)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    if y_BCTHW.shape[2] != x_BCTHW.shape[2] * time_factor:
        source_BCTtHhWw, time_factor = source_BCTtHhWw[:, :, :, -1:], 1
    # Both sides are views, so nothing of the finer size is allocated.
    y_BCTtHWw = y_BCTHW.unflatten(4, (-1, width_factor)).unflatten(3, (-1, height_factor))
    y_BCTtHWw.unflatten(2, (-1, time_factor)).add_(source_BCTtHhWw)
    return y_BCTHW
