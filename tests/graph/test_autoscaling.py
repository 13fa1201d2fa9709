"""Two nodes: gangs scale with the load, and processes are placed as configured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deployments.launch.ray_session import kill_leftovers

pytestmark = [pytest.mark.cluster, pytest.mark.gang, pytest.mark.slow, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 800.0


@pytest.fixture(scope="module")
def seen(tiny_nano: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The report of `two_nodes.py`, which takes a minute on two quiet cores."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"PYTHONPATH": str(REPOSITORY)}
    with kill_leftovers(environment):
        done = subprocess.run(
            [sys.executable, str(REPOSITORY / "tests" / "graph" / "two_nodes.py"), str(tiny_nano)],
            env=environment,
            cwd=tmp_path_factory.mktemp("two-nodes"),
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
        )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_load_starts_a_second_gang_and_idleness_stops_it(seen: Any) -> None:
    seen = seen["autoscaling"]
    assert seen["gangs_before"] == 1
    assert seen["num_gangs"] == 2
    assert seen["zones"] == [["a"], ["b"]], "each on a node of its own, where its ranks are together"
    assert seen["last_served_by_one_alive"], "one gang's processes are gone, the other serves"
    assert seen["num_requests"] > 6
    assert seen["troubles"] == [], "no request failed or was tried again on the way"
    assert len(seen["frames"]) == 1, "all gave the same pictures"


def test_strategies_and_labels_decide_the_nodes(seen: Any) -> None:
    spread, labelled = seen["placement"]["spread"], seen["placement"]["labelled"]
    assert sorted(spread["ranks"]) == ["a", "b"]
    assert spread["ranks"][0] == spread["leader"]
    assert (spread["vae"], spread["encoder"]) == ("b", "a")
    assert (labelled["leader"], labelled["ranks"]) == ("b", ["b", "b"])


def test_nodes_of_an_autoscaler_are_recognised(seen: Any) -> None:
    assert seen["can_grow"]


def test_a_request_survives_its_gangs_node(seen: Any) -> None:
    seen = seen["lost_node"]
    denoising, decoding = seen["denoising"], seen["decoding"]
    (first_saved,) = denoising["saved"]
    (stage, from_step), *others = denoising["retried"]
    assert others == []
    assert stage == "denoise"
    assert from_step >= first_saved > 0, "the state was on the Director's node too"
    assert denoising["frames"] == [seen["undisturbed"]]
    # The latents were on the Director's node too, so no step was repeated.
    assert decoding["frames"] == [seen["undisturbed"]]
    assert decoding["num_steps"] == 500
