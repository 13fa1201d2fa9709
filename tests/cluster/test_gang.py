"""How a gang is laid out; that it comes up and dies as one is shown in graph/."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from cluster.errors import DeadlineExceeded, GangFailed, OverloadedError, PreviewFailed, StageFailed, StreamClosed
from cluster.gang import GangSpec, bundles, rank_order
from cluster.transformer_rank import TransformerSpec
from cosmos3_core.parallel.layout import Layout

RANK = TransformerSpec("checkpoint", "cpu", None, 1)


def test_the_leader_shares_the_first_bundle() -> None:
    spec = GangSpec(rank=replace(RANK, layout=Layout(sp=3)), cpus_per_rank=1, gpus_per_rank=1, start_timeout_s=1)
    assert spec.num_ranks == 3
    assert bundles(spec, leader_cpus=0.5) == [{"CPU": 1.5, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]
    on_cpu = GangSpec(rank=RANK, cpus_per_rank=0.5, gpus_per_rank=0, start_timeout_s=1)
    assert bundles(on_cpu, leader_cpus=0.1) == [{"CPU": 0.6}]


def test_rank_zero_sits_beside_the_leader_and_a_nodes_ranks_are_adjacent() -> None:
    nodes = {0: "c", 1: "a", 2: "b", 3: "a", 4: "b"}
    order = rank_order(nodes, leader_node="b")
    assert [nodes[bundle] for bundle in order] == ["b", "b", "a", "a", "c"]
    assert order == [2, 4, 1, 3, 0]


@pytest.mark.parametrize(
    "error",
    [
        GangFailed("load", "no memory"),
        GangFailed("step", "died", 3),
        PreviewFailed("another VAE's map"),
        StreamClosed("r/1", "why"),
        OverloadedError("places", 4, 2.5),
        DeadlineExceeded("decode", 60.0),
        StageFailed("vae", 3, "died"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes_whole(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert str(back) == str(error)
    assert len(str(error)) > 20
