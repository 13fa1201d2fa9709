"""Fixtures that every test package shares."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint

if TYPE_CHECKING:
    from cosmos3_core.engine import Engine

# One thread: tiny tensors gain nothing from two, equality to the bit asks for one, and two cores shared by several
# processes make idle OpenMP threads wait for each other, sixty times slower than none.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests for GPUs say why they do not run where there is none; with several workers, one has all that starts Ray."""
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("cluster"):
            item.add_marker(pytest.mark.xdist_group("cluster"))
    # That one last: beside other tests it would take longer than after them.
    items.sort(key=lambda item: item.get_closest_marker("cluster") is not None)


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
