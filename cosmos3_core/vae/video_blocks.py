"""Causal convolution, norm, residual block and mid-block of the Wan 2.2 video VAE; no resampling here.

Tensors end in their axes:
    B batch, C channels, T frames, H rows, W columns of the grid at the level in question (latent grid at the bottom,
    patched pixels at the top), K = B x T frames folded into the batch, S = H x W positions of one frame; a 1 is an axis
    of one. ``_BC`` alone: any axes may follow.

A causal convolution sees the chunk it is given and the frames before it. Those frames are the clip's, not the
module's: they travel in a :class:`FrameCache` that is made per clip and handed down through every ``forward``.
All of this is for inference: outputs that nobody else holds are changed in place.

Source: the architecture of the published AutoencoderKLWan weights in the Wan 2.2 (residual) layout.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Vectors shorter than this are divided by it instead of by their length.
_MIN_NORM = 1e-12


class FrameCache:
    """The input frames that one clip's causal convolutions carry from chunk to chunk.

    Attributes:
        frames: per convolution, at its ``slot``: the last frames of its window [B, C, num_history, rows, columns],
            border included; None stands for zeros, the past of a clip that has just begun.
        is_first_chunk: nothing of the clip has passed yet. Resampling in time treats the first frame apart.
    """

    def __init__(self, frames: Iterable[Tensor | None], *, is_first_chunk: bool) -> None:
        self.frames = list(frames)
        self.is_first_chunk = is_first_chunk

    @classmethod
    def empty(cls, num_slots: int) -> FrameCache:
        """The cache of a clip that has not begun."""
        return cls([None] * num_slots, is_first_chunk=True)


class CausalConv3d(nn.Conv3d):
    """3D convolution that looks back in time, never ahead.

    It runs in two steps, ``conv(conv.window(x, cache))``: :meth:`window` lays history, chunk and a zero border into one
    buffer, the convolution itself pads nothing. Whoever splits frames over ranks fills the border otherwise and leaves
    the rest as it is. A kernel of one needs no window and takes ``x`` itself.

    Args:
        in_channels, out_channels: channels before and after.
        kernel: time, rows, columns; odd.
        time_stride: step in time; rows and columns always step by one.
    """

    slot: int
    """Where this convolution's frames are in a :class:`FrameCache`; set by :func:`number_slots`."""

    def __init__(self, in_channels: int, out_channels: int, kernel: tuple[int, int, int], time_stride: int = 1) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=(time_stride, 1, 1))
        # Each output's window lies `time_stride` frames behind the one before: so many of its frames have been seen.
        self.num_history = kernel[0] - time_stride
        self.border_HW = (kernel[1] // 2, kernel[2] // 2)

    def window(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """``x`` behind its history and inside a zero border, in the weight's memory format; updates ``cache``.

        Returns:
            [B, C, num_history + T, H + 2 border, W + 2 border]
        """
        batch, channels, num_frames, height, width = x_BCTHW.shape
        border_H, border_W = self.border_HW
        # One buffer, each element written once: joining and then padding would write the frames twice.
        window_BCTHW = torch.empty(
            (batch, channels, self.num_history + num_frames, height + 2 * border_H, width + 2 * border_W),
            dtype=x_BCTHW.dtype,
            device=x_BCTHW.device,
            memory_format=self._memory_format(),
        )
        history = cache.frames[self.slot]
        past, present = window_BCTHW.split([self.num_history, num_frames], dim=2)
        if history is None:
            past.zero_()
        else:
            past.copy_(history)
        if border_H:
            present[:, :, :, :border_H].zero_()
            present[:, :, :, -border_H:].zero_()
        if border_W:
            present[..., :border_W].zero_()
            present[..., -border_W:].zero_()
        present[:, :, :, border_H : border_H + height, border_W : border_W + width].copy_(x_BCTHW)
        self.remember(window_BCTHW, cache)
        return window_BCTHW

    def remember(self, window_BCTHW: Tensor, cache: FrameCache) -> None:
        """Keep the last frames of ``window`` for the next chunk."""
        # A copy: a view would keep the whole window alive until the next chunk.
        cache.frames[self.slot] = window_BCTHW[:, :, -self.num_history :].clone()

    def _memory_format(self) -> torch.memory_format:
        # Were the two to differ, the convolution would convert its input at every call.
        if self.weight.is_contiguous():
            return torch.contiguous_format
        is_channels_last = self.weight.is_contiguous(memory_format=torch.channels_last_3d)
        return torch.channels_last_3d if is_channels_last else torch.contiguous_format


def number_slots(network: nn.Module) -> int:
    """Give every causal convolution of ``network`` that looks back a slot of its own; returns how many there are."""
    looking_back = [module for module in network.modules() if isinstance(module, CausalConv3d) and module.num_history]
    for slot, conv in enumerate(looking_back):
        conv.slot = slot
    return len(looking_back)


class RMSNorm(nn.Module):
    """Every position's channel vector scaled to length sqrt(C), times a learned gain per channel.

    Args:
        num_channels: C.
        num_grid_axes: axes behind the channels, 3 for clips and 2 for frames; the published gain has an axis for each.
    """

    def __init__(self, num_channels: int, *, num_grid_axes: int) -> None:
        super().__init__()
        self.scale = num_channels**0.5
        self.gamma = nn.Parameter(torch.ones(num_channels, *[1] * num_grid_axes))

    def forward(self, x_BC: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, a new tensor. Lengths and quotients are fp32, also for a narrower ``x``."""
        wide = torch.promote_types(x_BC.dtype, torch.float32)
        length_B1 = torch.linalg.vector_norm(x_BC, dim=1, keepdim=True, dtype=wide).clamp_min_(_MIN_NORM)
        # `out` rounds the wide quotient into place, so that no wide copy of the activations is ever held.
        unit_BC = torch.div(x_BC, length_B1, out=torch.empty_like(x_BC))
        return unit_BC.mul_(self.scale).mul_(self.gamma)


class RMSNormSiLU(RMSNorm):
    """The norm and the SiLU between it and a convolution: one module, so that one kernel can take over both."""

    def __init__(self, num_channels: int) -> None:
        super().__init__(num_channels, num_grid_axes=3)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape, a new tensor."""
        return F.silu(super().forward(x_BCTHW), inplace=True)


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each behind norm and SiLU, around a shortcut (1x1x1 where the width changes)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.norm1 = RMSNormSiLU(in_channels)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3))
        self.norm2 = RMSNormSiLU(out_channels)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3))
        self.conv_shortcut = CausalConv3d(in_channels, out_channels, (1, 1, 1)) if in_channels != out_channels else None

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T, H, W], a new tensor."""
        # `y` is rebound at every step: what it held before is free again by the time the convolution runs.
        y_BCTHW = self.conv1.window(self.norm1(x_BCTHW), cache)
        y_BCTHW = self.conv1(y_BCTHW)
        y_BCTHW = self.norm2(y_BCTHW)
        y_BCTHW = self.conv2.window(y_BCTHW, cache)
        y_BCTHW = self.conv2(y_BCTHW)
        shortcut_BCTHW = x_BCTHW if self.conv_shortcut is None else self.conv_shortcut(x_BCTHW)
        return y_BCTHW.add_(shortcut_BCTHW)


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of each frame, the only part that sees a whole frame at once."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = RMSNorm(num_channels, num_grid_axes=2)
        self.to_qkv = nn.Conv2d(num_channels, 3 * num_channels, 1)
        self.proj = nn.Conv2d(num_channels, num_channels, 1)

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, C, T, H, W] -> the same shape, a new tensor, the input added."""
        x_KCHW = fold_frames(x_BCTHW)
        # The three maps lie side by side in the channels; one contiguous transpose serves all of them.
        qkv_KSC = self.to_qkv(self.norm(x_KCHW)).flatten(2).transpose(1, 2).contiguous()
        q_K1SC, k_K1SC, v_K1SC = qkv_KSC.unsqueeze(1).chunk(3, dim=-1)
        y_KCS = F.scaled_dot_product_attention(q_K1SC, k_K1SC, v_K1SC).squeeze(1).transpose(1, 2)
        y_KCHW = self.proj(y_KCS.reshape(x_KCHW.shape))
        return unfold_frames(y_KCHW, x_BCTHW.shape[0]).add_(x_BCTHW)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the bottom of encoder and decoder."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(num_channels)])
        self.resnets = nn.ModuleList([ResidualBlock(num_channels, num_channels) for _ in range(2)])

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] -> the same shape, a new tensor."""
        x_BCTHW = self.resnets[0](x_BCTHW, cache)
        x_BCTHW = self.attentions[0](x_BCTHW)
        return self.resnets[1](x_BCTHW, cache)


def fold_frames(x_BCTHW: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W], for what treats every frame by itself."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def unfold_frames(x_KCHW: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W], a view."""
    return x_KCHW.unflatten(0, (batch, -1)).transpose(1, 2)
