"""Every implementation of every operator against its eager twin, on a device."""

from __future__ import annotations

import torch

from cosmos3_core.device import resolve_device
from tests.gpu.verdict import Verdict, checked
from tests.ops.comparison import GPU_CASES, TOLERANCES, largest_difference


def check_operators(device: str) -> list[Verdict]:
    """A verdict for every implementation and dtype; cuDNN's kernels are skipped without a GPU."""
    verdicts = []
    for (name, dtype), tolerance in TOLERANCES.items():
        check = f"attention {name}, {str(dtype).removeprefix('torch.')}"
        if name == "cudnn" and device != "cuda":
            verdicts.append(Verdict(check, "skip", "needs a CUDA device"))
        else:
            verdicts.append(
                checked(check, lambda name=name, dtype=dtype, top=tolerance: _run(name, dtype, device, top))
            )
    return verdicts


def _run(name: str, dtype: torch.dtype, device: str, tolerance: float) -> str:
    cases = GPU_CASES if device == "cuda" else GPU_CASES[:1]
    largest = max(largest_difference(name, dtype, resolve_device(device), shape, causal) for shape, causal in cases)
    if not largest <= tolerance:
        raise AssertionError(f"largest difference {largest:.1e}, allowed {tolerance:.1e}")
    return f"largest difference {largest:.1e}, allowed {tolerance:.1e}"
