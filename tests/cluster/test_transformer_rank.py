"""A transformer's rank in this process: what becomes of a request that does not fit into memory."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import OutOfMemory
from cluster.transformer_rank import TransformerRank, TransformerSpec
from cosmos3_core import device
from cosmos3_core.admission import PromptOrders
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.shapes import LatentShape

REQUEST = DenoiseRequest((1,), (1,), LatentShape(1, 1, 1), 24.0, 4, 1.0, "native", 3.0, 0)


class Activations:
    """Something large that the failed work still has in its hands."""


class FakeDenoiser:
    """Fails in one of its methods as an allocator does."""

    transformer = SimpleNamespace(device=torch.device("cpu"))

    def __init__(self, failing: str, error: Callable[[], Exception]) -> None:
        self._failing, self._error = failing, error
        self.held: weakref.ref[Activations] | None = None

    def _work(self, name: str) -> None:
        activations = Activations()
        self.held = weakref.ref(activations)
        if name == self._failing:
            raise self._error()

    def prepare(self, request: DenoiseRequest, orders: PromptOrders) -> Any:
        self._work("prepare")
        schedule = SimpleNamespace(sigmas=[1.0, 0.5, 0.0])
        return SimpleNamespace(num_steps=2, solver=SimpleNamespace(schedule=schedule))

    def start(self, plan: Any) -> Any:
        return SimpleNamespace(step_index=0)

    def step(self, plan: Any, state: Any) -> Any:
        self._work("step")
        return SimpleNamespace(step_index=state.step_index + 1)


def rank_with(denoiser: FakeDenoiser) -> TransformerRank:
    rank = TransformerRank(0, TransformerSpec("checkpoint", "cpu", None, 1))
    rank._denoiser = denoiser  # type: ignore[assignment]
    return rank


ALLOCATORS = {
    "GPU": lambda: torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB.\nMore words."),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "Python": lambda: MemoryError("no memory"),
}


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("failing", ["prepare", "step"])
def test_a_request_that_does_not_fit_is_forgotten_and_its_memory_given_back(
    failing: str, allocator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = FakeDenoiser(failing, ALLOCATORS[allocator])
    rank = rank_with(denoiser)
    was_free: list[bool] = []
    monkeypatch.setattr(
        device, "forget_unused_memory", lambda _: was_free.append(denoiser.held is not None and denoiser.held() is None)
    )
    with pytest.raises(OutOfMemory) as caught:
        rank.begin("a", REQUEST, PromptOrders())
        rank.step("a", 2)
    assert " memory" in str(caught.value)
    assert "More words" not in str(caught.value)
    assert rank._jobs == {}
    assert was_free == [True], "its activations were still held when the allocator was asked for its spare memory"


def test_any_other_error_is_left_as_it_is() -> None:
    rank = rank_with(FakeDenoiser("step", lambda: RuntimeError("Connection closed by peer")))
    rank.begin("a", REQUEST, PromptOrders())
    with pytest.raises(RuntimeError, match="closed by peer"):
        rank.step("a", 1)


def test_a_quantum_reports_every_step_and_stops_at_the_last() -> None:
    rank = rank_with(FakeDenoiser("", MemoryError))
    rank.begin("a", REQUEST, PromptOrders())
    assert [step.step for step in rank.step("a", 1).steps] == [1]
    assert [(step.step, step.sigma) for step in rank.step("a", 9).steps] == [(2, 0.0)]
