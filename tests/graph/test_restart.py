"""The whole service, Ray included, is killed and restarted: no accepted job is lost."""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cosmos3_core.generate import GenerationResult
from cosmos3_core.media.probe import read_frames
from cosmos3_core.request import GenerationRequest
from tests.graph.serving import Serving, serving
from tests.soak.load import find_pids

pytestmark = [pytest.mark.serve, pytest.mark.timeout(1500)]

Reference = Callable[[GenerationRequest], GenerationResult]
DEADLINE_S = 300.0
LONG: dict[str, Any] = {
    "prompt": "A red car.",
    "num_frames": 33,
    "height": 96,
    "width": 128,
    "num_inference_steps": 80,
    "negative_prompt": "",
}
SEEDS = (1, 2, 1, 2, 1)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite3"
    return str(request.getfixturevalue("fresh_postgres_url"))


@contextmanager
def service(directory: Path, checkpoint: Path, database: str) -> Iterator[tuple[Serving, httpx2.Client]]:
    settings = {
        "media.directory": directory / "media",
        "jobs.database": database,
        "jobs.max_running_videos": 2,
        "jobs.lease_s": 5,
        "jobs.checkpoint_period_s": 0.2,
        "transformer.save_period_s": 0.2,
    }
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    with (
        serving(directory, "--checkpoint", str(checkpoint), "--num-cpus", "4", *flags) as app,
        httpx2.Client(base_url=app.url(), timeout=60) as http,
    ):
        yield app, http


def kill_everything(app: Serving) -> None:
    """Send SIGKILL to every process of the service."""
    deadline_s = time.monotonic() + DEADLINE_S
    while pids := app.leftovers():
        assert time.monotonic() < deadline_s
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        app.process.poll()
        time.sleep(0.05)


def jobs_of(http: httpx2.Client, ids: list[str]) -> list[dict[str, Any]]:
    """Read all jobs in one answer: of several, each shows another moment."""
    jobs = {job["id"]: job for job in http.get("/v1/videos", params={"limit": 100}).json()["data"]}
    return [jobs[job_id] for job_id in ids]


def wait_for_ends(http: httpx2.Client, ids: list[str]) -> list[dict[str, Any]]:
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        jobs = jobs_of(http, ids)
        if all(job["status"] not in ("queued", "in_progress") for job in jobs):
            return jobs
        assert time.monotonic() < deadline_s, jobs
        time.sleep(0.1)


def test_every_job_completes_after_the_service_was_killed(
    tmp_path: Path, tiny_nano: Path, database: str, reference: Reference
) -> None:
    """Two jobs run and others wait; one at least has ended."""
    with service(tmp_path, tiny_nano, database) as (app, http):
        quick = http.post("/v1/videos", json={**LONG, "num_frames": 5, "num_inference_steps": 2}).json()["id"]
        (before,) = wait_for_ends(http, [quick])
        content = http.get(f"/v1/videos/{quick}/content").content
        ids = [http.post("/v1/videos", json={**LONG, "seed": seed}).json()["id"] for seed in SEEDS]
        deadline_s = time.monotonic() + DEADLINE_S
        while sum(job["step"] > 5 for job in jobs_of(http, ids)) < 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        states = [job["status"] for job in jobs_of(http, ids)]
        assert states.count("in_progress") == 2, states
        assert states.count("queued") >= 2, states
        kill_everything(app)
    with service(tmp_path, tiny_nano, database) as (_, http):
        jobs = wait_for_ends(http, ids)
        assert [job["status"] for job in jobs] == ["completed"] * 5, [job["error"] for job in jobs]
        assert sorted(job["attempts"] for job in jobs) == [1, 1, 1, 2, 2]
        for seed, job in zip(SEEDS, jobs, strict=True):
            expected = reference(GenerationRequest(**LONG, seed=seed))
            assert job["frames_sha256"] == expected.frames_sha256
            path = tmp_path / f"{job['id']}.mp4"
            path.write_bytes(http.get(f"/v1/videos/{job['id']}/content").content)
            assert sum(1 for _ in read_frames(path)) == 33, "no file is half written"
        assert http.get(f"/v1/videos/{quick}/content").content == content
        (after,) = jobs_of(http, [quick])
        assert after == before
        listed = http.get("/v1/videos", params={"limit": 10}).json()["data"]
        assert {job["id"] for job in listed} == {*ids, quick}


def stop_while_it_writes(pid: int, path: Path) -> None:
    """Stop a process at a moment when it holds the write lock of a SQLite file, and goes on to hold it."""
    deadline_s = time.monotonic() + DEADLINE_S
    with closing(sqlite3.connect(path, timeout=1.0, isolation_level=None)) as database:
        while time.monotonic() < deadline_s:
            os.kill(pid, signal.SIGSTOP)
            try:
                database.execute("BEGIN IMMEDIATE")
                database.execute("ROLLBACK")
            except sqlite3.OperationalError:
                return
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.003)
    pytest.fail("it never wrote")


@pytest.mark.slow
def test_a_director_that_hangs_with_the_lock_of_the_database_is_killed(tmp_path: Path, tiny_nano: Path) -> None:
    """Otherwise no other process could write while it has time to end its requests, which is an hour."""
    with service(tmp_path, tiny_nano, f"sqlite:///{tmp_path}/jobs.sqlite3") as (app, http):
        job_id = http.post("/v1/videos", json={**LONG, "num_inference_steps": 300}).json()["id"]
        deadline_s = time.monotonic() + DEADLINE_S
        while jobs_of(http, [job_id])[0]["step"] < 5:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        (pid,) = find_pids(app, r"ray::ServeReplica:\w+:Director")
        stop_while_it_writes(pid, tmp_path / "jobs.sqlite3")
        (job,) = wait_for_ends(http, [job_id])
        assert (job["status"], job["attempts"]) == ("completed", 2)
        assert pid not in app.leftovers()
