"""Jobs survive the death of the processes that serve them; other tests of jobs are in tests/app/test_jobs.py."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cluster.errors import OverloadedError
from cluster.events import StepDone
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.clients.http_transport import make_body
from tests.app.http_jobs import DEADLINE_S, LONG, create_job, events_of, get_until_up, wait_for_end
from tests.core_reference import Reference
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]


@pytest.fixture
def http(app: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=app.url, timeout=DEADLINE_S) as client:
        yield client


def replica_pids(app_name: str, stage: str) -> list[int]:
    """List a stage's replica processes, by Ray's process title."""
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
    """Return the actor of the app's one Director."""
    import ray
    from ray.util import list_named_actors

    prefix = f"SERVE_REPLICA::{app_name}#Director#"
    (name,) = (it["name"] for it in list_named_actors(all_namespaces=True) if it["name"].startswith(prefix))
    return ray.get_actor(name, namespace="serve")


@pytest.mark.parametrize("stage", ["Ingress", "Director"])
def test_a_killed_process_costs_no_job(stage: str, app: Any, http: httpx2.Client, reference: Reference) -> None:
    """Three jobs wait and two run."""
    done_before = wait_for_end(http, create_job(http, num_inference_steps=2, num_frames=5))
    content = http.get(f"/v1/videos/{done_before['id']}/content").content
    seeds = [1, 2, 1, 2, 1]
    ids = [create_job(http, seed=seed) for seed in seeds]

    def running() -> list[dict[str, Any]]:
        told = [get_until_up(http, f"/v1/videos/{job_id}") for job_id in ids]
        return [job for job in told if job["status"] == "in_progress" and job["step"] > 0]

    assert eventually(running)
    states = [get_until_up(http, f"/v1/videos/{job_id}")["status"] for job_id in ids]
    assert states.count("queued") >= 2
    (pid,) = replica_pids(app.name, stage)
    os.kill(pid, signal.SIGKILL)
    jobs = [wait_for_end(http, job_id) for job_id in ids]
    assert [job["status"] for job in jobs] == ["completed"] * 5, [job["error"] for job in jobs]
    for seed, job in zip(seeds, jobs, strict=True):
        assert job["frames_sha256"] == reference(GenerationRequest(**LONG, seed=seed)).frames_sha256
        answer = http.get(f"/v1/videos/{job['id']}/content")
        assert answer.status_code == 200
        assert len(answer.content) == int(answer.headers["content-length"])
    attempts = [job["attempts"] for job in jobs]
    assert (max(attempts) == 2) == (stage == "Director"), attempts
    assert http.get(f"/v1/videos/{done_before['id']}/content").content == content
    assert get_until_up(http, f"/v1/videos/{done_before['id']}") == done_before


def test_a_job_resumes_from_its_saved_state_on_another_director(
    app: Any, http: httpx2.Client, reference: Reference
) -> None:
    steps = 160
    job_id = create_job(http, num_inference_steps=steps, seed=5, num_frames=9)
    for _, kind, data in events_of(http, job_id):
        if kind == "step" and data["step"] > steps // 2:
            break
    assert eventually((app.config.media.directory / job_id / "checkpoint").exists)
    (pid,) = replica_pids(app.name, "Director")
    os.kill(pid, signal.SIGKILL)
    job = wait_for_end(http, job_id)
    assert (job["status"], job["attempts"]) == ("completed", 2), job["error"]
    events = [(kind, data) for _, kind, data in events_of(http, job_id)]
    began = [index for index, (kind, _) in enumerate(events) if kind == "started"]
    assert len(began) == 2
    again = next(data["step"] for kind, data in events[began[1] :] if kind == "step")
    assert again > 1, "it did not begin anew"
    request = GenerationRequest(**{**LONG, "num_inference_steps": steps, "num_frames": 9}, seed=5)
    assert job["frames_sha256"] == reference(request).frames_sha256


def test_a_replica_stopped_by_serve_releases_its_jobs(app: Any, http: httpx2.Client, reference: Reference) -> None:
    """The same happens when scaling down: Serve waits for requests only, and jobs are not requests."""
    import ray

    job_id = create_job(http, seed=6)
    assert eventually(lambda: get_until_up(http, f"/v1/videos/{job_id}")["step"] > 3)
    replica = director_replica(app.name)
    ray.get(replica.perform_graceful_shutdown.remote(), timeout=DEADLINE_S)
    ray.kill(replica)  # as Serve does next
    job = wait_for_end(http, job_id)
    assert (job["status"], job["attempts"]) == ("completed", 1), "what is given back was no attempt"
    kinds = [kind for _, kind, _ in events_of(http, job_id)]
    assert kinds.count("started") == 2
    assert job["frames_sha256"] == reference(GenerationRequest(**LONG, seed=6)).frames_sha256


def num_open(app: Any) -> int:
    """Count the jobs that have not ended, including attached ones, which no list shows."""
    path = app.config.jobs.database.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as database:
        query = "select count(*) from jobs where state in ('queued', 'in_progress')"
        return int(database.execute(query).fetchone()[0])


def test_beyond_its_bounds_the_app_sends_retry_after(app: Any) -> None:
    """While a held rank keeps them full, the ingress (three calls, one waits) and the queue of jobs reject callers.

    They answer with 429, or its typed error over handles, and never with a 5xx.
    """
    assert app.config.ingress.max_ongoing_requests == 3
    assert app.config.ingress.max_queued_requests == 1
    num_places = app.config.jobs.max_running_videos + app.config.jobs.max_queued
    small = GenerationRequest(prompt="a car", num_frames=5, height=80, width=96, num_inference_steps=2)

    def by_http() -> httpx2.Response:
        return httpx2.post(f"{app.url}/v1/videos/sync", json=make_body(small), timeout=500)

    with (
        ExitStack() as streams,
        ThreadPoolExecutor(11) as pool,
    ):
        running = streams.enter_context(app.client.stream(replace(small, num_inference_steps=1000)))
        rank_pid = next(event.pid for event in running if isinstance(event, StepDone))
        os.kill(rank_pid, signal.SIGSTOP)
        try:
            taken: list[Future[httpx2.Response]] = []
            for _ in range(3):  # one by one: Serve counts calls that it is about to hand over as waiting
                taken.append(pool.submit(by_http))
                assert eventually(lambda: num_open(app) == 1 + len(taken)), taken
            others = [pool.submit(by_http) for _ in range(8)]
            assert eventually(lambda: sum(each.done() for each in others) == 7), "one has the place that there is"
            refused = [each.result() for each in others if each.done()]
            for _ in range(num_places - num_open(app)):
                queued = streams.enter_context(app.client.stream(small))
                assert isinstance(next(queued), messages.Accepted)
            with pytest.raises(OverloadedError) as full:
                app.client.generate(small)
        finally:
            os.kill(rank_pid, signal.SIGCONT)
        streams.close()
        served = [each.result() for each in (*taken, *others) if each.result() not in refused]
    assert {answer.status_code for answer in refused} == {429}
    assert all(float(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert full.value.retry_after_s >= 1
    assert [answer.status_code for answer in served] == [200] * 4
    assert app.client.generate(small).info.num_frames == 5, "a place is free again"
