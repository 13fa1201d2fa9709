"""Elementwise operators in Triton, each one pass over memory, with the signatures and meanings of :mod:`eager`.

The kernels are imported at the first call: this module loads without Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cosmos3_core.model.rope import RopeTable

_HEADS_A_PROGRAM = 16
_COLUMNS_A_PROGRAM = 2048


def why_unavailable(device: torch.device) -> str | None:
    """Return why these do not run on a CUDA device, or None; found by running one, since compiling may fail."""
    try:
        rms_norm(torch.ones((1, 16), device=device), torch.ones(16, device=device), 1e-6, False)
    except Exception as error:  # noqa: BLE001 # no Triton, no C compiler, no headers of Python, a read-only home, ...
        return f"Triton does not work here: {type(error).__name__}: {error}".splitlines()[0]
    return None


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> Tensor:
    """Launch the kernel, one program per row."""
    from cosmos3_core.ops import triton_kernels

    x = x.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    with torch.cuda.device(x.device):
        triton_kernels.rms_norm[(x.numel() // width,)](
            x, weight, out, eps, WIDTH=width, BLOCK=_power_of_two(width), WEIGHT_IN_FP32=weight_in_fp32
        )
    return out


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Launch the kernel, one program per row."""
    from cosmos3_core.ops import triton_kernels

    x, y = x.contiguous(), y.contiguous()
    total, out = torch.empty_like(x), torch.empty_like(x)
    width = x.shape[-1]
    with torch.cuda.device(x.device):
        triton_kernels.add_rms_norm[(x.numel() // width,)](
            x, y, weight, total, out, eps, WIDTH=width, BLOCK=_power_of_two(width), WEIGHT_IN_FP32=weight_in_fp32
        )
    return total, out


def norm_rope(x_SND: Tensor, weight_D: Tensor, eps: float, weight_in_fp32: bool, rope: RopeTable) -> Tensor:
    """Launch the kernel on the heads in place, without a copy."""
    from cosmos3_core.ops import triton_kernels

    tokens, heads, head_dim = x_SND.shape
    out_SND = torch.empty((tokens, heads, head_dim), dtype=x_SND.dtype, device=x_SND.device)
    half = head_dim // 2
    with torch.cuda.device(x_SND.device):
        triton_kernels.norm_rope[(-(-tokens * heads // _HEADS_A_PROGRAM),)](
            x_SND, weight_D, rope.cos.contiguous(), rope.sin.contiguous(), out_SND,
            tokens * heads, x_SND.stride(0), x_SND.stride(1), eps,
            HEADS=heads, HALF=half, HALF_BLOCK=_power_of_two(half), ROWS=_HEADS_A_PROGRAM,
            WEIGHT_IN_FP32=weight_in_fp32,
            enable_fp_fusion=False,  # an unrounded product in a sum would differ from eager
        )  # fmt: skip
    return out_SND


def silu_mul(gate_up: Tensor) -> Tensor:
    """Launch the kernel on both halves in place, without a copy."""
    from cosmos3_core.ops import triton_kernels

    gate_up = gate_up.contiguous()
    tokens, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((tokens, inner), dtype=gate_up.dtype, device=gate_up.device)
    with torch.cuda.device(gate_up.device):
        triton_kernels.silu_mul[(tokens, -(-inner // _COLUMNS_A_PROGRAM))](
            gate_up, out, INNER=inner, BLOCK=_COLUMNS_A_PROGRAM
        )
    return out


def _power_of_two(width: int) -> int:
    """Return the smallest power of two that is not below ``width``."""
    return 1 << (width - 1).bit_length()
