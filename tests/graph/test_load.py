"""Many clients at once: no job is lost, all get their share, memory is bounded."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cosmos3_core.engine import Engine
from cosmos3_core.generate import generate
from cosmos3_core.request import GenerationRequest
from tests.app.http_jobs import patient_client
from tests.graph.test_jobs import replica_pids

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

SMALL: dict[str, Any] = {"prompt": "a car", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
DEADLINE_S = 1500.0


def own_bytes(pid: int) -> int:
    """Return a process's anonymous memory."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no RssAnon")


@pytest.fixture(scope="module")
def load_app(start_app: Callable[..., Any]) -> Any:
    """An app that runs two videos and queues few."""
    return start_app("load", jobs__max_running_videos=2, jobs__max_queued=24)


@pytest.mark.slow  # tests/app has 40 of them in one process
@pytest.mark.parametrize("num_clients", [40, 200])
def test_many_concurrent_clients_all_get_their_clips(num_clients: int, load_app: Any) -> None:
    pids = [*replica_pids(load_app.name, "Ingress"), *replica_pids(load_app.name, "Director")]
    assert len(pids) == 2
    before = {pid: own_bytes(pid) for pid in pids}
    start_s = time.monotonic()

    async def all_of_them() -> list[tuple[str, list[int]]]:
        limits = httpx2.Limits(max_connections=num_clients)
        async with httpx2.AsyncClient(base_url=load_app.url, timeout=300, limits=limits) as http:
            async with asyncio.timeout(DEADLINE_S):
                return await asyncio.gather(*(patient_client(http, number) for number in range(num_clients)))

    made = asyncio.run(all_of_them())
    seconds = time.monotonic() - start_s
    ids, waits = [job_id for job_id, _ in made], [wait for _, own in made for wait in own]
    assert len(set(ids)) == num_clients
    assert waits, "the queue was full"
    assert all(1 <= wait <= 3600 for wait in waits)
    # Retry-After is accurate: clients that honour it come back only a few times.
    tries = [1 + len(own) for _, own in made]
    assert statistics.mean(tries) < 10, tries
    grown = max(own_bytes(pid) - before[pid] for pid in pids)
    assert grown < 100e6, grown
    print(
        f"{num_clients} clients in {seconds:.1f} s; tries: {statistics.mean(tries):.1f}, {max(tries)} at most; "
        f"told to wait {min(waits)} to {max(waits)} s; grown by {grown / 1e6:.1f} MB at most"
    )


@pytest.mark.slow
def test_overhead_of_the_service_is_printed(load_app: Any, tiny_nano: Path, tmp_path: Path) -> None:
    """Print a request's seconds in one process, over HTTP and as a job; nothing is asserted."""
    request = GenerationRequest(**SMALL)
    seconds: dict[str, list[float]] = {"one process": [], "POST /v1/videos/sync": [], "handle": [], "job, events": []}
    with Engine(tiny_nano, device="cpu") as engine, httpx2.Client(base_url=load_app.url, timeout=300) as http:

        def alone() -> None:
            generate(engine, request, tmp_path / "alone")

        def sync() -> None:
            assert http.post("/v1/videos/sync", json=SMALL).status_code == 200

        def handle() -> None:
            load_app.client.generate(request)

        def job() -> None:
            job_id = http.post("/v1/videos", json=SMALL).json()["id"]
            assert "event: completed" in http.get(f"/v1/videos/{job_id}/events").text

        for number in range(23):
            for name, work in zip(seconds, (alone, sync, handle, job), strict=True):
                start_s = time.perf_counter()
                work()
                if number >= 3:
                    seconds[name].append(time.perf_counter() - start_s)
    alone_s = statistics.median(seconds["one process"])
    for name, measured in seconds.items():
        median_s = statistics.median(measured)
        print(f"{name:24} {1000 * median_s:7.1f} ms, {1000 * (median_s - alone_s):+7.1f} ms")
    assert all(measured for measured in seconds.values())
