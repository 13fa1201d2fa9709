"""Jobs survive the death of the processes that serve them. What needs no death is in tests/app/test_jobs.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cosmos3_core.request import GenerationRequest
from tests.app.http_jobs import DEADLINE_S, LONG, ended, events_of, job_of, patiently
from tests.core_reference import Reference

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def http(jobs_app: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=jobs_app.url, timeout=DEADLINE_S) as client:
        yield client


def replica_pids(app_name: str, stage: str) -> list[int]:
    """Processes of a stage's replicas, by the title that Ray gives them."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            title = path.read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
        except OSError:
            continue
        if f"ServeReplica:{app_name}:{stage}" in title:
            pids.append(int(path.parent.name))
    return pids


def director_replica(app_name: str) -> Any:
    """The actor that Serve runs the app's one Director in."""
    import ray
    from ray.util import list_named_actors

    prefix = f"SERVE_REPLICA::{app_name}#Director#"
    (name,) = (it["name"] for it in list_named_actors(all_namespaces=True) if it["name"].startswith(prefix))
    return ray.get_actor(name, namespace="serve")


@pytest.mark.parametrize("stage", ["Ingress", "Director"])
def test_a_killed_process_costs_no_job(
    stage: str, jobs_app: Any, http: httpx2.Client, reference: Reference, eventually: Callable[..., bool]
) -> None:
    """Three that wait and two that run."""
    done_before = ended(http, job_of(http, num_inference_steps=2, num_frames=5))
    content = http.get(f"/v1/videos/{done_before['id']}/content").content
    seeds = [1, 2, 1, 2, 1]
    ids = [job_of(http, seed=seed) for seed in seeds]

    def running() -> list[dict[str, Any]]:
        told = [patiently(http, f"/v1/videos/{job_id}") for job_id in ids]
        return [job for job in told if job["status"] == "in_progress" and job["step"] > 0]

    assert eventually(running)
    states = [patiently(http, f"/v1/videos/{job_id}")["status"] for job_id in ids]
    assert states.count("queued") >= 2
    (pid,) = replica_pids("jobs", stage)
    os.kill(pid, signal.SIGKILL)
    jobs = [ended(http, job_id) for job_id in ids]
    assert [job["status"] for job in jobs] == ["completed"] * 5, [job["error"] for job in jobs]
    for seed, job in zip(seeds, jobs, strict=True):
        assert job["frames_sha256"] == reference(GenerationRequest(**LONG, seed=seed)).frames_sha256
        answer = http.get(f"/v1/videos/{job['id']}/content")
        assert answer.status_code == 200
        assert len(answer.content) == int(answer.headers["content-length"])
    attempts = [job["attempts"] for job in jobs]
    assert (max(attempts) == 2) == (stage == "Director"), attempts
    assert http.get(f"/v1/videos/{done_before['id']}/content").content == content
    assert patiently(http, f"/v1/videos/{done_before['id']}") == done_before


def test_a_taken_over_job_goes_on_where_it_was(jobs_app: Any, http: httpx2.Client, reference: Reference) -> None:
    steps = 300
    job_id = job_of(http, num_inference_steps=steps, seed=5, num_frames=9)
    for _, kind, data in events_of(http, job_id):
        if kind == "step" and data["step"] > steps // 2:
            break
    (pid,) = replica_pids("jobs", "Director")
    os.kill(pid, signal.SIGKILL)
    job = ended(http, job_id)
    assert (job["status"], job["attempts"]) == ("completed", 2), job["error"]
    told = [(kind, data) for _, kind, data in events_of(http, job_id)]
    began = [index for index, (kind, _) in enumerate(told) if kind == "started"]
    assert len(began) == 2
    again = next(data["step"] for kind, data in told[began[1] :] if kind == "step")
    assert again > steps // 8, "it did not begin anew"
    request = GenerationRequest(**{**LONG, "num_inference_steps": steps, "num_frames": 9}, seed=5)
    assert job["frames_sha256"] == reference(request).frames_sha256


def test_a_replica_that_serve_stops_gives_its_jobs_back(
    jobs_app: Any, http: httpx2.Client, reference: Reference, eventually: Callable[..., bool]
) -> None:
    """As when there are to be fewer of them: jobs are no requests, and Serve waits for requests alone."""
    import ray

    job_id = job_of(http, seed=6)
    assert eventually(lambda: patiently(http, f"/v1/videos/{job_id}")["step"] > 3)
    replica = director_replica("jobs")
    ray.get(replica.perform_graceful_shutdown.remote(), timeout=DEADLINE_S)
    ray.kill(replica)  # as Serve does next
    job = ended(http, job_id)
    assert (job["status"], job["attempts"]) == ("completed", 1), "what is given back was no attempt"
    kinds = [kind for _, kind, _ in events_of(http, job_id)]
    assert kinds.count("started") == 2
    assert job["frames_sha256"] == reference(GenerationRequest(**LONG, seed=6)).frames_sha256
