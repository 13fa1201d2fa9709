"""EventFeed: the events of jobs, for all callers in this process who follow one.

One poll of the database serves all followers; without followers there is none. A slow reader delays no other:
events that do not fit into its buffer stay in the database until it has room again.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.errors import DeadlineExceeded, OverloadedError
from cluster.events import QueuePosition
from cosmos3_core.errors import Cosmos3Error
from deployments.errors import JobsError
from deployments.jobs.events import DELETED, FINAL_KINDS, event_as_json
from deployments.jobs.job import Job, JobEvent
from deployments.jobs.rows import MAX_EVENTS
from deployments.jobs.store import JobStore
from deployments.threads import run_in_thread, start_task

logger = logging.getLogger("ray.serve")

_POLL_S = 0.1
# Between two checks of a job's queue position and existence.
_CHECK_S = 1.0
# Checks in one poll; each takes a few queries.
_MAX_CHECKS = 16
# Events that one poll reads: a preview has 70 kB.
_MAX_EVENTS = 200
_BUFFER_BYTES = 256 * 1024
_EVENT_BYTES = 512
# Retry-After when there are too many followers.
_RETRY_S = 30.0


@dataclass(eq=False)
class _Follower:
    """One caller who follows a job, with a buffer of events."""

    job_id: str
    seq: int  # of the last event put into the buffer
    events: deque[JobEvent | None] = field(default_factory=deque)  # None after the last one
    num_bytes: int = 0  # approximate size of the buffer
    position: int | None = None  # in the queue, as last reported
    error: Cosmos3Error | None = None  # why the events ended early
    has_items: asyncio.Event = field(default_factory=asyncio.Event)
    is_complete: bool = False  # the last event is in the buffer

    @property
    def has_room(self) -> bool:
        return self.num_bytes < _BUFFER_BYTES and not self.is_complete

    def put(self, event: JobEvent) -> None:
        self.seq = max(self.seq, event.seq)
        self.events.append(event)
        self.num_bytes += _estimate_bytes(event)
        self.has_items.set()
        if event.kind in FINAL_KINDS or event.kind == DELETED:
            self.end()

    def end(self, error: Cosmos3Error | None = None) -> None:
        self.is_complete, self.error = True, error
        self.events.append(None)
        self.has_items.set()

    def take(self) -> JobEvent | None:
        event = self.events.popleft()
        self.num_bytes -= 0 if event is None else _estimate_bytes(event)
        if not self.events:
            self.has_items.clear()
        return event


class EventFeed:
    """Polls the events of jobs for their followers, within one event loop."""

    def __init__(self, store: JobStore, max_followers: int) -> None:
        self._store = store
        self._max_followers = max_followers
        self._followers: set[_Follower] = set()
        # Followed job -> time of its next check, by time.monotonic.
        self._next_check_s: dict[str, float] = {}
        # Jobs whose events filled a poll: the others are read first.
        self._served: set[str] = set()
        self._polling: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    async def follow(self, job_id: str, after: int, timeout_s: float) -> AsyncGenerator[JobEvent, None]:
        """Yield a job's events after number ``after``, 0 for all, as they come, to the last one.

        Besides its history there are events with number 0: "queued" whenever its queue position has changed, and
        "deleted" as the last one of a deleted job.

        Raises:
            OverloadedError: there are too many followers.
            DeadlineExceeded: the job has not ended in time.
            JobsError: the database cannot be used.
        """
        after = min(max(after, 0), MAX_EVENTS + 1)
        if len(self._followers) >= self._max_followers:
            raise OverloadedError("followers of jobs", self._max_followers, _RETRY_S)
        follower = _Follower(job_id, after)
        self._followers.add(follower)
        self._next_check_s[job_id] = 0.0
        self._wake.set()
        if self._polling is None:
            self._polling = start_task(self._poll_forever())
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            while True:
                # Not around the yield: another task may wait for the next event.
                async with asyncio.timeout_at(deadline_s):
                    await follower.has_items.wait()
                had_room = follower.has_room
                event = follower.take()
                if event is None:
                    break
                if follower.has_room and not had_room:
                    self._wake.set()
                yield event
        except TimeoutError:
            raise DeadlineExceeded("following a job", timeout_s) from None
        finally:
            self._followers.discard(follower)
            if not any(other.job_id == job_id for other in self._followers):
                self._next_check_s.pop(job_id, None)
        if follower.error is not None:
            raise follower.error

    async def _poll_forever(self) -> None:
        """Poll until there are no followers."""
        try:
            while self._followers:
                self._wake.clear()
                try:
                    await self._poll()
                except Exception as error:  # the database may be away: followers come again
                    logger.exception("events of jobs cannot be read")
                    reason = error if isinstance(error, Cosmos3Error) else JobsError(f"{type(error).__name__}: {error}")
                    for follower in self._followers:
                        follower.end(reason)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._wake.wait()
        finally:
            self._polling = None

    async def _poll(self) -> None:
        """Read the database once, and pass new events to their followers."""
        now_s = time.monotonic()
        cursors: dict[str, int] = {}
        for follower in self._followers:
            if follower.has_room:
                cursors[follower.job_id] = min(cursors.get(follower.job_id, follower.seq), follower.seq)
        due = sorted((time_s, job_id) for job_id, time_s in self._next_check_s.items() if time_s <= now_s)[:_MAX_CHECKS]
        if not cursors and not due:
            return
        if not (cursors.keys() - self._served):
            self._served.clear()
        turn = {job_id: seq for job_id, seq in cursors.items() if job_id not in self._served}
        events, checks = await run_in_thread(self._read, turn, [job_id for _, job_id in due])
        if len(events) >= _MAX_EVENTS:
            self._served |= {event.job_id for event in events}
            self._wake.set()  # there is more
        elif self._served:
            self._served.clear()
            self._wake.set()
        # In the order in which they were read: never report "queued" after "started".
        for job_id, (job, position) in checks.items():
            if job_id in self._next_check_s:
                self._next_check_s[job_id] = time.monotonic() + _CHECK_S
                self._report(job_id, job, position)
        for event in events:
            for follower in self._followers:
                if follower.job_id == event.job_id and follower.has_room and event.seq > follower.seq:
                    follower.put(event)

    def _read(
        self, cursors: Mapping[str, int], due: Sequence[str]
    ) -> tuple[Sequence[JobEvent], dict[str, tuple[Job | None, QueuePosition | None]]]:
        """Read jobs with their positions, and then events; in a thread."""
        jobs = {job_id: self._store.get(job_id) for job_id in due}
        positions = self._store.find_positions([job for job in jobs.values() if job is not None])
        events = self._store.find_events(cursors, _MAX_EVENTS) if cursors else []
        return events, {job_id: (job, positions.get(job_id)) for job_id, job in jobs.items()}

    def _report(self, job_id: str, job: Job | None, position: QueuePosition | None) -> None:
        """Report to a job's followers that it was deleted, has ended, or has moved in the queue."""
        now_s = time.time()
        for follower in self._followers:
            if follower.job_id != job_id or not follower.has_room:
                continue
            if job is None:
                follower.put(JobEvent(job_id, 0, DELETED, {}, now_s))
            elif job.state.is_final and follower.seq >= job.last_seq:  # the caller already had the last event
                follower.end()
            elif position is not None and position.position != follower.position:
                eta_s = None if position.eta_s is None else round(position.eta_s, 1)
                data = event_as_json(replace(position, eta_s=eta_s))
                follower.put(JobEvent(job_id, 0, position.kind, data, now_s))
            follower.position = None if position is None else position.position


def _estimate_bytes(event: JobEvent) -> int:
    """Estimate the size of an event by its texts."""
    return _EVENT_BYTES + sum(len(value) for value in event.data.values() if isinstance(value, str))
