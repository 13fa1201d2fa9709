"""An event loop whose clocks jump to the next timer: hours of waiting take no time, and every run is the same."""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import pytest

T = TypeVar("T")

START_S = 1_800_000_000.0
"""What ``time.time()`` says at first."""


class VirtualClock:
    """The clocks of a run: ``monotonic`` begins at 0; ``time`` is ahead of it, and can be set."""

    def __init__(self) -> None:
        self.now_s, self.lead_s = 0.0, START_S

    def monotonic(self) -> float:
        return self.now_s

    def time(self) -> float:
        return self.now_s + self.lead_s

    def set_forward(self, seconds: float) -> None:
        """Set ``time`` forward, or back; the time of a suspended laptop passes so as well."""
        self.lead_s += seconds


def set_clocks(
    patch: pytest.MonkeyPatch,
    *,
    time_s: Callable[[], float] | None = None,
    monotonic_s: Callable[[], float] | None = None,
) -> None:
    """Replace ``time.time`` and ``time.monotonic`` in this thread.

    The loop of an app in another thread keeps its own: with a timer from a clock that is ahead it would sleep for good.
    """
    thread = threading.get_ident()

    def replace(name: str, replaced: Callable[[], float]) -> None:
        real = getattr(time, name)
        patch.setattr(time, name, lambda: replaced() if threading.get_ident() == thread else real())

    if time_s is not None:
        replace("time", time_s)
    if monotonic_s is not None:
        replace("monotonic", monotonic_s)


class _JumpingSelector(selectors.DefaultSelector):
    """Advances a clock instead of waiting."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        assert timeout is not None, "every task waits, and no timer would wake one"
        if timeout > 0:
            self._clock.now_s += timeout
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    """A loop in virtual time. Work for threads runs at once, in this one."""

    def __init__(self, clock: VirtualClock) -> None:
        super().__init__(_JumpingSelector(clock))
        self._virtual_clock = clock

    def time(self) -> float:
        return self._virtual_clock.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> asyncio.Future[T]:  # type: ignore[override]
        future: asyncio.Future[T] = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 - it is the caller's
            future.set_exception(error)
        return future


def run_virtually(main: Callable[[VirtualClock], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine in a virtual loop, in which ``time.time`` and ``time.monotonic`` are virtual as well."""
    clock = VirtualClock()
    with pytest.MonkeyPatch.context() as patch:
        set_clocks(patch, time_s=clock.time, monotonic_s=clock.monotonic)
        with asyncio.Runner(loop_factory=lambda: VirtualLoop(clock)) as runner:
            return runner.run(main(clock))
