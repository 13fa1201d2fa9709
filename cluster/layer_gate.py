"""Leave a denoising step between two layers: all ranks of a gang before the same one, or none.

A rank that left alone would let its neighbours wait for ever in their next exchange with it. So the leader names a
layer that no rank has reached, and each rank holds before it. Once all have agreed, all leave; if one was already past
it, all go on, and the leader tries a later layer. The state before the step stays valid.
"""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from enum import Enum, auto
from typing import Any, NamedTuple

from cluster.errors import StepAbandoned

# How far beyond the foremost rank the leader names a layer at first; twice as far each time that this was too near.
_FIRST_MARGIN = 2
# A rank that holds goes on without a decision after this long: its leader is about to take the gang for hung.
_HOLD_S = 60.0


class _Decision(Enum):
    NONE = auto()
    HOLD = auto()
    LEAVE = auto()


class Position(NamedTuple):
    """Where a rank is in a step: the step's number, the layers of all its forward passes entered, and all of them."""

    step: int
    num_entered: int
    num_layers: int


class LayerGate:
    """One rank's side: its step counts layers here; the leader's calls come on another thread."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_steps = 0
        self._position: Position | None = None  # None between steps
        self._decision = _Decision.NONE
        self._hold_at = 0

    def begin_step(self, num_layers: int) -> None:
        """Start counting a step's layers."""
        with self._changed:
            self._num_steps += 1
            self._position, self._decision = Position(self._num_steps, 0, num_layers), _Decision.NONE

    def end_step(self) -> None:
        """Stop counting: the step is done, or left."""
        with self._changed:
            self._position, self._decision = None, _Decision.NONE

    def enter_layer(self) -> None:
        """Go on to the next layer, perhaps after a wait for the leader; raise StepAbandoned if the step ends here."""
        with self._changed:
            if self._position is None:
                return
            num_entered = self._position.num_entered
            if self._decision is not _Decision.NONE and num_entered == self._hold_at:
                self._changed.wait_for(lambda: self._decision is not _Decision.HOLD, timeout=_HOLD_S)
                if self._decision is _Decision.LEAVE:
                    raise StepAbandoned(num_entered)
                self._decision = _Decision.NONE
            self._position = self._position._replace(num_entered=num_entered + 1)

    def read_position(self) -> Position | None:
        """Return where the step is; None between steps."""
        with self._changed:
            return self._position

    def hold(self, step: int, layer: int) -> bool:
        """Hold before a layer of a step; return False if this rank is past it, or does not come to it."""
        with self._changed:
            position = self._position
            if position is None or position.step != step or not position.num_entered <= layer < position.num_layers:
                return False
            self._decision, self._hold_at = _Decision.HOLD, layer
            return True

    def decide(self, leaves: bool) -> None:
        """Leave the step at the layer of :meth:`hold`, or go on."""
        with self._changed:
            if self._decision is _Decision.HOLD:
                self._decision = _Decision.LEAVE if leaves else _Decision.NONE
                self._changed.notify_all()


CallGates = Callable[..., Awaitable[list[Any]]]
"""Calls a method of every rank's gate, beside the step that runs; returns the answers in rank order."""


async def abandon_step(call: CallGates) -> bool:
    """Have all ranks leave the step that they run; return False if it ends first, or some rank has no layers in it."""
    margin = _FIRST_MARGIN
    while True:
        positions: list[Position | None] = await call("read_position")
        if None in positions:
            return False
        known = [position for position in positions if position is not None]
        step = known[0].step
        layer = max(position.num_entered for position in known) + margin
        if layer >= min(position.num_layers for position in known):
            return False
        may_leave = all(await call("hold", step, layer))
        await call("decide", may_leave)
        if may_leave:
            return True
        margin *= 2
