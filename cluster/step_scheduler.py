"""Order of turns on a gang: requests in classes of urgency, first come first served within a class.

A picture takes moments and its caller waits for it; a long clip takes minutes anyway. So the more urgent class goes
first at every turn. A class that is passed over ages: once it has waited :data:`AGEING` times as long as its last turn
took, and at least :data:`AGEING_FLOOR_S`, it gets one turn. So clips get about a fifth of the time, however many
pictures come. Within a class no request overtakes another: each is served in the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from enum import IntEnum
from typing import Generic, TypeVar

from cosmos3_core.denoise_request import DenoiseRequest

AGEING = 4.0
AGEING_FLOOR_S = 1.0

JobT = TypeVar("JobT")


class Urgency(IntEnum):
    """Classes of requests, the most urgent first."""

    IMAGE = 0
    VIDEO = 1


def urgency_of(request: DenoiseRequest) -> Urgency:
    """Return the class of a request."""
    return Urgency.IMAGE if request.latent_shape.num_frames == 1 else Urgency.VIDEO


class StepScheduler(Generic[JobT]):
    """The requests of one gang. Times are the caller's, in seconds of one clock."""

    def __init__(self) -> None:
        self._jobs: dict[Urgency, deque[JobT]] = {urgency: deque() for urgency in Urgency}
        # When the class's last turn ended or its wait began, and how long that turn took.
        self._since_s = dict.fromkeys(Urgency, 0.0)
        self._last_turn_s = dict.fromkeys(Urgency, 0.0)

    def add(self, job: JobT, urgency: Urgency, now_s: float) -> None:
        """Add a request behind the others of its class."""
        if not self._jobs[urgency]:
            self._since_s[urgency] = now_s
        self._jobs[urgency].append(job)

    def remove(self, job: JobT) -> None:
        """Remove a request, if it is there."""
        for jobs in self._jobs.values():
            if job in jobs:
                jobs.remove(job)

    def next(self, now_s: float) -> JobT | None:
        """Return the request whose turn it is, or None. It stays in the queue."""
        waiting = [urgency for urgency, jobs in self._jobs.items() if jobs]
        if not waiting:
            return None
        aged = [urgency for urgency in waiting[1:] if self._wait_s(urgency, now_s) >= self._patience_s(urgency)]
        return self._jobs[max(aged, key=lambda urgency: self._wait_s(urgency, now_s), default=waiting[0])][0]

    def record_turn(self, urgency: Urgency, start_s: float, end_s: float) -> None:
        """Record that a turn of a class is over, however it ended."""
        self._since_s[urgency], self._last_turn_s[urgency] = end_s, end_s - start_s

    def count(self, urgency: Urgency) -> int:
        """Return the number of requests of a class."""
        return len(self._jobs[urgency])

    def __len__(self) -> int:
        return sum(map(len, self._jobs.values()))

    def __iter__(self) -> Iterator[JobT]:
        """Yield every request, the most urgent first."""
        for jobs in self._jobs.values():
            yield from jobs

    def _wait_s(self, urgency: Urgency, now_s: float) -> float:
        return now_s - self._since_s[urgency]

    def _patience_s(self, urgency: Urgency) -> float:
        return max(AGEING_FLOOR_S, AGEING * self._last_turn_s[urgency])
