"""The video VAE's operators against their eager twins. Needs torch, no pytest."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cosmos3_core.ops import video_eager
from cosmos3_core.ops.video import IMPLEMENTATIONS

# (implementation, dtype) -> largest absolute difference from eager on inputs of unit scale. In bf16 eager rounds after
# every step, the kernels once: results pass 8, from where its numbers are 6.25e-2 apart, and one step was seen.
TOLERANCES = {
    ("triton", torch.float32): 5e-6,
    ("triton", torch.bfloat16): 7e-2,
}


@dataclass(frozen=True)
class WindowCase:
    """A chunk [B, C, T, H, W] and what is done to it."""

    shape: tuple[int, int, int, int, int]
    num_history: int = 2
    border: int = 1
    has_history: bool = True
    normed: bool = True
    has_bias: bool = True
    channels_last: bool = True


@dataclass(frozen=True)
class ShortcutCase:
    """A shortcut [B, C, T, H, W] and the voxels that each of its own becomes."""

    shape: tuple[int, int, int, int, int]
    factors: tuple[int, int, int] = (1, 1, 1)
    picks: tuple[int, int, int] = (1, 1, 1)
    is_first_frame: bool = False
    has_bias: bool = True


@dataclass(frozen=True)
class UpsampleCase:
    """A clip [B, C, T, H, W], the channels in parts."""

    shape: tuple[int, int, int, int, int]
    num_parts: int


Case = WindowCase | ShortcutCase | UpsampleCase

# The published decoder's widths, and some that fill no block; what encoder and decoder ask for.
CASES: list[Case] = [
    WindowCase((1, 1024, 1, 12, 20)),
    WindowCase((1, 256, 4, 33, 70), has_bias=False),
    WindowCase((1, 160, 4, 9, 40), has_history=False),
    WindowCase((2, 12, 1, 5, 7), has_history=False, normed=False, has_bias=False, channels_last=False),
    WindowCase((1, 512, 2, 12, 20), border=0, normed=False, has_bias=False),
    WindowCase((1, 48, 4, 6, 5), num_history=1, border=0, normed=False, has_bias=False),
    UpsampleCase((1, 2048, 2, 12, 20), 2),
    UpsampleCase((2, 24, 3, 5, 7), 2),
    UpsampleCase((1, 512, 4, 12, 20), 1),
    ShortcutCase((1, 256, 4, 33, 70)),
    ShortcutCase((2, 12, 1, 5, 7), has_bias=False),
    ShortcutCase((1, 1024, 2, 12, 20), factors=(2, 2, 2)),
    ShortcutCase((1, 1024, 1, 12, 20), factors=(2, 2, 2), is_first_frame=True),
    ShortcutCase((1, 512, 4, 12, 20), factors=(1, 2, 2), picks=(1, 2, 1)),
    ShortcutCase((1, 64, 2, 5, 7), factors=(2, 2, 2), picks=(2, 2, 1)),
    ShortcutCase((1, 64, 1, 5, 7), factors=(2, 2, 2), picks=(2, 2, 2), is_first_frame=True, has_bias=False),
]


def largest_difference(name: str, dtype: torch.dtype, device: torch.device, case: Case) -> float:
    """The largest absolute difference, on random inputs of unit scale."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    if isinstance(case, WindowCase):
        expected, result = _windows(name, draw, case)
    elif isinstance(case, UpsampleCase):
        x = draw(*case.shape).contiguous(memory_format=torch.channels_last_3d)
        expected = (video_eager.upsample(x, case.num_parts),)
        result = (IMPLEMENTATIONS[name]().upsample(x, case.num_parts),)
        assert result[0].shape == expected[0].shape
    else:
        expected, result = _sums(name, draw, case)
    differences = [(x.float() - y.float()).abs().max() for x, y in zip(expected, result, strict=True)]
    return float(torch.stack(differences).max())


def _windows(name: str, draw, case: WindowCase) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    batch, channels, _, height, width = case.shape
    last = torch.channels_last_3d
    grid = (height + 2 * case.border, width + 2 * case.border)
    x = draw(*case.shape)
    arguments = (
        x.contiguous(memory_format=last) if case.channels_last else x,
        draw(batch, channels, case.num_history, *grid) if case.has_history else None,
        case.num_history,
        (case.border, case.border),
        last,
        1 + draw(channels, 1, 1, 1) / 4 if case.normed else None,
        draw(channels) if case.has_bias else None,
    )
    expected, result = video_eager.window(*arguments), IMPLEMENTATIONS[name]().window(*arguments)
    for theirs, ours in zip(expected, result, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert ours.is_contiguous(memory_format=last)
    return expected, result


def _sums(name: str, draw, case: ShortcutCase) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    batch, channels, num_frames, height, width = case.shape
    last = torch.channels_last_3d
    time_factor, height_factor, width_factor = case.factors
    channels_out = channels
    for pick in case.picks:
        channels_out //= pick
    frames = 1 if case.is_first_frame else num_frames * time_factor
    x = draw(*case.shape).contiguous(memory_format=last)
    y = draw(batch, channels_out, frames, height * height_factor, width * width_factor).contiguous(memory_format=last)
    y_bias = draw(channels_out) if case.has_bias else None
    x_bias = draw(channels) if case.has_bias and case.factors == (1, 1, 1) else None
    rest = (x, case.factors, case.picks, y_bias, x_bias)
    return (video_eager.add_shortcut(y.clone(), *rest),), (IMPLEMENTATIONS[name]().add_shortcut(y.clone(), *rest),)
