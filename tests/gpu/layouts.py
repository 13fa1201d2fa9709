"""Every layout gives what one rank gives, over NCCL and in both dtypes; the same on gloo, to try the check itself.

What is compared are final latents, as relative norms of differences:

- Sharing out the guidance branches changes no arithmetic: not a bit may differ. Nor between ranks or two runs.
- fp32: TF32 is off, so only the order of sums differs, split over ranks or by the kernels that cuBLAS picks for other
  numbers of rows. On CPUs that comes to 2e-6; a sum that is missing or counted twice, to more than 5e-2.
- bf16: each layout rounds otherwise, every layer. One rank's own distance from fp32 is the size of that; two results
  that far from the same truth are at most twice that far from each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from cosmos3_core.parallel.groups import Groups
from cosmos3_core.parallel.layout import Layout
from tests.gpu.verdict import Verdict
from tests.parallel.gang_work import RESULTS, final_latents, load_share
from tests.ranks import run_layouts

LAYOUTS = [
    Layout(tp, cfg, sp)
    for tp, cfg, sp in (
        *((1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2)),
        *((4, 1, 1), (2, 2, 1), (2, 1, 2), (1, 2, 2), (1, 1, 4)),
        (2, 2, 2),
    )
]
DTYPES = (torch.float32, torch.bfloat16)
FP32_TOLERANCE = 1e-4

Latents = dict[torch.dtype, dict[str, Tensor]]


def latents_in_both(groups: Groups, device: torch.device, checkpoint: Path) -> Latents:
    """A rank's work: every request in every dtype."""
    return {dtype: final_latents(load_share(groups, device, checkpoint, dtype)) for dtype in DTYPES}


def check_layouts(
    checkpoint: Path, device: str, num_devices: int, layouts: Sequence[Layout] = LAYOUTS
) -> list[Verdict]:
    """A verdict for every layout and dtype.

    Args:
        checkpoint: of any variant whose heads divide by 4.
        device: "cuda", a GPU a rank, or "cpu".
        num_devices: how many ranks there may be; layouts of more are skipped.
        layouts: the ones to check.
    """
    fitting = [Layout(), *(layout for layout in layouts if 1 < layout.num_ranks <= num_devices)]
    start_s = time.monotonic()
    try:
        results = dict(zip(fitting, run_layouts(latents_in_both, fitting, checkpoint, device=device), strict=True))
    except Exception as error:  # noqa: BLE001 # the other checks still have to run
        return [Verdict("layouts", "FAIL", f"{type(error).__name__}: {error}", time.monotonic() - start_s)]
    verdicts = [Verdict("layouts, all runs", "ok", f"{len(fitting)} layouts on {device}", time.monotonic() - start_s)]
    for layout in layouts:
        for dtype in DTYPES:
            check = f"{layout}, {str(dtype).removeprefix('torch.')}"
            if layout in results:
                fault, detail = compare(layout, results[layout], results[Layout()][0], dtype)
                verdicts.append(Verdict(check, "FAIL" if fault else "ok", "; ".join(filter(None, (fault, detail)))))
            else:
                reason = f"needs {layout.num_ranks} devices, there {'is' if num_devices == 1 else 'are'} {num_devices}"
                verdicts.append(Verdict(check, "skip", reason))
    return verdicts


def compare(layout: Layout, ranks: list[Latents], alone: Latents, dtype: torch.dtype) -> tuple[str, str]:
    """What is wrong, "" if nothing is; and the figures."""
    faults, largest, room = [], 0.0, 0.0
    for name in RESULTS:
        latents = [rank[dtype] for rank in ranks]
        result, expected = latents[0][f"{name}/first"], alone[dtype][f"{name}/first"]
        runs = [key for key in (f"{name}/first", f"{name}/again") if key in latents[0]]
        if not all(torch.equal(rank[key], result) for rank in latents for key in runs):
            faults.append(f"{name}: ranks or runs differ")
        noise = _distance(expected, alone[torch.float32][f"{name}/first"])
        tolerance = FP32_TOLERANCE if dtype == torch.float32 else 2 * noise
        if layout.tp == layout.sp == 1:
            tolerance = 0.0
        difference = _distance(result, expected)
        if not difference <= tolerance:  # NaN is a fault too
            faults.append(f"{name}: {difference:.1e} away, allowed {tolerance:.1e}")
        largest, room = max(largest, difference), max(room, tolerance)
    return "; ".join(faults), f"largest difference {largest:.1e}, allowed up to {room:.1e}"


def _distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())
