"""Weight-normed convolutions, snake activation, residual unit and upsampling block of the audio decoder.

Tensors end in their axes: B sounds, C channels, T positions in time of the level in question; a 1 is an axis of one.
Weights are I channels in, O channels out, K taps of the kernel.

Nothing here is causal: every convolution reads both sides, and zeros beyond the ends. Each module reports its finite
receptive field (``inputs_of``), so that a long sound can be decoded in overlapping windows.

Source: the architecture of the published Cosmos3AVAEAudioTokenizer weights (the Oobleck decoder of Stable Audio, each
upsampling step made to lengthen by its stride exactly).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DILATIONS = (1, 3, 9)
_KERNEL = 7  # taps of all convolutions that see more than one position

# Keeps the reciprocal of a tiny inverse amplitude finite.
_MIN_INVERSE_AMPLITUDE = 1e-9


class WeightNorm(nn.Module):
    """A weight stored as published: direction ``weight_v``, and one magnitude ``weight_g`` per index of the first axis.

    Their product is computed for each convolution and dropped afterwards: it costs little beside the convolution, and
    holding it would double the memory of the weights.
    """

    def __init__(self, shape: tuple[int, int, int]) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.ones(shape[0], 1, 1))
        self.weight_v = nn.Parameter(torch.empty(shape))  # not drawn: on the meta device that imports sympy, 0.5 s

    def weight(self) -> Tensor:
        """Return weight_g x weight_v / |weight_v|, the length over all axes but the first."""
        return torch._weight_norm(self.weight_v, self.weight_g, 0)


class NormedConv(WeightNorm):
    """Convolution that keeps the length: half of its (odd) kernel lies on either side.

    Args:
        kernel: taps; odd.
        dilation: distance of neighbouring taps.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, *, dilation: int = 1, bias: bool = True
    ) -> None:
        super().__init__((out_channels, in_channels, kernel))
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self.dilation = dilation
        self.radius = kernel // 2 * dilation

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T]."""
        return F.conv1d(x_BCT, self.weight(), self.bias, padding=self.radius, dilation=self.dilation)

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last input position that outputs ``first`` to ``last`` depend on."""
        return first - self.radius, last + self.radius


class NormedUpsampling(WeightNorm):
    """Transposed convolution over two strides that lengthens by its stride exactly.

    Args:
        stride: the factor; 2 or more.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        # The weight is [in, out, taps]: the magnitudes belong to the input channels.
        super().__init__((in_channels, out_channels, 2 * stride))
        self.bias = nn.Parameter(torch.zeros(out_channels))
        self.stride = stride
        # An odd stride cannot be trimmed equally: one more in front, which output padding restores at the end.
        self.num_trimmed, self.num_restored = (stride + 1) // 2, stride % 2

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T x stride]."""
        return F.conv_transpose1d(
            x_BCT,
            self.weight(),
            self.bias,
            stride=self.stride,
            padding=self.num_trimmed,
            output_padding=self.num_restored,
        )

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        # Input i reaches the outputs i stride - trimmed + (0 .. 2 stride - 1).
        return (first + self.num_trimmed - self.stride) // self.stride, (last + self.num_trimmed) // self.stride


class Snake(nn.Module):
    """x + sin(frequency x)^2 / inverse amplitude, per channel; the parameters are logarithms of both."""

    def __init__(self, num_channels: int) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.zeros(1, num_channels, 1))
        self.beta = nn.Parameter(torch.zeros(1, num_channels, 1))

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, C, T] -> the same shape, a new tensor."""
        amplitude_1C1 = (self.beta.exp() + _MIN_INVERSE_AMPLITUDE).reciprocal()
        # In place after the first product: at the finest level such a tensor is hundreds of megabytes.
        return (x_BCT * self.alpha.exp()).sin_().square_().mul_(amplitude_1C1).add_(x_BCT)


class ResidualUnit(nn.Module):
    """A dilated convolution and one of a single tap, each after a snake, around a shortcut."""

    def __init__(self, num_channels: int, dilation: int) -> None:
        super().__init__()
        self.snake1 = Snake(num_channels)
        self.conv1 = NormedConv(num_channels, num_channels, _KERNEL, dilation=dilation)
        self.snake2 = Snake(num_channels)
        self.conv2 = NormedConv(num_channels, num_channels, 1)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, C, T] -> the same shape, a new tensor."""
        y_BCT = self.conv1(self.snake1(x_BCT))
        # Rebound, so that the previous tensor is free when the convolution runs.
        y_BCT = self.snake2(y_BCT)
        return self.conv2(y_BCT).add_(x_BCT)

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        return self.conv1.inputs_of(*self.conv2.inputs_of(first, last))


class AudioUpBlock(nn.Module):
    """A snake, upsampling, then three residual units of growing dilation."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.snake1 = Snake(in_channels)
        self.conv_t1 = NormedUpsampling(in_channels, out_channels, stride)
        self.res_unit1, self.res_unit2, self.res_unit3 = (ResidualUnit(out_channels, step) for step in _DILATIONS)

    def forward(self, x_BCT: Tensor) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T x stride]."""
        x_BCT = self.conv_t1(self.snake1(x_BCT))
        x_BCT = self.res_unit1(x_BCT)
        x_BCT = self.res_unit2(x_BCT)
        return self.res_unit3(x_BCT)

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        for layer in (self.res_unit3, self.res_unit2, self.res_unit1, self.conv_t1):
            first, last = layer.inputs_of(first, last)
        return first, last


class AudioDecoder(nn.Module):
    """Latents -> waveform, not clamped: the widest block first, then block by block finer and narrower.

    Args:
        widths: channels at the latents' level, then after each block.
    """

    def __init__(
        self, widths: tuple[int, ...], strides: tuple[int, ...], *, in_channels: int, out_channels: int
    ) -> None:
        super().__init__()
        self.conv1 = NormedConv(in_channels, widths[0], _KERNEL)
        self.block = nn.ModuleList(
            AudioUpBlock(wide, narrow, stride)
            for wide, narrow, stride in zip(widths[:-1], widths[1:], strides, strict=True)
        )
        self.snake1 = Snake(widths[-1])
        self.conv2 = NormedConv(widths[-1], out_channels, _KERNEL, bias=False)

    def forward(self, z_BCT: Tensor) -> Tensor:
        """[B, in_channels, T] -> [B, out_channels, T x the strides' product]."""
        x_BCT = self.conv1(z_BCT)
        for block in self.block:
            x_BCT = block(x_BCT)
        x_BCT = self.snake1(x_BCT)
        return self.conv2(x_BCT)

    def inputs_of(self, first: int, last: int) -> tuple[int, int]:
        """Return the first and last latent that samples ``first`` to ``last`` depend on."""
        blocks = cast("list[AudioUpBlock]", list(self.block))
        layers: list[NormedConv | AudioUpBlock] = [self.conv1, *blocks, self.conv2]
        for layer in reversed(layers):
            first, last = layer.inputs_of(first, last)
        return first, last
