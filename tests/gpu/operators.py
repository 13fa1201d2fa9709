"""Every implementation of every operator against its eager twin, on a device."""

from __future__ import annotations

import torch

from cosmos3_core.device import resolve_device
from tests.gpu.verdict import Verdict, run_check
from tests.ops import video_comparison
from tests.ops.comparison import (
    ELEMENTWISE_SHAPES,
    GPU_CASES,
    NEEDS_GPU,
    TOLERANCES,
    largest_difference,
    relative_difference,
    step_errors,
)


def check_operators(device: str) -> list[Verdict]:
    """A verdict for every implementation and dtype, and one for a step; what needs a GPU is skipped without."""
    verdicts = []
    for key in TOLERANCES:
        op, name, dtype = key
        check = f"{op} {name}, {str(dtype).removeprefix('torch.')}"
        if name in NEEDS_GPU and device != "cuda":
            verdicts.append(Verdict(check, "skip", "needs a CUDA device"))
        else:
            verdicts.append(run_check(check, lambda key=key: _run(*key, resolve_device(device))))
    for (name, dtype), tolerance in video_comparison.TOLERANCES.items():
        check = f"video VAE {name}, {str(dtype).removeprefix('torch.')}"
        if device != "cuda":
            verdicts.append(Verdict(check, "skip", "needs a CUDA device"))
        else:
            verdicts.append(
                run_check(check, lambda name=name, dtype=dtype, top=tolerance: _run_video(name, dtype, top))
            )
    verdicts.append(run_check("step, bfloat16", lambda: _step(resolve_device(device))))
    return verdicts


def _run(op: str, name: str, dtype: torch.dtype, device: torch.device) -> str:
    if op == "attention":
        cases = GPU_CASES if device.type == "cuda" else GPU_CASES[:1]
        differences = [largest_difference(name, dtype, device, shape, causal) for shape, causal in cases]
    else:
        differences = [
            relative_difference(op, name, dtype, device, shape, weight_in_fp32)
            for shape in ELEMENTWISE_SHAPES
            for weight_in_fp32 in (False, True)
        ]
    return _within(differences, TOLERANCES[op, name, dtype])


def _run_video(name: str, dtype: torch.dtype, tolerance: float) -> str:
    device = torch.device("cuda")
    differences = [video_comparison.largest_difference(name, dtype, device, case) for case in video_comparison.CASES]
    return _within(differences, tolerance)


def _within(differences: list[float], tolerance: float) -> str:
    said = f"largest difference {max(differences):.1e}, allowed {tolerance:.1e}"
    if not all(difference <= tolerance for difference in differences):  # NaN is a fault too
        raise AssertionError(said)
    return said


def _step(device: torch.device) -> str:
    plain, chosen = step_errors(device)
    figures = f"off fp32 by {chosen:.2e}, with eager elementwise operators by {plain:.2e}"
    if not chosen <= 1.1 * plain:
        raise AssertionError(figures)
    return figures
