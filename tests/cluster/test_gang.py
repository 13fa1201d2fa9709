"""Layout of a gang. Its bring-up and failure are tested in graph/."""

from __future__ import annotations

import asyncio
import pickle
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cluster import gang as gang_module
from cluster.envelope import TensorEnvelope
from cluster.errors import (
    DeadlineExceeded,
    GangFailed,
    OutOfMemory,
    OverloadedError,
    PreviewFailed,
    StageFailed,
    StreamClosed,
)
from cluster.gang import Gang, GangSpec, make_bundles, order_ranks
from cluster.transformer_rank import TransformerSpec
from cosmos3_core.errors import RequestError
from cosmos3_core.parallel.layout import Layout

RANK = TransformerSpec("checkpoint", "cpu", None, 1)


def test_the_leader_shares_the_first_bundle() -> None:
    spec = GangSpec(rank=replace(RANK, layout=Layout(sp=3)), cpus_per_rank=1, gpus_per_rank=1, start_timeout_s=1)
    assert spec.rank.num_ranks == 3
    assert make_bundles(spec, leader_cpus=0.5) == [{"CPU": 1.5, "GPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1}]
    on_cpu = GangSpec(rank=RANK, cpus_per_rank=0.5, gpus_per_rank=0, start_timeout_s=1)
    assert make_bundles(on_cpu, leader_cpus=0.1) == [{"CPU": 0.6}]


def test_rank_zero_is_beside_the_leader_and_a_nodes_ranks_are_adjacent() -> None:
    nodes = {0: "c", 1: "a", 2: "b", 3: "a", 4: "b"}
    order = order_ranks(nodes, leader_node="b")
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
def test_errors_survive_pickling(error: Exception) -> None:
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert vars(back) == vars(error)
    assert str(back) == str(error)
    assert len(str(error)) > 20


REFUSAL, NO_MEMORY = RequestError("latents", 7, "48"), OutOfMemory("of 1 GiB")


def make_rank(*does: float | Exception) -> Any:
    """Make an actor's handle whose ``work`` sleeps, then raises the error if given."""

    async def work(*arguments: Any) -> tuple[Any, ...]:
        for it in does:
            if isinstance(it, Exception):
                raise it
            await asyncio.sleep(it)
        return arguments

    return SimpleNamespace(work=SimpleNamespace(remote=work))


def gather(*ranks: Any, timeout_s: float = 5) -> list[Any]:
    return asyncio.run(
        asyncio.wait_for(Gang(list(ranks)).call_or_refuse("work", phase="decode", timeout_s=timeout_s), 8)
    )


def test_a_refusal_waits_for_the_others_to_agree() -> None:
    with pytest.raises(RequestError):
        gather(make_rank(REFUSAL), make_rank(0.1, REFUSAL))
    with pytest.raises(GangFailed, match="rank 0: work.. raised RequestError"):
        gather(make_rank(REFUSAL), make_rank(0.1))
    with pytest.raises(OutOfMemory):
        gather(make_rank(NO_MEMORY))


@pytest.mark.parametrize("others", [(3600,), (0.05, NO_MEMORY), (0.05, REFUSAL)], ids=str)
def test_out_of_memory_on_one_of_several_ranks_does_not_wait(
    others: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gang_module, "_AGREE_S", 3600.0)
    with pytest.raises(GangFailed, match="rank 1: work.. raised OutOfMemory") as raised:
        gather(make_rank(*others), make_rank(NO_MEMORY), timeout_s=3600)
    assert raised.value.__cause__ is NO_MEMORY


def test_a_tensor_is_stored_once_for_all_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    envelope, put = TensorEnvelope.of_array(np.zeros(3, np.float32)), []

    def fake_put(value: Any) -> str:
        put.append(value)
        return "its reference"

    monkeypatch.setattr(gang_module.ray, "put", fake_put)
    calls = Gang([make_rank(), make_rank(), make_rank()]).call("work", "clip", envelope, phase="decode", timeout_s=5)
    assert asyncio.run(calls) == [("clip", "its reference")] * 3
    assert put == [envelope]
