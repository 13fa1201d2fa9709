"""Triton kernels of :mod:`cosmos3_core.ops.triton_ops`; imported only on machines that run Triton.

They round to the tensors' dtype wherever the eager twin writes a tensor, so that both give the same numbers except for
the order of sums. They are not specialised on numbers of tokens: a request of another shape compiles nothing.
"""

import triton
import triton.language as tl


@triton.jit
def _round(x, dtype: tl.constexpr):
    return x.to(dtype).to(tl.float32)


@triton.jit
def _apply_weight(x, scale, weight, dtype: tl.constexpr, WEIGHT_IN_FP32: tl.constexpr):
    x = x * scale
    if not WEIGHT_IN_FP32:
        x = _round(x, dtype)
    return _round(x * weight, dtype)


@triton.jit
def _store_normed(x, there, column, valid, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, WEIGHT_IN_FP32: tl.constexpr):
    weight = tl.load(weight_ptr + column, valid, 0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x) / WIDTH + eps)
    tl.store(out_ptr + there, _apply_weight(x, scale, weight, out_ptr.dtype.element_ty, WEIGHT_IN_FP32), valid)


@triton.jit
def rms_norm(x_ptr, weight_ptr, out_ptr, eps, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHT_IN_FP32: tl.constexpr):
    """Compute one row per program."""
    column = tl.arange(0, BLOCK)
    valid = column < WIDTH
    here = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + here, valid, 0.0).to(tl.float32)
    _store_normed(x, here, column, valid, weight_ptr, out_ptr, eps, WIDTH, WEIGHT_IN_FP32)


@triton.jit
def add_rms_norm(
    x_ptr, y_ptr, weight_ptr, sum_ptr, out_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, WEIGHT_IN_FP32: tl.constexpr,
):  # fmt: skip
    """Compute one row per program."""
    column = tl.arange(0, BLOCK)
    valid = column < WIDTH
    here = tl.program_id(0).to(tl.int64) * WIDTH + column
    x = tl.load(x_ptr + here, valid, 0.0).to(tl.float32)
    y = tl.load(y_ptr + here, valid, 0.0).to(tl.float32)
    x = _round(x + y, x_ptr.dtype.element_ty)
    tl.store(sum_ptr + here, x, valid)
    _store_normed(x, here, column, valid, weight_ptr, out_ptr, eps, WIDTH, WEIGHT_IN_FP32)


@triton.jit(do_not_specialize=["num_rows"])
def norm_rope(
    x_ptr, weight_ptr, cos_ptr, sin_ptr, out_ptr, num_rows, token_stride, head_stride, eps,
    HEADS: tl.constexpr, HALF: tl.constexpr, HALF_BLOCK: tl.constexpr, ROWS: tl.constexpr, WEIGHT_IN_FP32: tl.constexpr,
):  # fmt: skip
    """Compute ``ROWS`` heads per program, numbered across the tokens, both halves of a head together."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    slot = tl.arange(0, HALF_BLOCK)
    is_slot = slot < HALF
    valid = (row < num_rows)[:, None] & is_slot[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    token, head = (row // HEADS).to(tl.int64), row % HEADS
    here = (token * token_stride + head * head_stride)[:, None] + slot[None, :]
    first = tl.load(x_ptr + here, valid, 0.0).to(tl.float32)
    second = tl.load(x_ptr + here + HALF, valid, 0.0).to(tl.float32)
    scale = tl.rsqrt((tl.sum(first * first, 1) + tl.sum(second * second, 1)) / (2 * HALF) + eps)[:, None]
    first_weight = tl.load(weight_ptr + slot, is_slot, 0.0).to(tl.float32)[None, :]
    second_weight = tl.load(weight_ptr + HALF + slot, is_slot, 0.0).to(tl.float32)[None, :]
    first = _apply_weight(first, scale, first_weight, dtype, WEIGHT_IN_FP32)
    second = _apply_weight(second, scale, second_weight, dtype, WEIGHT_IN_FP32)
    angle = (token * HALF)[:, None] + slot[None, :]
    cos = tl.load(cos_ptr + angle, valid, 0.0).to(tl.float32)
    sin = tl.load(sin_ptr + angle, valid, 0.0).to(tl.float32)
    there = (row.to(tl.int64) * (2 * HALF))[:, None] + slot[None, :]
    tl.store(out_ptr + there, _round(first * cos, dtype) - _round(second * sin, dtype), valid)
    tl.store(out_ptr + there + HALF, _round(second * cos, dtype) + _round(first * sin, dtype), valid)


@triton.jit
def silu_mul(x_ptr, out_ptr, INNER: tl.constexpr, BLOCK: tl.constexpr):
    """Compute ``BLOCK`` columns of one row per program."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    valid = column < INNER
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    gate = tl.load(x_ptr + row * (2 * INNER) + column, valid, 0.0).to(tl.float32)
    up = tl.load(x_ptr + row * (2 * INNER) + INNER + column, valid, 0.0).to(tl.float32)
    tl.store(out_ptr + row * INNER + column, _round(gate / (1.0 + tl.exp(-gate)), dtype) * up, valid)
