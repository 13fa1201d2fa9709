"""EventFeed: what happens to jobs, for everybody in this process who follows one.

One look at the database serves all of them; there is none while nobody follows. Who reads slowly holds nobody up: what
does not fit into its buffer stays in the database until it has room again.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
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
from deployments.threads import run_in_thread

logger = logging.getLogger("ray.serve")

_POLL_S = 0.1
# Between two looks at where a job stands, and whether it is there at all.
_LOOK_S = 1.0
# Of them at a time: one is a few queries.
_MAX_LOOKS = 16
# Of events that one look brings: a preview has 70 kB.
_MAX_EVENTS = 200
_BUFFER_BYTES = 256 * 1024
_EVENT_BYTES = 512
# Until one who follows leaves, likely.
_RETRY_S = 30.0


@dataclass(eq=False)
class _Follower:
    """Who follows a job.

    Attributes:
        job_id: of the job.
        seq: of the last event that went into the buffer.
        events: that were not taken yet; None behind the last.
        num_bytes: of them, about.
        position: in the queue, that was told last.
        error: why there are no more.
        came: whether there is something to take.
    """

    job_id: str
    seq: int
    events: deque[JobEvent | None] = field(default_factory=deque)
    num_bytes: int = 0
    position: int | None = None
    error: Cosmos3Error | None = None
    came: asyncio.Event = field(default_factory=asyncio.Event)
    has_ended: bool = False

    @property
    def has_room(self) -> bool:
        return self.num_bytes < _BUFFER_BYTES and not self.has_ended

    def put(self, event: JobEvent) -> None:
        self.seq = max(self.seq, event.seq)
        self.events.append(event)
        self.num_bytes += _bytes_of(event)
        self.came.set()
        if event.kind in FINAL_KINDS or event.kind == DELETED:
            self.end()

    def end(self, error: Cosmos3Error | None = None) -> None:
        self.has_ended, self.error = True, error
        self.events.append(None)
        self.came.set()

    def take(self) -> JobEvent | None:
        event = self.events.popleft()
        self.num_bytes -= 0 if event is None else _bytes_of(event)
        if not self.events:
            self.came.clear()
        return event


class EventFeed:
    """See the module. For one event loop.

    Args:
        store: of the jobs.
        max_followers: at a time; one more is refused.
    """

    def __init__(self, store: JobStore, max_followers: int) -> None:
        self._store = store
        self._max_followers = max_followers
        self._followers: set[_Follower] = set()
        # Job that is followed -> when to look again where it stands, by time.monotonic.
        self._look_s: dict[str, float] = {}
        # Jobs whose events filled a look: the others' turn comes before theirs.
        self._served: set[str] = set()
        self._polling: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()

    @property
    def num_followers(self) -> int:
        """0 when idle."""
        return len(self._followers)

    async def follow(self, job_id: str, after: int, timeout_s: float) -> AsyncGenerator[JobEvent, None]:
        """A job's events behind number ``after``, and what comes, to the last one.

        Beside those of its history there are, with number 0, "queued" whenever its place has changed, and "deleted" as
        the last one of a job that is gone.

        Args:
            job_id: of a job that is there.
            after: number of an event; 0 for all.
            timeout_s: how long to follow.

        Raises:
            OverloadedError: too many follow already.
            DeadlineExceeded: the job has not ended in time.
            JobsError: the database cannot be used.
        """
        after = min(max(after, 0), MAX_EVENTS + 1)
        if len(self._followers) >= self._max_followers:
            raise OverloadedError("followers of jobs", self._max_followers, _RETRY_S)
        follower = _Follower(job_id, after)
        self._followers.add(follower)
        self._look_s[job_id] = 0.0
        self._wake.set()
        if self._polling is None:
            # A context of its own: a task made inside a request would be cancelled with that request.
            loop = asyncio.get_running_loop()
            self._polling = loop.create_task(self._poll(), context=contextvars.Context())
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            while True:
                # Not around the yield: each event may be waited for by another task.
                async with asyncio.timeout_at(deadline_s):
                    await follower.came.wait()
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
                self._look_s.pop(job_id, None)
        if follower.error is not None:
            raise follower.error

    async def _poll(self) -> None:
        try:
            while self._followers:
                self._wake.clear()
                try:
                    await self._look()
                except Exception as error:  # the database is away, say: who follows comes back
                    logger.exception("events of jobs cannot be read")
                    told = error if isinstance(error, Cosmos3Error) else JobsError(f"{type(error).__name__}: {error}")
                    for follower in self._followers:
                        follower.end(told)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_POLL_S):
                        await self._wake.wait()
        finally:
            self._polling = None

    async def _look(self) -> None:
        """One look at the database, and what there is handed on."""
        now_s = time.monotonic()
        cursors: dict[str, int] = {}
        for follower in self._followers:
            if follower.has_room:
                cursors[follower.job_id] = min(cursors.get(follower.job_id, follower.seq), follower.seq)
        due = sorted((again_s, job_id) for job_id, again_s in self._look_s.items() if again_s <= now_s)[:_MAX_LOOKS]
        if not cursors and not due:
            return
        if not (cursors.keys() - self._served):
            self._served.clear()
        turn = {job_id: seq for job_id, seq in cursors.items() if job_id not in self._served}
        events, found = await run_in_thread(self._read, turn, [job_id for _, job_id in due])
        if len(events) >= _MAX_EVENTS:
            self._served |= {event.job_id for event in events}
            self._wake.set()  # there is more
        elif self._served:
            self._served.clear()
            self._wake.set()
        # In the order in which they were read: never report "queued" after "started".
        for job_id, (job, position) in found.items():
            if job_id in self._look_s:
                self._look_s[job_id] = time.monotonic() + _LOOK_S
                self._tell(job_id, job, position)
        for event in events:
            for follower in self._followers:
                if follower.job_id == event.job_id and follower.has_room and event.seq > follower.seq:
                    follower.put(event)

    def _read(
        self, cursors: Mapping[str, int], due: Sequence[str]
    ) -> tuple[Sequence[JobEvent], dict[str, tuple[Job | None, QueuePosition | None]]]:
        """Where jobs stand, and then their events; for a thread."""
        jobs = {job_id: self._store.get(job_id) for job_id in due}
        positions = self._store.queue_positions([job for job in jobs.values() if job is not None])
        events = self._store.events(cursors, _MAX_EVENTS) if cursors else []
        return events, {job_id: (job, positions.get(job_id)) for job_id, job in jobs.items()}

    def _tell(self, job_id: str, job: Job | None, waits: QueuePosition | None) -> None:
        now_s = time.time()
        for follower in self._followers:
            if follower.job_id != job_id or not follower.has_room:
                continue
            if job is None:
                follower.put(JobEvent(job_id, 0, DELETED, {}, now_s))
            elif job.state.is_final and follower.seq >= job.last_seq:  # it had the last one before it came
                follower.end()
            elif waits is not None and waits.position != follower.position:
                told = replace(waits, eta_s=None if waits.eta_s is None else round(waits.eta_s, 1))
                follower.put(JobEvent(job_id, 0, told.kind, event_as_json(told), now_s))
            follower.position = None if waits is None else waits.position


def _bytes_of(event: JobEvent) -> int:
    """Of an event, about: what is large in it is text."""
    return _EVENT_BYTES + sum(len(value) for value in event.data.values() if isinstance(value, str))
