"""Any process may die in the middle of a request: it completes, or fails in time with a reason."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.errors import ClusterError, GangFailed, OutOfMemory
from cluster.events import StepDone
from cosmos3_core.errors import RequestError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from deployments import messages
from tests.graph.faulty_rank import FaultyRank
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# Long enough in every stage to be hit in the middle: 60 steps, 11 chunks.
LONG = GenerationRequest(prompt="A red car.", num_frames=41, height=96, width=128, num_inference_steps=60, seed=3)
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Victim:
    """A process to kill, and the event at which it dies."""

    name: str
    kill_at: type
    pid_of: Callable[[dict[type, Any]], int]
    stage: str
    must_complete: bool = True


VICTIMS = [
    Victim("tokenizer", messages.Accepted, lambda known: known[messages.Tokenized].pid, "tokenize"),
    Victim("rank", StepDone, lambda known: known[StepDone].pid, "denoise"),
    Victim("leader", StepDone, lambda known: known[messages.LatentsReady].pid, "denoise"),
    Victim("vae rank", messages.ChunkEncoded, lambda known: known[messages.ChunkEncoded].decoded_by, "decode"),
    Victim("vae leader", messages.ChunkEncoded, lambda known: known[messages.ChunkDecoded].pid, "decode"),
    Victim("encoder", messages.ChunkEncoded, lambda known: known[messages.ChunkEncoded].pid, "encode"),
    # The process that holds the request cannot finish it; the caller gets an error and may retry.
    Victim("director", messages.ChunkEncoded, lambda known: known[messages.Accepted].pid, "", must_complete=False),
]


def events_by_kind(app: Any) -> dict[type, Any]:
    """Run a small request; its events show which processes serve now."""
    request = GenerationRequest(prompt="x", num_frames=5, height=32, width=32, num_inference_steps=2)
    return {type(event): event for event in app.client.stream(request, timeout_s=DEADLINE_S)}


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("victim", VICTIMS, ids=[victim.name for victim in VICTIMS])
def test_a_killed_process_is_replaced_and_its_request_ends_in_time(
    victim: Victim,
    app: Any,
    reference: Callable[[GenerationRequest], GenerationResult],
) -> None:
    from ray.util.placement_group import placement_group_table

    expected = reference(LONG).frames_sha256
    known = events_by_kind(app)
    pid = victim.pid_of(known)
    rank_pid, leader_pid = known[StepDone].pid, known[messages.LatentsReady].pid

    start_s = time.monotonic()
    killed, finished, retried, failure = False, None, [], None
    try:
        for event in app.client.stream(LONG, timeout_s=DEADLINE_S):
            if not killed and isinstance(event, victim.kill_at):
                os.kill(pid, signal.SIGKILL)
                killed = True
            if isinstance(event, messages.StageRetried):
                retried.append(event.stage)
            if isinstance(event, messages.Finished):
                finished = event
    except ClusterError as error:
        failure = error
    assert killed
    assert victim.must_complete == (failure is None), failure
    assert time.monotonic() - start_s < DEADLINE_S
    if victim.must_complete:
        assert finished is not None
        assert finished.frames_sha256 == expected
        if victim.name != "tokenizer":  # its part may be done before it dies
            assert set(retried) == {victim.stage}
    else:
        assert finished is None

    # A new process serves the next request, and nothing of the old one is left.
    again = events_by_kind(app)
    assert again[messages.Finished].num_frames == 5
    assert eventually(lambda: not is_alive(pid))
    if victim.name in ("rank", "leader"):
        assert again[StepDone].pid != rank_pid
        assert eventually(lambda: not is_alive(rank_pid) and not is_alive(leader_pid))
    if victim.name in ("vae rank", "vae leader"):
        whole_gang = known[messages.ChunkEncoded].decoded_by, known[messages.ChunkDecoded].pid
        assert eventually(lambda: not any(is_alive(pid) for pid in whole_gang))
    assert eventually(
        lambda: [group["state"] for group in placement_group_table().values()].count("CREATED") == num_gangs()
    )
    assert eventually(lambda: object_store_bytes() < 2 * 2**20), object_store_bytes()


def num_gangs() -> int:
    """Count the running gangs of all apps of the session."""
    from ray import serve

    apps = serve.status().applications.values()
    stages = "Transformer", "VideoVAE"
    return sum(it.deployments[stage].replica_states.get("RUNNING", 0) for it in apps for stage in stages)


def object_store_bytes() -> int:
    """Return the bytes in the object store now."""
    import ray

    total = ray.cluster_resources()["object_store_memory"]
    return int(total - ray.available_resources()["object_store_memory"])


@pytest.mark.parametrize(
    ("parts", "way", "raised", "said"),
    [
        (["fine", "sleep"], "call", GangFailed, "'step', rank 1: no answer from step() within 1 s"),
        pytest.param(
            ["sleep", "sleep"],
            "call",
            GangFailed,
            "'step': no answer from step() within 1 s on ranks [0, 1]",
            marks=pytest.mark.slow,
        ),
        # The others wait in a collective for the one that left.
        (["sleep", "bug", "sleep"], "call", GangFailed, "rank 1: step() raised ZeroDivisionError: a rank"),
        pytest.param(["sleep", "die", "sleep"], "call", GangFailed, "rank 1: died in step()", marks=pytest.mark.slow),
        # gloo and NCCL fail the others at once, before Ray knows of the death.
        (["bug", "die"], "call", GangFailed, "rank 1: died in step()"),
        (["no memory"], "call_or_refuse", OutOfMemory, "does not fit"),
        # The first rank's report is enough.
        (["no memory", "no memory"], "call_or_refuse", GangFailed, "step() raised OutOfMemory"),
        pytest.param(
            ["sleep", "refuse"],
            "call",
            GangFailed,
            "rank 1: step() raised RequestError: seed must be 2",
            marks=pytest.mark.slow,
        ),
        (["refuse", "refuse"], "call_or_refuse", RequestError, "seed must be 2 (got 1)"),
        (["fine", "refuse"], "call_or_refuse", GangFailed, "rank 1: step() raised RequestError"),
        pytest.param(
            ["sleep", "refuse"],
            "call_or_refuse",
            GangFailed,
            "rank 1: step() raised RequestError",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ["bug", "bug"],
            "call_or_refuse",
            GangFailed,
            "rank 0: step() raised ZeroDivisionError",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_gang_fails_with_its_ranks(
    parts: list[str], way: str, raised: type[Exception], said: str, ray_cluster: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    from cluster import gang as gang_module
    from cluster.gang import Gang

    monkeypatch.setattr(gang_module, "_DEATH_S", 1.0)
    gang = Gang([ray.remote(FaultyRank).options(num_cpus=0).remote(part) for part in parts])

    async def call() -> None:
        # Wait until all are up; the deadline covers only what follows.
        await asyncio.gather(*(actor.__ray_ready__.remote() for actor in gang._actors))
        await getattr(gang, way)("step", phase="step", timeout_s=1.0)

    try:
        with pytest.raises(raised, match=re.escape(said)):
            asyncio.run(asyncio.wait_for(call(), DEADLINE_S))
    finally:
        gang.stop()
