"""Leaving a step between layers: threads stand for ranks that exchange in every layer, the leader calls their gates."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest

from cluster import layer_gate
from cluster.errors import StepAbandoned
from cluster.layer_gate import LayerGate, abandon_step
from tests.settling import run

_WAIT_S = 60.0


class Ranks:
    """Ranks that meet at a barrier in each layer, as in an exchange; ``pause`` is called in each layer of each."""

    def __init__(self, num_layers: list[int], pause: Callable[[int], None], *, meets: bool = True) -> None:
        self._num_layers, self._pause = num_layers, pause
        self._barrier = threading.Barrier(len(num_layers), timeout=_WAIT_S) if meets else None
        self.gates = [LayerGate() for _ in num_layers]
        self._pool = ThreadPoolExecutor(len(num_layers))

    def start(self) -> list[Future[int]]:
        """Run a step; each future has the layer at which its rank left it, or the number of layers."""
        futures = [self._pool.submit(self._step, rank) for rank in range(len(self.gates))]
        deadline_s = time.monotonic() + _WAIT_S
        while any(gate.read_position() is None for gate in self.gates) and time.monotonic() < deadline_s:
            if any(future.done() for future in futures):
                break
        return futures

    def _step(self, rank: int) -> int:
        gate, num_layers = self.gates[rank], self._num_layers[rank]
        gate.begin_step(num_layers)
        try:
            for _ in range(num_layers):
                gate.enter_layer()
                self._pause(rank)
                if self._barrier is not None:
                    self._barrier.wait()
        except StepAbandoned as error:
            return error.layer
        finally:
            gate.end_step()
        return num_layers

    async def call(self, method: str, *arguments: Any) -> list[Any]:
        """Call every gate, one after the other, with some time between two."""
        answers = []
        for gate in self.gates:
            await asyncio.sleep(random.random() * 0.002)
            answers.append(getattr(gate, method)(*arguments))
        return answers


def test_all_ranks_leave_before_the_same_layer() -> None:
    ranks = Ranks([1000, 1000, 1000], lambda _: time.sleep(0.002))
    futures = ranks.start()
    assert run(abandon_step(ranks.call))
    left_at = {future.result(_WAIT_S) for future in futures}
    assert len(left_at) == 1
    assert left_at.pop() < 1000
    assert all(gate.read_position() is None for gate in ranks.gates)


def test_ranks_that_do_not_meet_in_every_layer_leave_together() -> None:
    """As the ranks of two guidance branches, which meet at the end of a step alone."""
    ranks = Ranks([1000, 1000], lambda rank: time.sleep(0.004 if rank else 0.001), meets=False)
    futures = ranks.start()
    assert run(abandon_step(ranks.call))
    assert len({future.result(_WAIT_S) for future in futures}) == 1


def test_a_step_of_which_a_rank_has_no_layers_is_not_left() -> None:
    """That rank waits in the exchange at the end, and would wait for ever."""
    ranks = Ranks([50, 0], lambda _: None)
    for gate, num_layers in zip(ranks.gates, (50, 0), strict=True):
        gate.begin_step(num_layers)
    assert not run(abandon_step(ranks.call))
    ranks.gates[0].enter_layer()  # nothing holds it


def test_nothing_is_left_between_steps_or_near_the_end() -> None:
    ranks = Ranks([3, 3], lambda _: None)
    assert not run(abandon_step(ranks.call))
    for gate in ranks.gates:
        gate.begin_step(3)
        gate.enter_layer()
    assert not run(abandon_step(ranks.call))


def test_a_rank_past_the_layer_makes_all_go_on() -> None:
    gates = [LayerGate(), LayerGate()]
    for gate in gates:
        gate.begin_step(10)
    for _ in range(5):
        gates[1].enter_layer()
    assert [gate.hold(1, 3) for gate in gates] == [True, False]
    for gate in gates:
        gate.decide(False)
    for _ in range(10):
        gates[0].enter_layer()  # raises nothing, and does not wait


def test_a_held_rank_goes_on_if_the_leader_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_gate, "_HOLD_S", 0.05)
    gate = LayerGate()
    gate.begin_step(10)
    assert gate.hold(1, 0)
    gate.enter_layer()


def test_the_next_step_is_not_held() -> None:
    gate = LayerGate()
    gate.begin_step(10)
    assert gate.hold(1, 5)
    gate.end_step()
    gate.begin_step(10)
    assert not gate.hold(1, 5)  # a call that comes late
    for _ in range(10):
        gate.enter_layer()


def test_under_any_timing_all_leave_at_one_layer_or_none_does() -> None:
    """A rank that left alone would break the barrier, and none of the others would end."""
    for seed in range(60):
        chance = random.Random(seed)
        num_layers = chance.choice([4, 20, 80])
        slow_s = chance.choice([0.0, 0.0002, 0.002])
        ranks = Ranks([num_layers] * chance.choice([1, 2, 4]), lambda _, slow_s=slow_s: time.sleep(slow_s))  # type: ignore[misc]
        futures = ranks.start()
        has_left = run(abandon_step(ranks.call))
        left_at = {future.result(_WAIT_S) for future in futures}
        assert len(left_at) == 1, seed
        assert has_left == (left_at != {num_layers}), seed
