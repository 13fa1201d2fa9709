"""Any process of the graph may die in the middle of a request: it completes, or fails in words, in time."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from cluster.errors import ClusterError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from deployments import messages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

# Long enough in every stage to be hit in the middle: 600 steps, 31 chunks.
LONG = GenerationRequest(prompt="A red car.", num_frames=121, height=96, width=128, num_inference_steps=600, seed=3)
DEADLINE_S = 120.0


@dataclass(frozen=True)
class Victim:
    """Whose process dies, and upon which event."""

    name: str
    kill_at: type
    pid_of: Callable[[dict[type, Any]], int]
    must_complete: bool = True


VICTIMS = [
    Victim("tokenizer", messages.Accepted, lambda known: known[messages.Tokenized].pid),
    Victim("rank", messages.StepDone, lambda known: known[messages.StepDone].pid),
    Victim("leader", messages.StepDone, lambda known: known[messages.LatentsReady].pid),
    Victim("vae", messages.ChunkEncoded, lambda known: known[messages.ChunkEncoded].decoded_by),
    Victim("encoder", messages.ChunkEncoded, lambda known: known[messages.ChunkEncoded].pid),
    # Whoever dies with the request in its hands cannot finish it; the caller is told, and may ask again.
    Victim("director", messages.ChunkEncoded, lambda known: known[messages.Accepted].pid, must_complete=False),
]


def events_by_kind(app: Any) -> dict[type, Any]:
    """A small request's events; tells which processes serve now."""
    request = GenerationRequest(prompt="x", num_frames=5, height=32, width=32, num_inference_steps=2)
    return {type(event): event for event in app.client.stream(request, timeout_s=DEADLINE_S)}


def is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("victim", VICTIMS, ids=[victim.name for victim in VICTIMS])
def test_a_killed_process(
    victim: Victim,
    app: Any,
    reference: Callable[[GenerationRequest], GenerationResult],
    eventually: Callable[..., bool],
) -> None:
    from ray.util.placement_group import placement_group_table

    expected = reference(LONG).frames_sha256
    known = events_by_kind(app)
    pid = victim.pid_of(known)
    rank_pid, leader_pid = known[messages.StepDone].pid, known[messages.LatentsReady].pid

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
        if victim.name != "tokenizer":  # whose part may be done before it dies
            assert retried
    else:
        assert finished is None

    # The next request is served, by a new process in the victim's place, and nothing of the old one is left.
    again = events_by_kind(app)
    assert again[messages.Finished].num_frames == 5
    assert eventually(lambda: not is_alive(pid))
    if victim.name in ("rank", "leader"):
        assert again[messages.StepDone].pid != rank_pid
        assert eventually(lambda: not is_alive(rank_pid) and not is_alive(leader_pid))
    assert eventually(
        lambda: [group["state"] for group in placement_group_table().values()].count("CREATED") == num_gangs()
    )
    assert eventually(lambda: object_store_bytes() < 2 * 2**20), object_store_bytes()


def num_gangs() -> int:
    """Running gangs of all apps of the session."""
    from ray import serve

    apps = serve.status().applications.values()
    return sum(it.deployments["Transformer"].replica_states.get("RUNNING", 0) for it in apps)


def object_store_bytes() -> int:
    """Bytes that the object store holds now."""
    import ray

    total = ray.cluster_resources()["object_store_memory"]
    return int(total - ray.available_resources()["object_store_memory"])


def test_a_gang_that_hangs_counts_as_dead(ray_cluster: int) -> None:
    """A rank that does not answer in time fails the gang, with the phase and the method named."""
    import asyncio

    import ray

    from cluster.errors import GangFailed
    from cluster.gang import Gang

    class Sleeper:
        def step(self) -> None:
            time.sleep(30)

    actor = ray.remote(Sleeper).options(num_cpus=0).remote()
    gang = Gang([actor])

    async def call() -> None:
        await gang.call("step", phase="step", timeout_s=1.0)

    with pytest.raises(GangFailed, match=r"'step', rank 0: no answer from step\(\) within 1 s"):
        asyncio.run(call())
    gang.stop()
