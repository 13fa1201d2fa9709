"""Up and down blocks of the Wan 2.2 video VAE: residual blocks, a resampler, and a shortcut without parameters.

Axes are named as in :mod:`cosmos3_core.vae.video_blocks`; ``t``, ``h``, ``w`` count the finer voxels (2 each, or 1 in
time) in a coarse voxel.

Frame 0 of a clip stands alone: it is neither doubled nor halved in time, so a clip has 1 + k frames at the latent level
and 1 + 2k, 1 + 4k above. It is a chunk of its own: ``cache.is_first_chunk``.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_core.errors import CapabilityError
from cosmos3_core.ops.video import VideoOps
from cosmos3_core.vae.frame_part import WHOLE, FramePart
from cosmos3_core.vae.video_blocks import CausalConv3d, FrameCache, ResidualBlock, fold_frames, unfold_frames


class NearestUp2d(nn.Module):
    """Repeats every pixel 2 x 2 times, and every frame once per part of the channels."""

    def __init__(self, ops: VideoOps) -> None:
        super().__init__()
        self.ops = ops

    def forward(self, x_BCTHW: Tensor, num_parts: int) -> Tensor:
        """[B, parts C, T, H, W] -> [B T parts, C, 2H, 2W]."""
        return self.ops.upsample(x_BCTHW, num_parts)


class FrameConv2d(nn.Conv2d):
    """The 3x3 convolution of a resampler: frames folded into the batch, no cache.

    Args:
        stride: 1 after :class:`NearestUp2d`, with a border of one all around; 2 when halving, with the border of zeros
            from the module before.
        leaves_bias: whether the next operator adds the bias.
    """

    def __init__(self, num_channels: int, *, stride: int, leaves_bias: bool) -> None:
        super().__init__(num_channels, num_channels, 3, stride=stride, padding=1 if stride == 1 else 0)
        self.leaves_bias = leaves_bias

    def forward(self, x_KCHW: Tensor, part: FramePart = WHOLE) -> Tensor:
        """[K, C, H, W] -> [K, C, H or H/2, W or W/2], without the bias that it leaves."""
        padding = self.padding
        if part.axis is not None:
            if self.stride[0] == 1:
                x_KCHW, padding = F.pad(x_KCHW, (1, 1, 1, 1)), (0, 0)
            # When halving, output (i, j) reads rows 2i to 2i + 2, none above its own.
            part.fill_border(x_KCHW, before=2 - self.stride[0], after=1)
        return F.conv2d(x_KCHW, self.weight, None if self.leaves_bias else self.bias, self.stride, padding)


class Upsampler(nn.Module):
    """Doubles rows and columns, and optionally frames.

    Args:
        doubles_time: whether every frame but the clip's first becomes two.
    """

    def __init__(self, num_channels: int, ops: VideoOps, *, doubles_time: bool) -> None:
        super().__init__()
        # The published names count the parts of this sequence: "resample.1" is the convolution.
        self.resample = nn.ModuleList(
            [NearestUp2d(ops), FrameConv2d(num_channels, stride=1, leaves_bias=ops.take_bias)]
        )
        self.time_conv = CausalConv3d(num_channels, 2 * num_channels, (3, 1, 1), ops) if doubles_time else None

    @property
    def late_bias(self) -> Tensor | None:
        """Return the bias that the next operator has to add to the result; None for none."""
        conv = self.resample[1]
        assert isinstance(conv, FrameConv2d)
        return conv.bias if conv.leaves_bias else None

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or 2T, 2H, 2W], a new tensor."""
        batch, num_parts = x_BCTHW.shape[0], 1
        # The clip's first frame bypasses the convolution in time and its history, which starts with zeros at the second
        # frame.
        if self.time_conv is not None and not cache.is_first_chunk:
            # The convolution's two halves are the even and the odd frames.
            x_BCTHW, num_parts = self.time_conv(self.time_conv.window(x_BCTHW, cache)), 2
        up, conv = self.resample
        return unfold_frames(conv(up(x_BCTHW, num_parts), cache.part), batch)


class Downsampler(nn.Module):
    """Halves rows and columns, and optionally frames.

    Args:
        halves_time: whether every two frames after the clip's first become one.
    """

    def __init__(self, num_channels: int, ops: VideoOps, *, halves_time: bool) -> None:
        super().__init__()
        # A border only below and to the right; see the convolution.
        self.resample = nn.ModuleList(
            [nn.ZeroPad2d((0, 1, 0, 1)), FrameConv2d(num_channels, stride=2, leaves_bias=False)]
        )
        self.time_conv = (
            CausalConv3d(num_channels, num_channels, (3, 1, 1), ops, time_stride=2) if halves_time else None
        )

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] with even H, W -> [B, C, T or T/2, H/2, W/2], a new tensor."""
        pad, conv = self.resample
        y_BCTHW = unfold_frames(conv(pad(fold_frames(x_BCTHW)), cache.part), x_BCTHW.shape[0])
        if self.time_conv is None:
            return y_BCTHW
        if cache.is_first_chunk:
            # Unlike when doubling, the first frame is history here, without an output of its own.
            self.time_conv.remember(y_BCTHW, cache)
            return y_BCTHW
        return self.time_conv(self.time_conv.window(y_BCTHW, cache))


class DuplicateUp(nn.Module):
    """Shortcut of an up block: each finer voxel takes one value of its coarse voxel.

    With r = in_channels / out_channels, output channel c at finer position s (counted t, h, w) reads input channel
    c r + s r / (t h w): the position picks among r channels, and where r is 1 it is plain duplication.

    Args:
        in_channels, out_channels: r must be 1, or the product of the first factors (time, rows, columns).
        doubles_time: whether frames double, too.

    Raises:
        CapabilityError: r is another number, which no published checkpoint has.
    """

    def __init__(self, in_channels: int, out_channels: int, ops: VideoOps, *, doubles_time: bool) -> None:
        super().__init__()
        self.ops = ops
        self.factors = (2 if doubles_time else 1, 2, 2)
        remaining, rest = divmod(in_channels, out_channels)
        picks: list[int] = []
        for factor in self.factors:
            # The slowest positions pick a channel, the others share it.
            pick = factor if remaining > 1 else 1
            picks.append(pick)
            remaining, rest = remaining // pick, rest + remaining % pick
        if remaining != 1 or rest:
            raise CapabilityError("dim_mult", f"{in_channels} -> {out_channels} channels", "widths that halve or stay")
        self.picks = (picks[0], picks[1], picks[2])

    def forward(self, y_BCTHW: Tensor, x_BCTHW: Tensor, y_bias_C: Tensor | None) -> Tensor:
        """Add the shortcut of ``x`` to ``y`` in place; return ``y``.

        Args:
            y_BCTHW: the block's result [B, out_channels, T or 2T, 2H, 2W]; for the clip's first frame, which does not
                double, a single frame, which takes the later of its two values.
            x_BCTHW: the block's input [B, in_channels, T, H, W].
            y_bias_C: bias that the block's last convolution left to add.
        """
        return self.ops.add_shortcut(y_BCTHW, x_BCTHW, self.factors, self.picks, y_bias_C, None)


class AverageDown(nn.Module):
    """Shortcut of a down block: moves finer voxels into the channels and averages those in groups.

    Args:
        in_channels, out_channels: in_channels times the voxels that merge must be a multiple of out_channels.
        halves_time, halves_space: whether these axes shrink.

    Raises:
        CapabilityError: the channels do not divide, as in no published checkpoint.
    """

    def __init__(self, in_channels: int, out_channels: int, *, halves_time: bool, halves_space: bool) -> None:
        super().__init__()
        self.time_factor = 2 if halves_time else 1
        self.space_factor = 2 if halves_space else 1
        self.out_channels = out_channels
        if in_channels * self.time_factor * self.space_factor**2 % out_channels:
            raise CapabilityError("dim_mult", f"{in_channels} -> {out_channels} channels", "widths that double or stay")

    def forward(self, x_BCTHW: Tensor) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T/t, H/h, W/w]; a missing first frame counts as zeros."""
        num_missing = -x_BCTHW.shape[2] % self.time_factor
        if num_missing:
            x_BCTHW = F.pad(x_BCTHW, (0, 0, 0, 0, num_missing, 0))
        x_BCTtHW = x_BCTHW.unflatten(2, (-1, self.time_factor))
        x_BCTtHhWw = x_BCTtHW.unflatten(5, (-1, self.space_factor)).unflatten(4, (-1, self.space_factor))
        channels_BCTHW = x_BCTtHhWw.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
        return channels_BCTHW.unflatten(1, (self.out_channels, -1)).mean(dim=2)


class VideoUpBlock(nn.Module):
    """Residual blocks, then an :class:`Upsampler` with its shortcut, except in the decoder's last block.

    Args:
        in_channels, out_channels: channels before and after; the first residual block changes them.
        upsamples: whether rows and columns double.
        doubles_time: whether frames double, too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        ops: VideoOps,
        *,
        upsamples: bool,
        doubles_time: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(*pair, ops) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.upsampler = Upsampler(out_channels, ops, doubles_time=doubles_time) if upsamples else None
        self.shortcut = DuplicateUp(in_channels, out_channels, ops, doubles_time=doubles_time) if upsamples else None

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T or 2T, H or 2H, W or 2W], a new tensor."""
        y_BCTHW = x_BCTHW
        for resnet in self.resnets:
            y_BCTHW = resnet(y_BCTHW, cache)
        if self.upsampler is not None and self.shortcut is not None:
            y_BCTHW = self.upsampler(y_BCTHW, cache)
            self.shortcut(y_BCTHW, x_BCTHW, self.upsampler.late_bias)
        return y_BCTHW


class DownBlock(nn.Module):
    """Residual blocks, then a :class:`Downsampler` except in the encoder's last block, around a shortcut.

    Args:
        in_channels, out_channels: channels before and after; the first residual block changes them.
        downsamples: whether rows and columns halve.
        halves_time: whether frames halve, too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_res_blocks: int,
        ops: VideoOps,
        *,
        downsamples: bool,
        halves_time: bool,
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(*pair, ops) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.downsampler = Downsampler(out_channels, ops, halves_time=halves_time) if downsamples else None
        self.shortcut = AverageDown(in_channels, out_channels, halves_time=halves_time, halves_space=downsamples)

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T or T/2, H or H/2, W or W/2], a new tensor."""
        shortcut_BCTHW = self.shortcut(x_BCTHW)
        for resnet in self.resnets:
            x_BCTHW = resnet(x_BCTHW, cache)
        if self.downsampler is not None:
            x_BCTHW = self.downsampler(x_BCTHW, cache)
        return x_BCTHW.add_(shortcut_BCTHW)
