"""Work that does not fit into memory, without Ray."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch

from cluster.errors import OutOfMemory
from cluster.rank import run_within_memory
from cosmos3_core import device

CPU = torch.device("cpu")


class Activations:
    """A large object that the failed work still references."""


def test_out_of_memory_is_reported_and_the_memory_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[weakref.ref[Any]] = []
    was_free: list[bool] = []

    def work() -> None:
        activations = Activations()
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("out of memory. Tried to allocate 1.00 GiB.\nMore words.")

    monkeypatch.setattr(device, "forget_unused_memory", lambda _: was_free.append(held[0]() is None))
    with pytest.raises(OutOfMemory, match="Tried to allocate") as caught:
        run_within_memory(CPU, work)
    assert "More words" not in str(caught.value)
    assert was_free == [True], "the activations were still held when the allocator was asked for its spare memory"


def test_other_errors_and_results_are_unchanged() -> None:
    with pytest.raises(ZeroDivisionError):
        run_within_memory(CPU, lambda: 1 // 0)
    assert run_within_memory(CPU, lambda: 5) == 5
