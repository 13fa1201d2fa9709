"""Everything that needs GPUs, on a machine that has torch and perhaps no pytest.

    python -m tests.gpu                               # all GPUs of this machine, a tiny checkpoint
    python -m tests.gpu --checkpoint Cosmos3-Nano     # real weights
    python -m tests.gpu --device cpu --num-devices 2  # tries the checks themselves, on gloo

Prints a table, failures first and then the longest; the exit status is 1 if anything failed, 2 if there is no such
device.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint
from tests.gpu.app import check_app_on
from tests.gpu.layouts import check_layouts
from tests.gpu.modes import check_modes
from tests.gpu.operators import check_operators
from tests.gpu.strips import check_strips
from tests.gpu.verdict import Verdict
from tests.gpu.video_vae import check_video_vae

_ORDER = ("FAIL", "ok", "skip")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.gpu", description="Check operators, video VAE, strips of frames, modes, layouts, app."
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default %(default)s")
    parser.add_argument("--num-devices", type=int, help="GPUs, or ranks on the CPU; default: all GPUs, 2 on the CPU")
    parser.add_argument("--checkpoint", type=Path, help="default: a tiny one with random weights")
    parser.add_argument(
        "--only", choices=("operators", "video-vae", "strips", "modes", "layouts", "app"), help="default: all of them"
    )
    options = parser.parse_args(arguments)
    available = torch.cuda.device_count() if options.device == "cuda" else options.num_devices or 2
    if available == 0:
        print("no CUDA device here; --device cpu tries the checks themselves", file=sys.stderr)
        return 2
    num_devices = min(options.num_devices or available, available)
    with tempfile.TemporaryDirectory(prefix="cosmos3-gpu-") as directory:
        checkpoint = options.checkpoint or build_tiny_checkpoint(Path(directory) / "tiny-nano", "nano")
        checks: dict[str, Callable[[], list[Verdict]]] = {
            "operators": lambda: check_operators(options.device),
            "video-vae": lambda: check_video_vae(checkpoint, options.device),
            "strips": lambda: check_strips(checkpoint, options.device, num_devices),
            "modes": lambda: check_modes(checkpoint, options.device),
            "layouts": lambda: check_layouts(checkpoint, options.device, num_devices),
            "app": lambda: [check_app_on(options.device, num_devices, checkpoint)],
        }
        verdicts = [verdict for name, run in checks.items() if options.only in (None, name) for verdict in run()]
    verdicts.sort(key=lambda verdict: (_ORDER.index(verdict.status), -verdict.seconds))
    for verdict in verdicts:
        print(verdict)
    counts = {status: sum(verdict.status == status for verdict in verdicts) for status in _ORDER}
    print(", ".join(f"{count} {status}" for status, count in counts.items()) + f", on {num_devices} x {options.device}")
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    sys.exit(main())
