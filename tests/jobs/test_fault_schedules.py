"""Seeded schedules of faults: once they stop, every accepted job ends completed, once, in the order of the queue."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import MediaError
from deployments import failures
from deployments.failures import Blame
from tests.jobs.fault_schedules import BOUNDARIES, run_schedule


@pytest.fixture(autouse=True)
def no_log(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Keep thousands of planned failures out of the log."""
    with caplog.at_level(logging.CRITICAL, "ray.serve"):
        yield


@pytest.fixture(scope="module")
def layout(tiny_nano: Path) -> CheckpointLayout:
    return CheckpointLayout.open(tiny_nano)


@pytest.mark.parametrize(
    "seeds",
    [range(20), pytest.param(range(20, 200), marks=pytest.mark.slow)],  # `make soak` runs 1,000
    ids=lambda seeds: f"{seeds[0]}-{seeds[-1]}",
)
def test_every_accepted_job_is_completed_once_faults_stop(
    seeds: range, layout: CheckpointLayout, empty_sqlite: Path
) -> None:
    num_faults = sum((run_schedule(seed, layout, empty_sqlite) for seed in seeds), Counter())
    assert not set(BOUNDARIES) - num_faults.keys(), "every boundary has failed at least once"


def test_an_error_that_is_blamed_wrongly_is_noticed(
    layout: CheckpointLayout, empty_sqlite: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [(*row[:3], Blame.REQUEST) if row[0] is MediaError else row for row in failures._TABLE]
    monkeypatch.setattr(failures, "_TABLE", tuple(wrong))
    with pytest.raises(AssertionError, match="media_unavailable"):
        for seed in range(20):
            run_schedule(seed, layout, empty_sqlite)
