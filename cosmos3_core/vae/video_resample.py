"""Up and down blocks of the Wan 2.2 video VAE: residual blocks, a resampler, and a shortcut without parameters.

Axes are named as in :mod:`cosmos3_core.vae.video_blocks`; ``t``, ``h``, ``w`` count the finer voxels (2 each, or 1 in
time) that one coarse voxel stands for.

Frame 0 of a clip stands alone: it is neither doubled nor halved in time, so a clip has 1 + k frames at the latent level
and 1 + 2k, 1 + 4k above. It arrives as a chunk of its own, which is what ``cache.is_first_chunk`` tells.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_core.errors import CapabilityError
from cosmos3_core.vae.video_blocks import CausalConv3d, FrameCache, ResidualBlock, fold_frames, unfold_frames


class NearestUp2d(nn.Module):
    """Every pixel becomes 2 x 2 of it."""

    def forward(self, x_KCHW: Tensor) -> Tensor:
        """[K, C, H, W] -> [K, C, 2H, 2W]. A copy of values: exact in any dtype."""
        return F.interpolate(x_KCHW, scale_factor=2.0, mode="nearest-exact")


class FrameConv2d(nn.Conv2d):
    """The 3x3 convolution of a resampler: frames folded into the batch, no cache.

    Args:
        num_channels: before and after.
        stride: 1 behind :class:`NearestUp2d`, with a border of one all around; 2 when halving, the border laid by the
            module in front.
    """

    def __init__(self, num_channels: int, *, stride: int) -> None:
        super().__init__(num_channels, num_channels, 3, stride=stride, padding=1 if stride == 1 else 0)


class Upsampler(nn.Module):
    """Doubles rows and columns, and frames where asked.

    Args:
        num_channels: before and after.
        doubles_time: whether every frame but the clip's first becomes two.
    """

    def __init__(self, num_channels: int, *, doubles_time: bool) -> None:
        super().__init__()
        # The published names count the parts of this sequence: "resample.1" is the convolution.
        self.resample = nn.Sequential(NearestUp2d(), FrameConv2d(num_channels, stride=1))
        self.time_conv = CausalConv3d(num_channels, 2 * num_channels, (3, 1, 1)) if doubles_time else None

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] -> [B, C, T or 2T, 2H, 2W], a new tensor."""
        batch = x_BCTHW.shape[0]
        # The clip's first frame passes by the convolution in time and is no part of its history either:
        # that starts with zeros at the second frame.
        if self.time_conv is None or cache.is_first_chunk:
            x_KCHW = fold_frames(x_BCTHW)
        else:
            x_KCHW = self._double_time(self.time_conv, x_BCTHW, cache)
        return unfold_frames(self.resample(x_KCHW), batch)

    @staticmethod
    def _double_time(time_conv: CausalConv3d, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] -> [B 2T, C, H, W]: the convolution's two halves are the even and the odd frames."""
        halves_BCTHW = time_conv(time_conv.window(x_BCTHW, cache))
        return halves_BCTHW.unflatten(1, (2, -1)).permute(0, 3, 1, 2, 4, 5).flatten(0, 2)


class Downsampler(nn.Module):
    """Halves rows and columns, and frames where asked.

    Args:
        num_channels: before and after.
        halves_time: whether every two frames after the clip's first become one.
    """

    def __init__(self, num_channels: int, *, halves_time: bool) -> None:
        super().__init__()
        # The border is below and to the right only: output (i, j) looks at rows 2i to 2i + 2.
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), FrameConv2d(num_channels, stride=2))
        self.time_conv = CausalConv3d(num_channels, num_channels, (3, 1, 1), time_stride=2) if halves_time else None

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, C, T, H, W] with even H, W -> [B, C, T or T/2, H/2, W/2], a new tensor."""
        y_BCTHW = unfold_frames(self.resample(fold_frames(x_BCTHW)), x_BCTHW.shape[0])
        if self.time_conv is None:
            return y_BCTHW
        if cache.is_first_chunk:
            # Unlike when doubling, the first frame is history here; it just has no output of its own to compute.
            self.time_conv.remember(y_BCTHW, cache)
            return y_BCTHW
        return self.time_conv(self.time_conv.window(y_BCTHW, cache))


class DuplicateUp(nn.Module):
    """Shortcut of an up block: each finer voxel takes one value of the coarse voxel that it lies in.

    With r = in_channels / out_channels, output channel c at finer position s (counted t, h, w) reads input channel
    c r + s r / (t h w): the position picks among r channels, and where r is 1 it is plain duplication.

    Args:
        in_channels, out_channels: r must be 1, or a product of the first of the factors (time, rows, columns).
        doubles_time: whether frames double too.

    Raises:
        CapabilityError: r is something else; no published checkpoint has that.
    """

    def __init__(self, in_channels: int, out_channels: int, *, doubles_time: bool) -> None:
        super().__init__()
        self.time_factor = 2 if doubles_time else 1
        remaining, rest = divmod(in_channels, out_channels)
        picks: list[int] = []
        for factor in (self.time_factor, 2, 2):
            # The slowest counted positions pick a channel, the others share it (an axis of one, to be broadcast).
            pick = factor if remaining > 1 else 1
            picks.append(pick)
            remaining, rest = remaining // pick, rest + remaining % pick
        if remaining != 1 or rest:
            raise CapabilityError("dim_mult", f"{in_channels} -> {out_channels} channels", "widths that halve or stay")
        self.picks = tuple(picks)

    def forward(self, y_BCTHW: Tensor, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """Add the shortcut of ``x`` to ``y`` in place; returns ``y``.

        Args:
            y_BCTHW: the block's result [B, out_channels, T or 2T, 2H, 2W].
            x_BCTHW: the block's input [B, in_channels, T, H, W].
            cache: tells whether this is the clip's first frame, which is not doubled: it takes the later of its two.
        """
        source_BCTtHhWw = x_BCTHW.unflatten(1, (-1, *self.picks)).permute(0, 1, 5, 2, 6, 3, 7, 4)
        time_factor = self.time_factor
        if cache.is_first_chunk:
            source_BCTtHhWw, time_factor = source_BCTtHhWw[:, :, :, -1:], 1
        # Both sides are views that differ by broadcasting alone, so nothing of the finer size is allocated.
        y_BCTtHhWw = y_BCTHW.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(2, (-1, time_factor))
        y_BCTtHhWw.add_(source_BCTtHhWw)
        return y_BCTHW


class AverageDown(nn.Module):
    """Shortcut of a down block: finer voxels move into the channels, which are then averaged in groups.

    Args:
        in_channels, out_channels: in_channels times the voxels that become one must be a multiple of out_channels.
        halves_time, halves_space: which axes shrink.

    Raises:
        CapabilityError: the channels do not divide so; no published checkpoint has that.
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


class UpBlock(nn.Module):
    """Residual blocks, then an :class:`Upsampler` with its shortcut, which the last block of the decoder lacks.

    Args:
        in_channels, out_channels: before and after; the first residual block changes the width.
        num_res_blocks: how many.
        upsamples: whether rows and columns double.
        doubles_time: whether frames double too.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, *, upsamples: bool, doubles_time: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.upsampler = Upsampler(out_channels, doubles_time=doubles_time) if upsamples else None
        self.shortcut = DuplicateUp(in_channels, out_channels, doubles_time=doubles_time) if upsamples else None

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T or 2T, H or 2H, W or 2W], a new tensor."""
        y_BCTHW = x_BCTHW
        for resnet in self.resnets:
            y_BCTHW = resnet(y_BCTHW, cache)
        if self.upsampler is not None and self.shortcut is not None:
            y_BCTHW = self.upsampler(y_BCTHW, cache)
            self.shortcut(y_BCTHW, x_BCTHW, cache)
        return y_BCTHW


class DownBlock(nn.Module):
    """Residual blocks, then a :class:`Downsampler` (the last block of the encoder has none), around a shortcut.

    Args:
        in_channels, out_channels: before and after; the first residual block changes the width.
        num_res_blocks: how many.
        downsamples: whether rows and columns halve.
        halves_time: whether frames halve too.
    """

    def __init__(
        self, in_channels: int, out_channels: int, num_res_blocks: int, *, downsamples: bool, halves_time: bool
    ) -> None:
        super().__init__()
        widths = [in_channels] + [out_channels] * num_res_blocks
        self.resnets = nn.ModuleList(ResidualBlock(*pair) for pair in zip(widths[:-1], widths[1:], strict=True))
        self.downsampler = Downsampler(out_channels, halves_time=halves_time) if downsamples else None
        self.shortcut = AverageDown(in_channels, out_channels, halves_time=halves_time, halves_space=downsamples)

    def forward(self, x_BCTHW: Tensor, cache: FrameCache) -> Tensor:
        """[B, in_channels, T, H, W] -> [B, out_channels, T or T/2, H or H/2, W or W/2], a new tensor."""
        shortcut_BCTHW = self.shortcut(x_BCTHW)
        for resnet in self.resnets:
            x_BCTHW = resnet(x_BCTHW, cache)
        if self.downsampler is not None:
            x_BCTHW = self.downsampler(x_BCTHW, cache)
        return x_BCTHW.add_(shortcut_BCTHW)
