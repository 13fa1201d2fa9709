"""An API of its own for each test."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.jobs.store import JobStore
from tests.api.fake_service import Api

SEED = "COSMOS3_TEST_SEED"
"""The variable that repeats a run of the long tier."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-golden", action="store_true", help="write the files of tests/golden anew")


@pytest.fixture(scope="session")
def layout(tiny_nano: Path) -> CheckpointLayout:
    return CheckpointLayout.open(tiny_nano)


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database of jobs; read-only."""
    path = tmp_path_factory.mktemp("database") / "jobs.sqlite"
    JobStore.open(f"sqlite:///{path}").close()
    return path


@pytest.fixture
def make_api(tmp_path: Path, empty_database: Path, layout: CheckpointLayout) -> Iterator[Callable[..., Api]]:
    """Make an API; the options are those of :class:`Api`."""
    apis: list[Api] = []

    def make(**options: Any) -> Api:
        directory = tmp_path / str(len(apis))
        directory.mkdir()
        apis.append(Api(directory, empty_database, layout, **options))
        return apis[-1]

    yield make
    for api in apis:
        api.close()


@pytest.fixture
def api(make_api: Callable[..., Api]) -> Api:
    return make_api()


@pytest.fixture
def keyed_api(make_api: Callable[..., Api]) -> Api:
    return make_api(needs_keys=True)


@pytest.fixture(scope="module")
def shared_api(
    tmp_path_factory: pytest.TempPathFactory, empty_database: Path, layout: CheckpointLayout
) -> Iterator[Api]:
    """One API for all tests that leave no jobs behind."""
    api = Api(tmp_path_factory.mktemp("shared"), empty_database, layout)
    yield api
    assert api.store.list("", after=None, limit=1, is_ascending=True).jobs == ()
    api.close()


@pytest.fixture
def seed() -> int:
    """Draw the seed of a long run, or take that of the run to repeat."""
    seed = int(os.environ.get(SEED, random.SystemRandom().randrange(2**32)))
    print(f"{SEED}={seed} repeats this")
    return seed
