"""Fixtures that every test package shares."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.process_budget import (  # noqa: F401  hooks
    pytest_configure,
    pytest_sessionfinish,
    pytest_terminal_summary,
    pytest_testnodedown,
)

if TYPE_CHECKING:
    from cosmos3_core.engine import Engine

# One thread: tiny tensors gain nothing from two, equality to the bit asks for one, and two cores shared by several
# processes make idle OpenMP threads wait for each other, sixty times slower than none. Set before torch is imported,
# here and in the processes that tests start. No torch at the top: the process that only hands out tests needs none.
os.environ["OMP_NUM_THREADS"] = "1"
# By default apps keep jobs and files in the user's home; tests use another one.
_HOME = tempfile.TemporaryDirectory(prefix="cosmos3-home-")
os.environ["HOME"] = _HOME.name


# Files of tests/graph whose tests start a Ray of their own: one of each half at a time, as each needs gigabytes.
_OWN_RAY = {
    f"tests/graph/test_{name}.py": group
    for group, names in {
        "own Ray, half 1": ("restart", "memory", "secrets"),
        "own Ray, half 2": ("cli", "pages", "autoscaling"),
    }.items()
    for name in names
}
# What shares something that a session starts: Ray, an app, ranks, diffusers, PostgreSQL. The longest come first.
_SHARING = [
    *("tests/graph", "own Ray, half 1", "own Ray, half 2"),
    *(f"tests/{name}" for name in ("parallel", "parity", "app", "jobs")),
]


def _scope(nodeid: str) -> str:
    """Return what runs on one worker: what shares something, else a file."""
    file = nodeid.split("::")[0]
    folder = file.rpartition("/")[0]
    return _OWN_RAY.get(file, folder if folder in _SHARING else file)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests for GPUs where there is none; order tests so that small scopes are left for the end."""
    if for_gpus := [item for item in items if item.get_closest_marker("gpu")]:
        import torch

        for item in for_gpus:
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    order = {scope: number for number, scope in enumerate(_SHARING)}
    items.sort(key=lambda item: order.get(_scope(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole scopes, in the order of the tests; whichever worker is free takes the next one.

    Not left to xdist's ``loadgroup``: since pytest 9.2 it takes no notice of groups (xdist 3.8, its issue 1386).
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByScope(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return _scope(nodeid)

    config.option.loadscopereorder = False  # in the order above, not by the number of tests
    return ByScope(config, log)


def _build_tiny(tmp_path_factory: pytest.TempPathFactory, variant: str) -> Path:
    from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint

    return build_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / variant, variant)


@pytest.fixture(scope="session")
def tiny_nano(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Nano-like checkpoint; read-only."""
    return _build_tiny(tmp_path_factory, "nano")


@pytest.fixture(scope="session")
def tiny_super(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Super-like checkpoint; read-only."""
    return _build_tiny(tmp_path_factory, "super")


@pytest.fixture(scope="session")
def tiny_edge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Edge-like checkpoint; read-only."""
    return _build_tiny(tmp_path_factory, "edge")


@pytest.fixture(scope="session")
def engine_for() -> Iterator[Callable[[Path], Engine]]:
    """Checkpoint directory -> its engine in fp32 on the CPU, loaded once a session."""
    engines: dict[Path, Engine] = {}

    def get(checkpoint: Path) -> Engine:
        import torch

        from cosmos3_core.engine import Engine

        if checkpoint not in engines:
            engines[checkpoint] = Engine(checkpoint, dtype=torch.float32, device="cpu")
        return engines[checkpoint]

    yield get
    for engine in engines.values():
        engine.close()
