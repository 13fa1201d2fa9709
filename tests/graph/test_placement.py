"""Placement: shares of cards, and a cluster that is too small. The cluster's two GPUs are only logical."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.request import GenerationRequest
from deployments import messages
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.gang, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[2]
SMALL = GenerationRequest(prompt="A red car.", num_frames=5, height=64, width=64, num_inference_steps=2, seed=5)


@pytest.mark.slow  # two more ranks and decoders
def test_decoders_share_the_cards_of_ranks(start_app: Callable[..., Any]) -> None:
    import ray
    from ray import serve

    app = start_app(
        "shared-cards",
        transformer__cfg=2,
        transformer__gpus_per_rank=0.9,
        vae__gpus_per_rank=0.1,
        vae__num_replicas=2,
    )
    # Ranks of 0.9 never share one of the two cards. So both decoders, which run too, are beside a rank.
    assert eventually(lambda: ray.available_resources().get("GPU", 0) < 1e-3)
    events = list(app.client.stream(SMALL))
    (ready,) = (event for event in events if isinstance(event, messages.LatentsReady))
    assert len(set(ready.rank_pids)) == 2
    assert serve.status().applications["shared-cards"].deployments["VideoVAE"].replica_states == {"RUNNING": 2}
    serve.delete("shared-cards")
    assert eventually(lambda: ray.available_resources().get("GPU", 0) == 2)


def test_a_cluster_with_too_few_gpus_is_refused_at_once(ray_cluster: int, tiny_nano: Path, tmp_path: Path) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    command = [sys.executable, "-m", "deployments", "serve", "--ray-address", address]
    layout = ["--cfg", "2", "--tp", "2", "--set", "transformer.gpus_per_rank=1"]
    start_s = time.monotonic()
    done = subprocess.run(
        [*command, "--checkpoint", str(tiny_nano), *layout],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line == (
        "error: 2 GPU missing: the app needs 3.4 CPU and 4 GPU, Ray has 64 CPU and 2 GPU for it. What fits: "
        "--tp 1 --cfg 2 --sp 1 --gangs 1, or --tp 1 --cfg 1 --sp 2 --gangs 1, or --tp 2 --cfg 1 --sp 1 --gangs 1."
    )
    assert time.monotonic() - start_s < 60, "not after --start-timeout, half an hour; 3 s on a quiet machine"
