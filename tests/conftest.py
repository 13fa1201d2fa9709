"""Fixtures that every test package shares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint
from tests.process_budget import (  # noqa: F401  hooks
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

if TYPE_CHECKING:
    from cosmos3_core.engine import Engine

# One thread: tiny tensors gain nothing from two, equality to the bit asks for one, and two cores shared by several
# processes make idle OpenMP threads wait for each other, sixty times slower than none.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# Apps that are told nothing else keep jobs and files in this user's home: not in that of whoever runs the tests.
_HOME = tempfile.TemporaryDirectory(prefix="cosmos3-home-")
os.environ["HOME"] = _HOME.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for GPUs say why they do not run where there is none; those that start Ray, the longest, go first."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    items.sort(key=lambda item: item.get_closest_marker("cluster") is None)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With several workers, one has all tests of a folder, which share one Ray, or one start of ranks.

    Not left to xdist's ``loadgroup``: since pytest 9.2 it takes no notice of groups (xdist 3.8, its issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFolder(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid.split("::")[0].rpartition("/")[0]

    config.option.loadscopereorder = False  # in the order above, not by the number of tests
    return ByFolder(config, log)


@pytest.fixture(scope="session")
def tiny_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Nano-like checkpoint; not to be changed."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "nano", "nano")


@pytest.fixture(scope="session")
def tiny_super(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Super-like checkpoint; not to be changed."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "super", "super")


@pytest.fixture(scope="session")
def tiny_edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Edge-like checkpoint; not to be changed."""
    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "edge", "edge")


@pytest.fixture(scope="session")
def engine_for() -> Iterator[Callable[[Path], Engine]]:
    """Checkpoint directory -> its engine in fp32 on the CPU, loaded once a session."""
    engines: dict[Path, Engine] = {}

    def get(checkpoint: Path) -> Engine:
        from cosmos3_core.engine import Engine

        if checkpoint not in engines:
            engines[checkpoint] = Engine(checkpoint, dtype=torch.float32, device="cpu")
        return engines[checkpoint]

    yield get
    for engine in engines.values():
        engine.close()
