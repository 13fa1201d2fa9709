"""Jobs: real progress, resumed events, shares of a full queue by class."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.sampler.schedule import make_schedule
from deployments.jobs.store import JobStore
from deployments.launch import cli
from tests.app.http_jobs import (
    CLASSES,
    DEADLINE_S,
    SMALL,
    create_job,
    events_of,
    get_until_up,
    patient_client,
    wait_for_end,
)
from tests.settling import eventually

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def jobs_app(start_app: Callable[..., Any]) -> Any:
    """Two videos run at a time, few wait."""
    return start_app("jobs", jobs__max_running_videos=2, jobs__max_queued=24)


@pytest.fixture
def http(jobs_app: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=jobs_app.url, timeout=DEADLINE_S) as client:
        yield client


def test_every_step_event_carries_the_ranks_sigma(jobs_app: Any, http: httpx2.Client) -> None:
    job_id = create_job(http, num_inference_steps=12, num_frames=9)
    events = list(events_of(http, job_id))
    numbers = [number for number, kind, _ in events if kind != "queued"]
    assert numbers == list(range(1, len(numbers) + 1))
    steps = [data for _, kind, data in events if kind == "step"]
    layout = CheckpointLayout.open(jobs_app.config.checkpoint)
    sigmas = make_schedule("native", 12, flow_shift=10.0, config=layout.scheduler).sigmas
    assert [(step["step"], step["num_steps"], step["sigma"], step["pid"]) for step in steps] == [
        (n, 12, sigmas[n], os.getpid()) for n in range(1, 13)
    ]
    assert all(step["eta_s"] >= 0 and step["step_s"] > 0 for step in steps)
    assert steps[-1]["eta_s"] == 0
    kinds = [kind for _, kind, _ in events]
    assert kinds.index("started") < kinds.index("step") < kinds.index("file") < kinds.index("decoding")
    number, kind, job = events[-1]
    assert kind == "completed"
    assert (job["status"], job["progress"], job["step"]) == ("completed", 100, 12)
    # A reconnecting follower gets what it missed.
    assert list(events_of(http, job_id, after=number - 2)) == events[-2:]


def test_while_steps_are_held_progress_stands_still(jobs_app: Any, http: httpx2.Client) -> None:
    job_id = create_job(http, num_inference_steps=1000)
    path = f"/v1/videos/{job_id}"
    assert eventually(lambda: get_until_up(http, path)["step"] >= 5)
    with jobs_app.hold():
        # Events from before arrive within a quantum or two of a quarter second.
        before, held = get_until_up(http, path), None
        while held is None or before["step"] != held["step"]:
            before = held or before
            time.sleep(0.5)
            held = get_until_up(http, path)
        assert 5 <= held["step"] < 1000
        time.sleep(0.5)
        still = get_until_up(http, path)
        for name in ("step", "sigma", "progress", "stage", "status"):
            assert still[name] == held[name]
        assert still["status"] == "in_progress"
    assert eventually(lambda: get_until_up(http, path)["step"] > held["step"]), "and then it goes on"
    assert http.post(f"{path}/cancel").status_code == 200
    job = wait_for_end(http, job_id)
    assert (job["status"], job["error"]["code"]) == ("failed", "cancelled")
    assert 0 < job["progress"] < 100


def test_classes_get_their_shares_and_a_full_queue_sends_retry_after(jobs_app: Any, http: httpx2.Client) -> None:
    """Steps are held until the queue is full: then the order is the queue's own."""
    assert wait_for_end(http, create_job(http, **SMALL))["status"] == "completed", "there is a speed to tell times by"
    with jobs_app.hold():
        running = [create_job(http, **SMALL) for _ in range(2)]
        assert eventually(lambda: all(get_until_up(http, f"/v1/videos/{it}")["status"] != "queued" for it in running))
        # The least urgent come first.
        classes = [name for name in reversed(CLASSES) for _ in range(8)]
        ids = [create_job(http, **SMALL, service_class=name) for name in classes]
        refused = http.post("/v1/videos", json=SMALL)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "overloaded"
        assert 1 <= int(refused.headers["retry-after"]) <= 3600
        positions = [get_until_up(http, f"/v1/videos/{job_id}")["queue_position"] for job_id in ids]
        assert sorted(positions) == list(range(2, 26)), "two run"
    jobs = [wait_for_end(http, job_id) for job_id in ids]
    assert {job["status"] for job in jobs} == {"completed"}
    assert http.post("/v1/videos", json=SMALL).status_code == 200
    store = JobStore.open(jobs_app.config.jobs.database)
    stored = [store.get(job_id) for job_id in ids]
    store.close()
    order = [job.service_class for job in sorted((job for job in stored if job), key=lambda job: job.started_s or 0.0)]
    # Of the first thirteen eight are interactive, four standard and one batch, give or take one at the edges.
    shares = Counter(order[:13])
    assert abs(shares["interactive"] - 8) <= 1, order
    assert abs(shares["standard"] - 4) <= 1, order
    assert abs(shares["batch"] - 1) <= 1, order


def test_all_clients_that_honour_retry_after_get_their_clip(jobs_app: Any) -> None:
    num_clients = 40

    async def all_of_them() -> list[tuple[str, list[int]]]:
        limits = httpx2.Limits(max_connections=num_clients)
        async with (
            httpx2.AsyncClient(base_url=jobs_app.url, timeout=DEADLINE_S, limits=limits) as http,
            asyncio.timeout(DEADLINE_S),
        ):
            return await asyncio.gather(*(patient_client(http, number) for number in range(num_clients)))

    made = asyncio.run(all_of_them())
    waits = [wait for _, own in made for wait in own]
    assert len({job_id for job_id, _ in made}) == num_clients
    assert waits, "the queue was full"
    assert all(1 <= wait <= 3600 for wait in waits)


# The command


def cosmos3_jobs(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run ``cosmos3 jobs``; return exit status, output and errors."""
    status = cli.main(["jobs", *arguments])
    said = capsys.readouterr()
    return status, said.out, said.err


def test_the_command_lists_shows_watches_and_cancels(
    jobs_app: Any, http: httpx2.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    where = ("--url", jobs_app.url)
    job_id = create_job(http, **{**SMALL, "prompt": "A red car drives\nalong the coast, and then it turns."})
    status, said, shown = cosmos3_jobs(capsys, "watch", job_id, *where)
    assert (status, said.split(":")[0]) == (0, job_id)
    assert ": completed after " in said
    assert "step 2/2" in shown
    assert "5 frames in the file" in shown
    status, table, _ = cosmos3_jobs(capsys, "list", "--limit", "1", *where)
    columns, row = table.splitlines()
    assert columns.split() == ["id", "status", "stage", "steps", "mode", "size", "frames", "made", "prompt"]
    assert row.startswith(f"{job_id}  completed  completed  2/2    text_to_video  32x32  5 ")
    assert row.endswith("A red car drives along the coast, and...")
    status, text, _ = cosmos3_jobs(capsys, "show", job_id, *where)
    assert json.loads(text) == http.get(f"/v1/videos/{job_id}").json()
    with jobs_app.hold():
        held = create_job(http, num_inference_steps=1000)
        assert cosmos3_jobs(capsys, "cancel", held, *where)[:2] == (0, f"{held}: in_progress, is being stopped\n")
    status, said, _ = cosmos3_jobs(capsys, "watch", held, *where)
    assert (status, said.partition(": ")[2].split(":")[:2]) == (1, ["failed", " cancelled"])
    status, _, errors = cosmos3_jobs(capsys, "show", "video_gen_no", *where)
    assert status == 2
    assert errors.startswith("error: ")
