"""What those were told who found a queue full: the next one is told a later time."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass

from deployments.jobs.job import Lane

# Callers who are told to come one after the other, of each place in a queue.
_PROMISES_A_PLACE = 4


@dataclass(frozen=True)
class FullQueue:
    """A bound that was reached.

    Attributes:
        lane: whose queue it is.
        owner: whose jobs it counts; None where it counts everybody's.
        num_places: the bound.
    """

    lane: Lane
    owner: str | None
    num_places: int


class RetryEstimator:
    """When callers who were refused were told to come again: each is told a time of its own, or all would come at once
    for one place. Those of this process; from any thread.

    Who comes again too early is promised one more place each time: hence a bound, by the places that there are.
    """

    def __init__(self) -> None:
        self._until_s: dict[FullQueue, deque[float]] = {}
        self._lock = threading.Lock()

    def add(self, queue: FullQueue, seconds: float) -> None:
        """A caller was told to come again after so long."""
        with self._lock:
            until_s = self._until_s.setdefault(queue, deque())
            until_s.append(time.monotonic() + seconds)
            while len(until_s) > _PROMISES_A_PLACE * queue.num_places:
                until_s.popleft()

    def num_open(self, queue: FullQueue) -> int:
        """How many callers are still to come."""
        now_s = time.monotonic()
        with self._lock:
            still = {queue: [until_s for until_s in known if until_s > now_s] for queue, known in self._until_s.items()}
            self._until_s = {queue: deque(until_s) for queue, until_s in still.items() if until_s}
            return len(self._until_s.get(queue, ()))
