"""The video VAE's operators as Triton kernels, each one pass over memory.

Signatures and meanings are those of :mod:`cosmos3_core.ops.video_eager`; sums and quotients are fp32 throughout and
round once, at the end. A program handles a piece of one row of one frame, all channels. All strides are correct;
channels last are fast. Imported only with Triton.

Triton launches on the current device, not that of the tensors: hence ``device_of``.
"""

# Triton compiles the kernels and has no types for their arguments.
# mypy: disable-error-code="no-untyped-def, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cosmos3_core.ops.video_eager import MIN_NORM

# Elements and warps of a program, 32 elements per thread: about the fastest for every width of the published decoder on
# an H200.
_BLOCK_ELEMENTS = 4096
_NUM_WARPS = 4


def window(
    x_BCTHW: Tensor,
    history_BCTHW: Tensor | None,
    num_history: int,
    border_HW: tuple[int, int],
    memory_format: torch.memory_format,
    gain_C111: Tensor | None,
    bias_C: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Compute norm, SiLU, border, history and the next chunk's history in one kernel."""
    batch, channels, num_frames, height, width = x_BCTHW.shape
    border_H, border_W = border_HW
    height_out, width_out = height + 2 * border_H, width + 2 * border_W

    def empty(frames: int) -> Tensor:
        dims = (batch, channels, frames, height_out, width_out)
        return torch.empty(dims, dtype=x_BCTHW.dtype, device=x_BCTHW.device, memory_format=memory_format)

    window_BCTHW, kept_BCTHW = empty(num_history + num_frames), empty(num_history)
    block_C = triton.next_power_of_2(channels)
    block_W = _block_columns(block_C, width_out)
    grid = (batch * (num_history + num_frames) * height_out * triton.cdiv(width_out, block_W),)
    past_BCTHW = x_BCTHW if history_BCTHW is None else history_BCTHW
    with torch.cuda.device_of(x_BCTHW):
        _window_kernel[grid](
            x_BCTHW,
            past_BCTHW,
            x_BCTHW if gain_C111 is None else gain_C111,
            x_BCTHW if bias_C is None else bias_C,
            window_BCTHW,
            kept_BCTHW,
            channels,
            num_frames,
            height,
            width,
            *x_BCTHW.stride(),
            *past_BCTHW.stride(),
            *window_BCTHW.stride(),
            *kept_BCTHW.stride(),
            channels**0.5,
            MIN_NORM,
            NUM_HISTORY=num_history,
            BORDER_H=border_H,
            BORDER_W=border_W,
            HAS_HISTORY=history_BCTHW is not None,
            HAS_GAIN=gain_C111 is not None,
            HAS_BIAS=bias_C is not None,
            BLOCK_W=block_W,
            BLOCK_C=block_C,
            num_warps=_NUM_WARPS,
        )
    return window_BCTHW, kept_BCTHW


def upsample(x_BCTHW: Tensor, num_parts: int) -> Tensor:
    """Read each pixel once and write it four times, channels last."""
    batch, channels_in, num_frames, height, width = x_BCTHW.shape
    channels = channels_in // num_parts
    y_KCHW = torch.empty(
        (batch * num_frames * num_parts, channels, 2 * height, 2 * width),
        dtype=x_BCTHW.dtype,
        device=x_BCTHW.device,
        memory_format=torch.channels_last,
    )
    block_C = triton.next_power_of_2(channels)
    block_W = _block_columns(block_C, width)
    with torch.cuda.device_of(x_BCTHW):
        _upsample_kernel[(y_KCHW.shape[0] * height * triton.cdiv(width, block_W),)](
            x_BCTHW,
            y_KCHW,
            channels,
            num_frames,
            height,
            width,
            *x_BCTHW.stride(),
            *y_KCHW.stride(),
            NUM_PARTS=num_parts,
            BLOCK_W=block_W,
            BLOCK_C=block_C,
            num_warps=_NUM_WARPS,
        )
    return y_KCHW


def add_shortcut(
    y_BCTHW: Tensor,
    x_BCTHW: Tensor,
    factors: tuple[int, int, int],
    picks: tuple[int, int, int],
    y_bias_C: Tensor | None,
    x_bias_C: Tensor | None,
) -> Tensor:
    """Add both biases and the shortcut in one kernel."""
    batch, channels, num_frames, height, width = y_BCTHW.shape
    time_factor, height_factor, width_factor = factors
    block_C = triton.next_power_of_2(channels)
    block_W = _block_columns(block_C, width)
    with torch.cuda.device_of(x_BCTHW):
        _add_shortcut_kernel[(batch * num_frames * height * triton.cdiv(width, block_W),)](
            y_BCTHW,
            x_BCTHW,
            y_BCTHW if y_bias_C is None else y_bias_C,
            x_BCTHW if x_bias_C is None else x_bias_C,
            channels,
            num_frames,
            height,
            width,
            x_BCTHW.shape[2] * time_factor - num_frames,
            *y_BCTHW.stride(),
            *x_BCTHW.stride(),
            FACTOR_T=time_factor,
            FACTOR_H=height_factor,
            FACTOR_W=width_factor,
            PICK_T=picks[0],
            PICK_H=picks[1],
            PICK_W=picks[2],
            HAS_Y_BIAS=y_bias_C is not None,
            HAS_X_BIAS=x_bias_C is not None,
            BLOCK_W=block_W,
            BLOCK_C=block_C,
            num_warps=_NUM_WARPS,
        )
    return y_BCTHW


def _block_columns(block_C: int, width: int) -> int:
    return max(1, min(_BLOCK_ELEMENTS // block_C, triton.next_power_of_2(width)))


@triton.jit
def _window_kernel(
    x_ptr,
    past_ptr,
    gain_ptr,
    bias_ptr,
    window_ptr,
    kept_ptr,
    channels,
    num_frames,
    height,
    width,
    x_B,
    x_C,
    x_T,
    x_H,
    x_W,
    past_B,
    past_C,
    past_T,
    past_H,
    past_W,
    window_B,
    window_C,
    window_T,
    window_H,
    window_W,
    kept_B,
    kept_C,
    kept_T,
    kept_H,
    kept_W,
    scale,
    min_norm,
    NUM_HISTORY: tl.constexpr,
    BORDER_H: tl.constexpr,
    BORDER_W: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_GAIN: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    width_out = width + 2 * BORDER_W
    height_out = height + 2 * BORDER_H
    num_blocks = tl.cdiv(width_out, BLOCK_W)
    line = tl.program_id(0) // num_blocks
    columns = (tl.program_id(0) % num_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    is_channel = c < channels
    # Offsets of rows in 64 bits: a clip's widest windows have nearly 2^31 elements.
    row = (line % height_out).to(tl.int64)
    frame = (line // height_out % (NUM_HISTORY + num_frames)).to(tl.int64)
    b = (line // height_out // (NUM_HISTORY + num_frames)).to(tl.int64)
    in_window = (columns < width_out) & is_channel

    y = tl.zeros((BLOCK_W, BLOCK_C), dtype=window_ptr.dtype.element_ty)
    if frame < NUM_HISTORY:
        if HAS_HISTORY:
            start = b * past_B + frame * past_T + row * past_H
            y = tl.load(past_ptr + start + columns * past_W + c * past_C, mask=in_window, other=0.0)
    else:
        is_inside_row = (row >= BORDER_H) & (row < BORDER_H + height)
        is_inside = (columns >= BORDER_W) & (columns < BORDER_W + width) & is_channel & is_inside_row
        start = b * x_B + (frame - NUM_HISTORY) * x_T + (row - BORDER_H) * x_H
        x = tl.load(x_ptr + start + (columns - BORDER_W) * x_W + c * x_C, mask=is_inside, other=0.0).to(tl.float32)
        if HAS_BIAS:
            x += tl.load(bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
        if HAS_GAIN:
            norm = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1, keep_dims=True)), min_norm)
            x = x * (scale / norm) * tl.load(gain_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
            x = x / (1.0 + tl.exp(-x))
        y = tl.where(is_inside, x, 0.0).to(y.dtype)
    start = b * window_B + frame * window_T + row * window_H
    tl.store(window_ptr + start + columns * window_W + c * window_C, y, mask=in_window)
    if frame >= num_frames:
        start = b * kept_B + (frame - num_frames) * kept_T + row * kept_H
        tl.store(kept_ptr + start + columns * kept_W + c * kept_C, y, mask=in_window)


@triton.jit
def _upsample_kernel(
    x_ptr,
    y_ptr,
    channels,
    num_frames,
    height,
    width,
    x_B,
    x_C,
    x_T,
    x_H,
    x_W,
    y_K,
    y_C,
    y_H,
    y_W,
    NUM_PARTS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK_W)
    line = tl.program_id(0) // num_blocks
    columns = (tl.program_id(0) % num_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    is_inside = (columns < width) & (c < channels)
    row = (line % height).to(tl.int64)
    k = (line // height).to(tl.int64)
    part, frame, b = k % NUM_PARTS, k // NUM_PARTS % num_frames, k // NUM_PARTS // num_frames

    start = b * x_B + part * channels * x_C + frame * x_T + row * x_H
    x = tl.load(x_ptr + start + columns * x_W + c * x_C, mask=is_inside)
    y_at = y_ptr + (k * y_K + 2 * row * y_H) + 2 * columns * y_W + c * y_C
    tl.store(y_at, x, mask=is_inside)
    tl.store(y_at + y_W, x, mask=is_inside)
    tl.store(y_at + y_H, x, mask=is_inside)
    tl.store(y_at + y_H + y_W, x, mask=is_inside)


@triton.jit
def _add_shortcut_kernel(
    y_ptr,
    x_ptr,
    y_bias_ptr,
    x_bias_ptr,
    channels,
    num_frames,
    height,
    width,
    num_skipped,
    y_B,
    y_C,
    y_T,
    y_H,
    y_W,
    x_B,
    x_C,
    x_T,
    x_H,
    x_W,
    FACTOR_T: tl.constexpr,
    FACTOR_H: tl.constexpr,
    FACTOR_W: tl.constexpr,
    PICK_T: tl.constexpr,
    PICK_H: tl.constexpr,
    PICK_W: tl.constexpr,
    HAS_Y_BIAS: tl.constexpr,
    HAS_X_BIAS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    num_blocks = tl.cdiv(width, BLOCK_W)
    line = tl.program_id(0) // num_blocks
    columns = (tl.program_id(0) % num_blocks) * BLOCK_W + tl.arange(0, BLOCK_W)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    is_channel = c < channels
    row = (line % height).to(tl.int64)
    frame = (line // height % num_frames).to(tl.int64)
    b = (line // height // num_frames).to(tl.int64)
    # A clip's first frame has only the last of its finer frames.
    fine_frame = frame + num_skipped
    is_inside = (columns < width) & is_channel

    y_at = y_ptr + (b * y_B + frame * y_T + row * y_H) + columns * y_W + c * y_C
    y = tl.load(y_at, mask=is_inside, other=0.0).to(tl.float32)
    pick_T = fine_frame % FACTOR_T if PICK_T > 1 else 0
    pick_H = row % FACTOR_H if PICK_H > 1 else 0
    pick_W = columns % FACTOR_W if PICK_W > 1 else 0
    channel = c * (PICK_T * PICK_H * PICK_W) + (pick_T * PICK_H + pick_H) * PICK_W + pick_W
    start = b * x_B + (fine_frame // FACTOR_T) * x_T + (row // FACTOR_H) * x_H
    x = tl.load(x_ptr + start + (columns // FACTOR_W) * x_W + channel * x_C, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_Y_BIAS:
        y += tl.load(y_bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_X_BIAS:
        x += tl.load(x_bias_ptr + c, mask=is_channel, other=0.0).to(tl.float32)
    tl.store(y_at, (y + x).to(y_ptr.dtype.element_ty), mask=is_inside)
