"""Jobs through the whole graph: progress is real, and they survive the death of whatever serves them."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from cosmos3_core.sampler.schedule import make_schedule
from deployments import messages

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

Reference = Callable[[GenerationRequest], GenerationResult]
DEADLINE_S = 200.0
LONG: dict[str, Any] = {
    "prompt": "A red car.",
    "num_frames": 33,
    "height": 96,
    "width": 128,
    "num_inference_steps": 60,
    "negative_prompt": "",
}


@pytest.fixture
def http(jobs_app: Any) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=jobs_app.url, timeout=DEADLINE_S) as client:
        yield client


def job_of(http: httpx.Client, **changed: Any) -> str:
    answer = http.post("/v1/videos", json={**LONG, **changed})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def patiently(http: httpx.Client, path: str) -> dict[str, Any]:
    """What a path says, once whoever says it is there again."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            answer = http.get(path)
            if answer.status_code == 200:
                return dict(answer.json())
        except httpx.TransportError as error:
            answer = error  # type: ignore[assignment]
        assert time.monotonic() < deadline_s, answer
        time.sleep(0.2)


def ended(http: httpx.Client, job_id: str) -> dict[str, Any]:
    deadline_s = time.monotonic() + DEADLINE_S
    while (job := patiently(http, f"/v1/videos/{job_id}"))["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline_s, job
        time.sleep(0.1)
    return job


def events_of(http: httpx.Client, job_id: str, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(number, kind, data) of every event."""
    headers = {"last-event-id": str(after)} if after else {}
    with http.stream("GET", f"/v1/videos/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        number, kind = 0, ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                number = int(value)
            elif name == "event":
                kind = value
            elif name == "data":
                yield number, kind, json.loads(value)
                number = 0


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


def test_every_step_event_carries_the_ranks_sigma(jobs_app: Any, http: httpx.Client) -> None:
    small = GenerationRequest(prompt="x", num_frames=5, height=32, width=32, num_inference_steps=2)
    (rank_pid,) = {event.pid for event in jobs_app.client.stream(small) if isinstance(event, messages.StepDone)}
    job_id = job_of(http, num_inference_steps=12, num_frames=9)
    events = list(events_of(http, job_id))
    numbers = [number for number, kind, _ in events if kind != "queued"]
    assert numbers == list(range(1, len(numbers) + 1))
    steps = [data for _, kind, data in events if kind == "step"]
    layout = CheckpointLayout.open(jobs_app.config.checkpoint)
    sigmas = make_schedule("native", 12, flow_shift=10.0, config=layout.scheduler).sigmas
    assert [(step["step"], step["num_steps"], step["sigma"], step["pid"]) for step in steps] == [
        (n, 12, sigmas[n], rank_pid) for n in range(1, 13)
    ]
    assert all(step["eta_s"] >= 0 and step["step_s"] > 0 for step in steps)
    assert steps[-1]["eta_s"] == 0
    kinds = [kind for _, kind, _ in events]
    assert kinds.index("started") < kinds.index("step") < kinds.index("file") < kinds.index("decoding")
    number, kind, job = events[-1]
    assert kind == "completed"
    assert (job["status"], job["progress"], job["step"]) == ("completed", 100, 12)
    # Whoever comes back is told what came since.
    assert list(events_of(http, job_id, after=number - 2)) == events[-2:]


def test_while_steps_are_held_progress_stands_still(jobs_app: Any, http: httpx.Client) -> None:
    small = GenerationRequest(prompt="x", num_frames=5, height=32, width=32, num_inference_steps=2)
    (rank_pid,) = {event.pid for event in jobs_app.client.stream(small) if isinstance(event, messages.StepDone)}
    job_id = job_of(http, num_inference_steps=400)
    events = events_of(http, job_id)
    try:
        for _, kind, data in events:
            if kind == "step" and data["step"] >= 5:
                os.kill(rank_pid, signal.SIGSTOP)
                break
        time.sleep(1.5)  # what was told before has arrived
        before = patiently(http, f"/v1/videos/{job_id}")
        assert before["status"] == "in_progress"
        assert 5 <= before["step"] < 400
        time.sleep(1.5)
        held = patiently(http, f"/v1/videos/{job_id}")
        for name in ("step", "sigma", "progress", "stage", "status"):
            assert held[name] == before[name]
    finally:
        os.kill(rank_pid, signal.SIGCONT)
    assert any(kind == "step" and data["step"] > before["step"] for _, kind, data in events), "and then it goes on"
    cancelled = http.post(f"/v1/videos/{job_id}/cancel")
    assert cancelled.status_code == 200
    job = ended(http, job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "cancelled")
    assert 0 < job["progress"] < 100


@pytest.mark.parametrize("stage", ["Ingress", "Director"])
def test_a_killed_process_costs_no_job(
    stage: str, jobs_app: Any, http: httpx.Client, reference: Reference, eventually: Callable[..., bool]
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


def test_a_taken_over_job_goes_on_where_it_was(jobs_app: Any, http: httpx.Client, reference: Reference) -> None:
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
    jobs_app: Any, http: httpx.Client, reference: Reference, eventually: Callable[..., bool]
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
