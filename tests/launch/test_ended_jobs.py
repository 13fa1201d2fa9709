"""Lines about jobs that have ended, on the terminal of `cosmos3 serve`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from deployments.config import DEFAULT_CONFIG, AppConfig
from deployments.errors import JobsError
from deployments.jobs.job import JobState, Outcome
from deployments.jobs.store import JobStore
from deployments.launch import ended_jobs
from deployments.launch.ended_jobs import EndedJobs
from tests.clock import Clock
from tests.jobs.making import COMPLETED, LIMITS, claim_existing, make_lease, new_job


@pytest.fixture
def place(tmp_path: Path, tiny_nano: Path) -> AppConfig:
    keys = {
        "checkpoint": str(tiny_nano),
        "model_name": new_job().model,
        "jobs.database": f"sqlite:///{tmp_path}/a.sqlite3",
    }
    return AppConfig.read(DEFAULT_CONFIG, keys)


def end(store: JobStore, outcome: Outcome = COMPLETED) -> str:
    store.create(new_job(), LIMITS)
    return store.finish(make_lease(claim_existing(store)), outcome, keep_media_s=1).job_id


def test_each_job_that_ends_is_one_line(place: AppConfig) -> None:
    clock, lines = Clock(), list[str]()
    assert place.jobs.database is not None
    store = JobStore.open(place.jobs.database, clock)
    end(store)
    clock.advance(1)
    jobs = EndedJobs(place, lines.append, clock)
    clock.advance(1)
    completed = end(store)
    clock.advance(1)
    failed = end(store, Outcome(JobState.FAILED, error_code="out_of_memory", error_message="of\n1 GiB"))
    for _ in range(2):
        jobs.report_new()
    assert len(lines) == 2, "those before the start were shown then"
    assert re.fullmatch(rf"\d\d:\d\d:\d\d {completed} \w+ \d+x\d+ \d+ frames \d+ steps: completed in 0.0 s", lines[0])
    assert lines[1].endswith(": failed: out_of_memory: of 1 GiB")
    assert failed in lines[1]
    jobs.close()


def test_many_at_once_are_spread(place: AppConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ended_jobs, "_MAX_LINES", 2)
    clock, lines = Clock(), list[str]()
    jobs = EndedJobs(place, lines.append, clock)
    assert place.jobs.database is not None
    store = JobStore.open(place.jobs.database, clock)
    for _ in range(3):
        clock.advance(1)
        end(store)
    jobs.report_new()
    assert lines[2:] == ["... and more, which follow"]
    jobs.report_new()
    assert len(lines) == 4


def test_a_database_that_is_away_is_no_line(place: AppConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    jobs = EndedJobs(place, lines.append)

    def refuse(*_: object) -> None:
        raise JobsError("away")

    monkeypatch.setattr(JobStore, "find_ended", refuse)
    jobs.report_new()
    assert lines == []
