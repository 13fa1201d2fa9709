"""Causal convolution, norm, residual block and mid-block of the Wan 2.2 video VAE; no resampling here.

Tensors end in their axes:
    B batch, C channels, T frames, H rows, W columns of the grid at the level in question (latent grid at the bottom,
    patched pixels at the top), K = B x T frames folded into the batch, S = H x W positions of one frame; a 1 is an axis
    of one. ``_BC`` alone: any axes may follow.

A causal convolution sees its chunk and the frames before it. Those frames belong to the clip, not to the module: they
travel in a :class:`FrameCache`, made per clip and passed through every ``forward``. All of this is for inference: new
outputs are changed in place.

Source: the architecture of the published AutoencoderKLWan weights in the Wan 2.2 (residual) layout.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_core.ops.video import VideoOps
from cosmos3_core.ops.video_eager import channel_norm
from cosmos3_core.vae.frame_part import WHOLE, FramePart


class FrameCache:
    """History that one clip's causal convolutions carry from chunk to chunk.

    Args:
        num_slots: number of convolutions that look back.

    Attributes:
        frames: per convolution, at its ``slot``: the last frames of its window [B, C, num_history, rows, columns],
            border included; None stands for zeros, the past of a new clip.
        is_first_chunk: whether the clip is at its first chunk; resampling in time treats the first frame apart.
    """

    def __init__(self, num_slots: int, part: FramePart = WHOLE) -> None:
        self.frames: list[Tensor | None] = [None] * num_slots
        self.is_first_chunk = True
        self.part = part


class CausalConv3d(nn.Conv3d):
    """3D convolution that looks back in time, never ahead.

    It runs in two steps, ``conv(conv.window(x, cache))``: :meth:`window` copies history, chunk and a border into one
    buffer, and the convolution itself pads nothing. The border holds zeros, or the neighbouring rows or columns of
    another part. A kernel of one needs no window and takes ``x`` itself.

    Args:
        kernel: time, rows, columns; odd.
        time_stride: step in time; rows and columns always step by one.
        leaves_bias: whether the next operator adds the bias, if ``ops`` can.
    """

    slot: int
    """Index of this convolution's frames in a :class:`FrameCache`; set by :func:`number_slots`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: tuple[int, int, int],
        ops: VideoOps,
        *,
        time_stride: int = 1,
        leaves_bias: bool = False,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride=(time_stride, 1, 1))
        self.ops = ops
        self.leaves_bias = leaves_bias and ops.take_bias
        # Each output's window begins `time_stride` frames after the one before; the rest of its frames are history.
        self.num_history = kernel[0] - time_stride
        self.border_HW = (kernel[1] // 2, kernel[2] // 2)

    @property
    def late_bias(self) -> Tensor | None:
        """Return the bias that the next operator has to add; None if the convolution adds it."""
        return self.bias if self.leaves_bias else None

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, in_channels, frames, rows, columns] -> [B, out_channels, ...], without the bias that it leaves."""
        return self._conv_forward(x_BCTHW, self.weight, None if self.leaves_bias else self.bias)

    def window(
        self, x_BCTHW: Tensor, cache: FrameCache, *, norm: ChannelRMSNorm | None = None, bias_C: Tensor | None = None
    ) -> Tensor:
        """Return ``x`` after its history and inside its border, in the weight's memory format; updates ``cache``.

        Args:
            norm: norm before the convolution, with SiLU after it; None for neither.
            bias_C: bias that the previous convolution left to add.

        Returns:
            [B, C, num_history + T, H + 2 border, W + 2 border]
        """
        gain_C111 = None if norm is None else norm.gamma
        window_BCTHW, kept_BCTHW = self.ops.window(
            x_BCTHW,
            cache.frames[self.slot],
            self.num_history,
            self.border_HW,
            self.memory_format,
            gain_C111,
            bias_C,
        )
        axis = cache.part.axis
        if axis is not None and (border := self.border_HW[axis]):
            # The history has its border; that of the next chunk needs the border of these frames.
            cache.part.fill_border(window_BCTHW[:, :, self.num_history :], before=border, after=border)
            copy_border(window_BCTHW[:, :, -self.num_history :], kept_BCTHW, axis, border)
        cache.frames[self.slot] = kept_BCTHW
        return window_BCTHW

    def remember(self, frames_BCTHW: Tensor, cache: FrameCache) -> None:
        """Keep the last of ``frames`` as history, for a convolution without border that skips this chunk."""
        # A copy: a view would keep all of them alive until the next chunk.
        cache.frames[self.slot] = frames_BCTHW[:, :, -self.num_history :].clone()

    @property
    def memory_format(self) -> torch.memory_format:
        """Memory format of the weight and the input."""
        # If the two differed, the convolution would convert its input at every call.
        if self.weight.is_contiguous():
            return torch.contiguous_format
        is_channels_last = self.weight.is_contiguous(memory_format=torch.channels_last_3d)
        return torch.channels_last_3d if is_channels_last else torch.contiguous_format


def copy_border(source_HW: Tensor, target_HW: Tensor, axis: int, border: int) -> None:
    """Copy the first and the last ``border`` rows or columns along ``axis`` between tensors of one shape."""
    for start in (0, source_HW.shape[axis] - border):
        target_HW.narrow(axis, start, border).copy_(source_HW.narrow(axis, start, border))


def number_slots(network: nn.Module) -> int:
    """Number the slots of all causal convolutions that look back; return how many there are."""
    looking_back = [module for module in network.modules() if isinstance(module, CausalConv3d) and module.num_history]
    for slot, conv in enumerate(looking_back):
        conv.slot = slot
    return len(looking_back)


class ChannelRMSNorm(nn.Module):
    """Scales every position's channel vector to length sqrt(C), times a learned gain per channel.

    Before a causal convolution it only holds the gain: norm, SiLU and window are one operator.

    Args:
        num_grid_axes: axes after the channels, 3 for clips and 2 for frames; the published gain has an axis for each.
    """

    def __init__(self, num_channels: int, *, num_grid_axes: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(num_channels, *[1] * num_grid_axes))

    def forward(self, x_BC: Tensor) -> Tensor:
        """[B, C, ...] -> the same shape, a new tensor."""
        return channel_norm(x_BC, self.gamma)


class ResidualBlock(nn.Module):
    """Two causal 3x3x3 convolutions, each after norm and SiLU, around a shortcut (1x1x1 if the width changes)."""

    def __init__(self, in_channels: int, out_channels: int, ops: VideoOps) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = ChannelRMSNorm(in_channels, num_grid_axes=3)
        self.conv1 = CausalConv3d(in_channels, out_channels, (3, 3, 3), ops, leaves_bias=True)
        self.norm2 = ChannelRMSNorm(out_channels, num_grid_axes=3)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3), ops, leaves_bias=True)
        changes_width = in_channels != out_channels
        self.conv_shortcut = (
            CausalConv3d(in_channels, out_channels, (1, 1, 1), ops, leaves_bias=True) if changes_width else None
        )

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T, H, W], a new tensor."""
        # `y` is rebound at every step, so that the previous tensor is free when the convolution runs.
        y_BCTHW = self.conv1.window(x_BCTHW, cache, norm=self.norm1)
        y_BCTHW = self.conv1(y_BCTHW)
        y_BCTHW = self.conv2.window(y_BCTHW, cache, norm=self.norm2, bias_C=self.conv1.late_bias)
        y_BCTHW = self.conv2(y_BCTHW)
        same = (1, 1, 1)
        if self.conv_shortcut is None:
            return self.ops.add_shortcut(y_BCTHW, x_BCTHW, same, same, self.conv2.late_bias, None)
        shortcut_BCTHW, shortcut_bias = self.conv_shortcut(x_BCTHW), self.conv_shortcut.late_bias
        return self.ops.add_shortcut(y_BCTHW, shortcut_BCTHW, same, same, self.conv2.late_bias, shortcut_bias)


class FrameAttention(nn.Module):
    """Single-head self-attention among the positions of each frame, the only layer that needs whole frames."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(num_channels, num_grid_axes=2)
        self.to_qkv = nn.Conv2d(num_channels, 3 * num_channels, 1)
        self.proj = nn.Conv2d(num_channels, num_channels, 1)

    def forward(self, x_BCTHW: Tensor, part: FramePart) -> Tensor:
        """[B, C, T, H, W] -> the same shape, a new tensor with the input added; queries are this part's positions."""
        x_KCHW = fold_frames(x_BCTHW)
        # The three maps are adjacent in the channels; one contiguous transpose serves all of them.
        qkv_KHWC = self.to_qkv(self.norm(x_KCHW)).movedim(1, -1).contiguous()
        num_channels = x_KCHW.shape[1]
        q_K1SC = qkv_KHWC[..., :num_channels].flatten(1, 2).unsqueeze(1)
        kv_K1SC = part.gather(qkv_KHWC[..., num_channels:]).flatten(1, 2).unsqueeze(1)
        k_K1SC, v_K1SC = kv_K1SC.chunk(2, dim=-1)
        y_KCS = F.scaled_dot_product_attention(q_K1SC, k_K1SC, v_K1SC).squeeze(1).transpose(1, 2)
        y_KCHW = self.proj(y_KCS.reshape(x_KCHW.shape))
        return unfold_frames(y_KCHW, x_BCTHW.shape[0]).add_(x_BCTHW)


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the bottom of encoder and decoder."""

    def __init__(self, num_channels: int, ops: VideoOps) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([FrameAttention(num_channels)])
        self.resnets = nn.ModuleList([ResidualBlock(num_channels, num_channels, ops) for _ in range(2)])

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] -> the same shape, a new tensor."""
        x_BCTHW = self.resnets[0](x_BCTHW, cache)
        x_BCTHW = self.attentions[0](x_BCTHW, cache.part)
        return self.resnets[1](x_BCTHW, cache)


def fold_frames(x_BCTHW: Tensor) -> Tensor:
    """[B, C, T, H, W] -> [B T, C, H, W], for layers that treat frames one by one."""
    return x_BCTHW.transpose(1, 2).flatten(0, 1)


def unfold_frames(x_KCHW: Tensor, batch: int) -> Tensor:
    """[B T, C, H, W] -> [B, C, T, H, W], a view."""
    return x_KCHW.unflatten(0, (batch, -1)).transpose(1, 2)
