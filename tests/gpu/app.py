"""The whole app on the available devices: start, generate one clip over HTTP, probe the mp4, stop."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Any

from cosmos3_core.parallel.layout import Layout
from tests.gpu.verdict import Verdict, run_check

_CHECK = "app over HTTP"
_START_S = 300.0
# More logical CPUs than real ones: replicas mostly wait.
_NUM_CPUS = 64


def layout_for(num_devices: int) -> Layout:
    """The layout that the app's transformer gets: guidance branches first, then shares of the tokens."""
    return Layout(cfg=2, sp=2) if num_devices >= 4 else Layout(cfg=min(num_devices, 2))


def check_app_on(device: str, num_devices: int, checkpoint: Path) -> Verdict:
    """Start, generate, probe, stop. For the main thread of a process without another Ray."""
    if importlib.util.find_spec("ray") is None:
        return Verdict(_CHECK, "skip", "ray is not installed")
    return run_check(_CHECK, lambda: _run(device, num_devices, checkpoint))


def _run(device: str, num_devices: int, checkpoint: Path) -> str:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when Ray is imported
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    from deployments.config import DEFAULT_CONFIG, AppConfig
    from deployments.launch.app_calls import check_app
    from deployments.launch.bring_up import run_app
    from deployments.launch.ray_session import Placement, kill_leftovers

    layout = layout_for(num_devices)
    overrides: dict[str, Any] = {"checkpoint": str(checkpoint), "http.port": 0, "vae.ranks": num_devices}
    overrides |= {f"transformer.{axis}": getattr(layout, axis) for axis in ("tp", "cfg", "sp")}
    if device == "cuda":
        # No two ranks of a gang on one card, as NCCL asks.
        overrides |= {"transformer.gpus_per_rank": 0.75, "vae.beside_transformer": True}
        for stage in ("transformer", "vae"):
            overrides |= {f"{stage}.device": "cuda", f"{stage}.dtype": "bfloat16"}
    lines: list[str] = []
    placement = Placement(num_cpus=_NUM_CPUS, start_timeout_s=_START_S)
    config = AppConfig.read(DEFAULT_CONFIG, overrides)
    with kill_leftovers(os.environ), run_app(config, placement, lines.append) as app:
        is_well = check_app(app.url, timeout_s=_START_S, report=lines.append)
    if not is_well:
        raise AssertionError(" | ".join(lines))
    return f"{layout}, decoded by {num_devices}: up in {app.start_seconds:.0f} s, {lines[-1].split('ok', 1)[1].strip()}"
