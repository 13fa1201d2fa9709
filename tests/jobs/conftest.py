"""Databases of jobs: tests run on SQLite and, in the long tier, on a real PostgreSQL too."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.jobs.store import JobStore
from tests.clock import Clock
from tests.jobs.postgres import fresh_postgres_url, postgres_url  # noqa: F401  fixtures
from tests.jobs.running import serve  # noqa: F401  fixture


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.slow)])
def jobs_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database that does not exist yet, or is empty."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/jobs.sqlite3"
    return request.getfixturevalue("fresh_postgres_url")


@pytest.fixture
def clock() -> Clock:
    """The store's clock."""
    return Clock()


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with this release's tables; copying it is faster than running every migration."""
    path = tmp_path_factory.mktemp("jobs") / "empty.sqlite3"
    JobStore.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def store(jobs_url: str, empty_sqlite: Path, clock: Clock) -> Iterator[JobStore]:
    """An empty store of jobs."""
    if jobs_url.startswith("sqlite:///"):
        shutil.copy(empty_sqlite, jobs_url.removeprefix("sqlite:///"))
    opened = JobStore.open(jobs_url, clock)
    yield opened
    opened.close()
