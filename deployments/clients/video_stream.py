"""A video that is made for whoever follows it: it is stopped when nobody does any more."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing
from typing import Any, Self

from cluster.errors import DeadlineExceeded
from cosmos3_core.errors import Cosmos3Error
from deployments.clients.deadline import Deadline
from deployments.clients.errors import NotFound, UnreachableError, failure
from deployments.clients.transport import LEAVE_S
from deployments.jobs.events import VideoEnded, VideoEvent
from deployments.jobs.video import Video

logger = logging.getLogger(__name__)


class AsyncVideoStream:
    """The events of a video that is made for this caller; :class:`VideoEnded`, the last, has the finished one.

    An iterator, and a context manager. Closing it, leaving its ``async with`` block, or dropping it stops the work.

    Raises, while iterating:
        DeadlineExceeded, StageFailed, JobCancelled ...: it could not be done.

    Args:
        video_id: of the video.
        events: of it.
        leave: stops it.

    Attributes:
        video_id: as given.
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
                raise _failure(event.video)
        return event

    async def aclose(self) -> None:
        """Stop. Does nothing once the video has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._leaving = self._loop.create_task(_left(self.video_id, self._events, self._leave))
        if self._leaving is not None:
            await asyncio.shield(self._leaving)  # to its end, even where whoever leaves is cancelled

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._has_ended:
            left = _left(self.video_id, self._events, self._leave)
            try:
                self._loop.call_soon_threadsafe(_leave_later, left)
            except RuntimeError:  # the loop is gone, and with it who could say so
                left.close()


# Of streams that were dropped: an event loop forgets tasks that nobody holds.
_leaving: set[asyncio.Task[None]] = set()


def _leave_later(left: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(left)
    _leaving.add(task)
    task.add_done_callback(_leaving.discard)


async def _left(video_id: str, events: AsyncGenerator[VideoEvent, None], leave: Callable[[], Awaitable[None]]) -> None:
    """Stop a video. An app that cannot be told is told of in the log: whoever leaves has something else to do."""
    try:
        async with asyncio.timeout(LEAVE_S):
            await events.aclose()
            await leave()
    except NotFound:
        pass  # somebody has deleted it
    except (Cosmos3Error, TimeoutError) as error:
        logger.warning("%s could not be stopped: %s", video_id, str(error) or "no answer in time")


async def told(events: AsyncGenerator[VideoEvent, None], deadline: Deadline) -> AsyncGenerator[VideoEvent, None]:
    """The events of a stream that the app sends to this caller alone.

    Raises:
        DeadlineExceeded: they do not come in time.
        UnreachableError: they end too early.
    """
    async with aclosing(events):
        while True:
            try:
                event = await deadline.wait(anext(events, None))
            except TimeoutError:
                raise DeadlineExceeded("follow", deadline.limit_s) from None
            if event is None:
                raise UnreachableError("the app's events ended before their last one")
            yield event


def _failure(video: Video) -> Cosmos3Error:
    error = video.error
    return failure(video.id, "" if error is None else error.code, "it failed" if error is None else error.message)
