"""Every implementation of every operator against its eager twin, on a device."""

from __future__ import annotations

import torch

from cosmos3_core.device import resolve_device
from tests.gpu.verdict import Verdict, checked
from tests.ops import video_comparison
from tests.ops.comparison import GPU_CASES, TOLERANCES, largest_difference


def check_operators(device: str) -> list[Verdict]:
    """A verdict for every implementation and dtype; cuDNN's and Triton's kernels are skipped without a GPU."""
    verdicts = []
    for (name, dtype), tolerance in TOLERANCES.items():
        check = f"attention {name}, {str(dtype).removeprefix('torch.')}"
        if name == "cudnn" and device != "cuda":
            verdicts.append(Verdict(check, "skip", "needs a CUDA device"))
        else:
            verdicts.append(
                checked(check, lambda name=name, dtype=dtype, top=tolerance: _run(name, dtype, device, top))
            )
    for (name, dtype), tolerance in video_comparison.TOLERANCES.items():
        check = f"video VAE {name}, {str(dtype).removeprefix('torch.')}"
        if device != "cuda":
            verdicts.append(Verdict(check, "skip", "needs a CUDA device"))
        else:
            verdicts.append(checked(check, lambda name=name, dtype=dtype, top=tolerance: _run_video(name, dtype, top)))
    return verdicts


def _run_video(name: str, dtype: torch.dtype, tolerance: float) -> str:
    device = torch.device("cuda")
    differences = [video_comparison.largest_difference(name, dtype, device, case) for case in video_comparison.CASES]
    said = f"largest difference {max(differences):.1e}, allowed {tolerance:.1e}"
    if not all(difference <= tolerance for difference in differences):  # NaN is a fault too
        raise AssertionError(said)
    return said


def _run(name: str, dtype: torch.dtype, device: str, tolerance: float) -> str:
    cases = GPU_CASES if device == "cuda" else GPU_CASES[:1]
    largest = max(largest_difference(name, dtype, resolve_device(device), shape, causal) for shape, causal in cases)
    if not largest <= tolerance:
        raise AssertionError(f"largest difference {largest:.1e}, allowed {tolerance:.1e}")
    return f"largest difference {largest:.1e}, allowed {tolerance:.1e}"
