"""Counts what one rank works on and receives: rows of every matrix product, bytes of every collective."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cosmos3_core.parallel import collectives

_FIRST_FACTOR = {torch.ops.aten.mm.default: 0, torch.ops.aten.addmm.default: 1}


@dataclass
class Gauge:
    """What happened inside the block.

    Attributes:
        products: (rows, inner width, columns) of every matrix product of weights -> how often.
        queries: rows of every attention -> how often.
        received: what collectives bring - tokens' keys, values and patches, branches, sums - -> bytes a rank receives.
    """

    products: Counter[tuple[int, int, int]] = field(default_factory=Counter)
    queries: Counter[int] = field(default_factory=Counter)
    received: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> Gauge:
        self._stack = ExitStack()
        self._stack.enter_context(_Watch(self))
        for kind, (owner, name, num_bytes) in _COLLECTIVES.items():
            self._stack.enter_context(patch.object(owner, name, self._count(kind, getattr(owner, name), num_bytes)))
        return self

    def __exit__(self, *exception: Any) -> None:
        self._stack.close()

    def _count(self, kind: str, call: Callable[..., Any], num_bytes: Callable[..., int]) -> Callable[..., Any]:
        def counting(*arguments: Any, group: Any) -> Any:
            self.received[kind] += num_bytes(*arguments, group.size())
            return call(*arguments, group=group)

        return counting


def _gathering_bytes(everyone: Any, mine: Tensor, num_ranks: int) -> int:
    return (num_ranks - 1) * mine.nbytes


def _ring_bytes(partial: Tensor, num_ranks: int) -> int:
    # Reduce-scatter, then all-gather: each brings every rank (n - 1) / n of the tensor.
    return 2 * partial.nbytes * (num_ranks - 1) // num_ranks


# What is brought -> where the product finds the collective, and the bytes of a call.
_COLLECTIVES: dict[str, tuple[Any, str, Callable[..., int]]] = {
    "tokens": (collectives, "_all_gather", _gathering_bytes),
    "branches": (collectives.dist, "all_gather", _gathering_bytes),
    "sums": (collectives.dist, "all_reduce", _ring_bytes),
}


class _Watch(TorchDispatchMode):
    """Sees every operator that runs."""

    def __init__(self, gauge: Gauge) -> None:
        super().__init__()
        self._gauge = gauge

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _FIRST_FACTOR:
            left, right = args[_FIRST_FACTOR[func] :][:2]
            self._gauge.products[left.shape[0], left.shape[1], right.shape[1]] += 1
        elif "scaled_dot_product" in func.name():
            self._gauge.queries[args[0].shape[2]] += 1
        elif "mm" in func.name() or func.name().startswith("aten::linear"):
            raise AssertionError(f"a matrix product that is not counted: {func}")
        return func(*args, **(kwargs or {}))
