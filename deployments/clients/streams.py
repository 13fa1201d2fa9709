"""Streams of a video's events, which survive broken connections and stop the video when its only caller leaves."""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Self

from cluster.errors import DeadlineExceeded, StageFailed
from cosmos3_core.errors import Cosmos3Error
from deployments.clients.errors import WITH_RETRY_AFTER, NotFound, UnreachableError, read_failure
from deployments.clients.transport import LEAVE_S, Deadline, Transport
from deployments.jobs.events import DELETED, VideoEnded, VideoEvent
from deployments.jobs.video import Video

logger = logging.getLogger(__name__)

# Failures that may pass: a broken connection, an app that restarts, a Director that died.
_PASSING = (UnreachableError, StageFailed, *WITH_RETRY_AFTER)
# A connection that lasted this long is no failed try: some proxies end every connection after a minute.
_HELD_S = 10.0


@dataclass(frozen=True)
class Patience:
    """Bounds of retries and reconnections.

    Attributes:
        max_wait_s: for all retries of a call that is refused for now (429, 503); 0: no retry.
        max_reconnects: connections in a row without a new event before a follower gives up.
        first_pause_s, max_pause_s: pause before the first retry; it doubles up to the longest.
    """

    max_wait_s: float = 0.0
    max_reconnects: int = 8
    first_pause_s: float = 0.25
    max_pause_s: float = 10.0

    def pause_s(self, tries: int, retry_after_s: float = 0.0) -> float:
        """Return the pause before try number ``tries``, from 1; no shorter than the app's ``retry_after_s``."""
        # Random, so that clients that lost the same server do not all come back at the same moment.
        longest = min(self.max_pause_s, self.first_pause_s * 2.0 ** (tries - 1))
        return max(longest * random.uniform(0.75, 1.0), retry_after_s * random.uniform(1.0, 1.1))


DEFAULT_PATIENCE = Patience()


async def follow_video(
    transport: Transport, video_id: str, after: int, deadline: Deadline, patience: Patience
) -> AsyncGenerator[VideoEvent, None]:
    """Yield a video's events after number ``after``, each once and in order, over connections that break.

    :class:`VideoEnded` is the last, unless ``after`` is past it.

    Raises:
        NotFound: the video is unknown, or was deleted.
        DeadlineExceeded: the time is up.
        UnreachableError: the app is away for longer than ``patience`` allows.
    """
    tries, was_final = 0, False
    while True:
        began_s, has_event = time.monotonic(), False
        try:
            async with aclosing(transport.events(video_id, after, deadline.left_s)) as events:
                while (event := await _next(events, deadline)) is not None:
                    tries, has_event = 0, True
                    if event.kind == DELETED:
                        raise NotFound.video(video_id)
                    if event.seq is not None:
                        if event.seq <= after:
                            continue
                        after = event.seq
                    yield event
                    if isinstance(event, VideoEnded):
                        return
            # The video may have been deleted, or ``after`` may be its last event.
            is_final = (await transport.job(video_id)).has_ended
            if was_final and not has_event:
                return
            was_final = is_final
            trouble: Cosmos3Error = UnreachableError(f"the events of {video_id} ended before their last one")
            retry_after_s = 0.0
        except _PASSING as error:
            trouble = error
            retry_after_s = error.retry_after_s if isinstance(error, WITH_RETRY_AFTER) else 0.0
        tries = 1 if time.monotonic() - began_s > _HELD_S else tries + 1
        if tries > patience.max_reconnects:
            raise trouble
        try:
            await deadline.wait(asyncio.sleep(patience.pause_s(tries, retry_after_s)))
        except TimeoutError:
            raise DeadlineExceeded("follow", deadline.limit_s) from None


async def follow_attached(
    events: AsyncGenerator[VideoEvent, None], deadline: Deadline
) -> AsyncGenerator[VideoEvent, None]:
    """Yield the events that the app sends to this caller alone.

    Raises:
        DeadlineExceeded: they do not come in time.
        UnreachableError: they end too early.
    """
    async with aclosing(events):
        while (event := await _next(events, deadline)) is not None:
            yield event
    raise UnreachableError("the app's events ended before their last one")


async def _next(events: AsyncGenerator[VideoEvent, None], deadline: Deadline) -> VideoEvent | None:
    try:
        return await deadline.wait(anext(events, None))
    except TimeoutError:
        raise DeadlineExceeded("follow", deadline.limit_s) from None


class AsyncVideoStream:
    """The events of a video that is made for this caller; :class:`VideoEnded`, the last, holds the finished video.

    An iterator, and a context manager. Closing it, leaving its ``async with`` block, or dropping it stops the work, by
    ``leave``.

    Raises, while iterating:
        DeadlineExceeded, StageFailed, JobCancelled ...: the video failed.
    """

    _has_ended = True  # until there is something to stop

    def __init__(
        self,
        video_id: str,
        events: AsyncGenerator[VideoEvent, None],
        leave: Callable[[], Awaitable[None]],
    ) -> None:
        self.video_id = video_id
        self._events = events
        self._leave = leave
        self._loop = asyncio.get_running_loop()
        self._leaving: asyncio.Task[None] | None = None
        self._has_ended = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> VideoEvent:
        if self._has_ended:
            raise StopAsyncIteration
        try:
            event = await anext(self._events)
        except BaseException:
            await self.aclose()
            raise
        if isinstance(event, VideoEnded):
            self._has_ended = True
            await self._events.aclose()
            if event.video.status != "completed":
                raise _make_failure(event.video)
        return event

    async def aclose(self) -> None:
        """Stop the work. Does nothing once the video has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._leaving = self._loop.create_task(_stop_video(self.video_id, self._events, self._leave))
        if self._leaving is not None:
            await asyncio.shield(self._leaving)  # the app is asked to stop even where the caller is cancelled

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._has_ended:
            stopping = _stop_video(self.video_id, self._events, self._leave)
            try:
                self._loop.call_soon_threadsafe(_run_later, stopping)
            except RuntimeError:  # the loop is gone, and with it the connections
                stopping.close()


# Holds the tasks of dropped streams: an event loop keeps no strong reference to its tasks.
_leaving: set[asyncio.Task[None]] = set()


def _run_later(stopping: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(stopping)
    _leaving.add(task)
    task.add_done_callback(_leaving.discard)


async def _stop_video(
    video_id: str, events: AsyncGenerator[VideoEvent, None], leave: Callable[[], Awaitable[None]]
) -> None:
    """Stop a video. A failure is logged, not raised: the caller is ending for another reason."""
    try:
        async with asyncio.timeout(LEAVE_S):
            await events.aclose()
            await leave()
    except NotFound:
        pass  # it was deleted meanwhile
    except (Cosmos3Error, TimeoutError) as error:
        logger.warning("%s could not be stopped: %s", video_id, str(error) or "no answer in time")


def _make_failure(video: Video) -> Cosmos3Error:
    error = video.error
    return read_failure(video.id, "" if error is None else error.code, "it failed" if error is None else error.message)
