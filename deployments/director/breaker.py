"""Breaker: no job is begun while something that all jobs need does not work.

A fault of the surroundings opens it. A probe, or the success of one job that is tried after a pause, closes it again.
Meanwhile new requests are rejected, and /ready says why.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from deployments.errors import ApiError
from deployments.observability.metrics import FAULTS, metrics
from deployments.threads import run_in_thread, start_task

logger = logging.getLogger("ray.serve")

# Seconds between two probes.
_PROBE_S = 1.0
# Seconds before one job is tried where there is no probe; twice as many after each failure.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 30.0
# Retry-After of rejected requests, in seconds.
_RETRY_AFTER_S = 5
# So many jobs in a row that have lost a stage's processes open the breaker: one alone may itself be the reason.
_MAX_LOSSES = 2


@dataclass(eq=False)
class _Fault:
    """A fault that keeps jobs from being begun."""

    code: str
    what: str
    pause_s: float = _FIRST_PAUSE_S
    since_s: float = field(default_factory=lambda: time.monotonic())
    may_try: bool = False  # one job, at the end of the pause
    waiting: asyncio.Task[None] | None = None


class Breaker:
    """The faults of one Director's surroundings. Used inside one event loop.

    Args:
        probes: code of a fault -> raises while the fault lasts; run in a thread. Faults without one have a pause.
        on_may_claim: called when a job may be claimed again: the last fault has passed, or one job is to be tried.
    """

    def __init__(self, probes: Mapping[str, Callable[[], object]], on_may_claim: Callable[[], None]) -> None:
        self._probes, self._on_may_claim = probes, on_may_claim
        self._faults: dict[str, _Fault] = {}
        self._num_losses = 0

    def report_fault(self, code: str, what: str) -> None:
        """Open for a fault of the surroundings."""
        fault = self._faults.get(code)
        if fault is None:
            fault = self._faults[code] = _Fault(code, what)
            logger.error("%s: no job is begun, and no request accepted, until that has passed", what)
        elif fault.may_try:
            fault.pause_s = min(2 * fault.pause_s, _LONGEST_PAUSE_S)
        else:
            return
        fault.may_try = False
        fault.waiting = start_task(self._wait(fault))

    def report_loss(self, code: str, what: str) -> None:
        """Report that a stage's processes were lost under a job; open if that happens to several jobs in a row."""
        self._num_losses += 1
        if self._num_losses >= _MAX_LOSSES:
            self.report_fault(code, what)

    def report_success(self) -> None:
        """Report that a job was completed: what it needed works."""
        self._num_losses = 0
        for fault in list(self._faults.values()):
            if fault.code not in self._probes:
                self._close(fault)

    def may_claim(self, num_claimed: int) -> bool:
        """Return whether another job may be begun beside ``num_claimed`` others."""
        return not self._faults or (num_claimed == 0 and all(fault.may_try for fault in self._faults.values()))

    @property
    def faults(self) -> list[str]:
        """The faults that keep jobs from being begun: each a code, with a reason behind it where one is known."""
        return [fault.what for fault in self._faults.values()]

    def has_fault(self, code: str) -> bool:
        """Return whether there is a fault of this code."""
        return code in self._faults

    def check(self) -> None:
        """Raise ApiError 503 while there is a fault: a new request would only wait."""
        for fault in self._faults.values():
            message = f"no request is accepted until this has passed: {fault.what}; accepted jobs wait"
            raise ApiError(503, fault.code, message, {"retry-after": str(_RETRY_AFTER_S)})

    def stop(self) -> None:
        """Stop waiting for faults to pass."""
        for fault in self._faults.values():
            if fault.waiting is not None:
                fault.waiting.cancel()

    async def _wait(self, fault: _Fault) -> None:
        """Wait until a fault has passed, or one job may be tried."""
        metrics().record(FAULTS, 1, fault.code)
        probe = self._probes.get(fault.code)
        if probe is None:
            await asyncio.sleep(fault.pause_s)
            fault.may_try = True
            self._on_may_claim()
            return
        while True:
            await asyncio.sleep(_PROBE_S)
            try:
                await run_in_thread(probe)
            except Exception:  # noqa: BLE001 - a probe that raises anything means that the fault lasts
                metrics().record(FAULTS, 1, fault.code)
                continue
            self._close(fault)
            return

    def _close(self, fault: _Fault) -> None:
        if self._faults.get(fault.code) is not fault:
            return
        del self._faults[fault.code]
        if fault.waiting is not None and fault.waiting is not asyncio.current_task():
            fault.waiting.cancel()
        logger.warning("%s has passed after %.0f s", fault.what, time.monotonic() - fault.since_s)
        metrics().record(FAULTS, 0, fault.code)
        if not self._faults:
            self._on_may_claim()
