"""A transformer rank in this process: out of memory, quanta, logs, previews."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from cluster.errors import OutOfMemory, PreviewFailed
from cluster.logs import LogOrigin
from cluster.transformer_rank import TransformerRank, TransformerSpec
from cosmos3_core import device
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.preview import PreviewMap
from cosmos3_core.prompt_ledger import PromptOrders
from cosmos3_core.sampler.unipc import SolverState
from cosmos3_core.shapes import LatentShape

REQUEST = DenoiseRequest((1,), (1,), LatentShape(1, 1, 1), 24.0, 4, 1.0, "native", 3.0, 0)


class Activations:
    """A large object that the failed work still references."""


class FakeDenoiser:
    """Raises out of memory in one of its methods."""

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

    def count_layers(self, plan: Any, state: Any) -> int:
        return 1

    def step(self, plan: Any, state: Any) -> Any:
        self._work("step")
        return SimpleNamespace(step_index=state.step_index + 1)


def rank_with(denoiser: FakeDenoiser) -> TransformerRank:
    rank = TransformerRank(0, TransformerSpec("checkpoint", "cpu", None, 1))
    rank._loaded_model = denoiser
    return rank


ALLOCATORS = {
    "GPU": lambda: torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB.\nMore words."),
    "CPU": lambda: RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to"),
    "Python": lambda: MemoryError("no memory"),
}


@pytest.mark.parametrize("allocator", ALLOCATORS)
@pytest.mark.parametrize("failing", ["prepare", "step"])
def test_a_request_out_of_memory_is_dropped_and_its_memory_freed(
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


def test_any_other_error_is_not_changed() -> None:
    rank = rank_with(FakeDenoiser("step", lambda: RuntimeError("Connection closed by peer")))
    rank.begin("a", REQUEST, PromptOrders())
    with pytest.raises(RuntimeError, match="closed by peer"):
        rank.step("a", 1)


def test_a_quantum_reports_every_step_and_stops_at_the_last() -> None:
    rank = rank_with(FakeDenoiser("", MemoryError))
    rank.begin("a", REQUEST, PromptOrders())
    assert [step.step for step in rank.step("a", 1).steps] == [1]
    assert [(step.step, step.sigma) for step in rank.step("a", 9).steps] == [(2, 0.0)]


def test_a_rank_logs_the_request_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "cluster")
    rank = rank_with(FakeDenoiser("", MemoryError))
    rank.begin("a", REQUEST, PromptOrders(), None, None, LogOrigin("otter-1", "video_gen_1"))
    rank.step("a", 9)
    rank.end("a")
    rank.begin("warm up", REQUEST, PromptOrders())
    lines = [vars(record) for record in caplog.records]
    assert [(line["event"], line["request_id"]) for line in lines] == [
        ("begin done", "otter-1"),
        ("work ended", "otter-1"),
    ]


RED = PreviewMap(((1.0, 0.0, 0.0), (0.0, 0.0, 0.0)), (0.0, -1.0, -1.0))


def test_a_preview_is_of_the_newest_prediction_and_of_frames_of_the_whole_clip() -> None:
    rank = rank_with(FakeDenoiser("", MemoryError))
    newest, older = torch.zeros(1, 2, 9, 2, 3), torch.full((1, 2, 9, 2, 3), 9.0)
    newest[:, 0] = torch.linspace(-1, 1, 9).view(9, 1, 1)
    state = SimpleNamespace(solver={"video": SolverState(older, older, (newest, older))})
    rank._jobs["a"] = (None, state)  # type: ignore[assignment]
    preview = rank.preview("a", RED, 4)
    assert (preview.dtype, preview.shape) == ("uint8", (4, 2, 3, 3))
    frames = preview.array()
    assert frames[:, 0, 0, 0].tolist() == [0, 64, 128, 191]
    assert (frames == frames[:, :1, :1]).all()
    assert (frames[..., 1:] == 0).all()


def test_a_preview_that_cannot_be_made_leaves_the_request_alone() -> None:
    rank = rank_with(FakeDenoiser("", MemoryError))
    other = torch.zeros(1, 3, 1, 1, 1)
    rank._jobs["a"] = job = (None, SimpleNamespace(solver={"video": SolverState(other, other, (other,))}))  # type: ignore[assignment]
    with pytest.raises(PreviewFailed, match=r"RequestError: x0 must be .1, 2, frames, rows, columns.* \(got "):
        rank.preview("a", RED, 4)
    assert rank._jobs["a"] is job
    rank.begin("unstepped", REQUEST, PromptOrders())
    with pytest.raises(PreviewFailed):
        rank.preview("unstepped", RED, 4)
    with pytest.raises(PreviewFailed, match="KeyError"):
        rank.preview("not there", RED, 4)
