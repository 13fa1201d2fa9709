"""The interface between a client and its way to an app, and the streams of a video's events over it.

:mod:`deployments.clients.http_transport` and :mod:`deployments.clients.handle_transport` implement the interface.
Streams survive broken connections, and stop the video when its only caller leaves.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeVar

from pydantic import BaseModel, ValidationError

from cluster.errors import DeadlineExceeded, StageFailed
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.request import GenerationRequest
from deployments.api_model import ModelList
from deployments.clients.errors import WITH_RETRY_AFTER, AnswerError, NotFound, UnreachableError, read_failure
from deployments.jobs.events import DELETED, VideoEnded, VideoEvent, event_of_json
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Video, VideoPage

logger = logging.getLogger(__name__)

VIDEO = "video"
"""The variant that is the file itself; others are "thumbnail", "spritesheet", "audio" and "action"."""

STOP_S = 10.0
"""Longest time that stopping a video waits for the app's answer."""

# Failures that may pass: a broken connection, an app that restarts, a Director that died.
_PASSING = (UnreachableError, StageFailed, *WITH_RETRY_AFTER)
# A connection that lasted this long is no failed try: some proxies end every connection after a minute.
_HELD_S = 10.0

T = TypeVar("T")
_M = TypeVar("_M", bound=BaseModel)


class Deadline:
    """One bound for several waits: ``limit_s`` seconds in all, from now on."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._at_s = time.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, 0 when it has passed."""
        return max(0.0, self._at_s - time.monotonic())

    async def wait(self, awaitable: Awaitable[T]) -> T:
        """Wait for something; raise TimeoutError at the deadline."""
        # One time-out per wait, as different tasks may advance an iterator. One of zero seconds still starts the wait:
        # a coroutine that is never awaited would warn.
        async with asyncio.timeout(self.left_s):
            return await awaitable


@dataclass(frozen=True)
class AttachedVideo:
    """A video that is made for one caller, who waits for it.

    ``events`` is None where its events are followed like those of any other video.
    """

    video_id: str
    events: AsyncGenerator[VideoEvent, None] | None
    stop: Callable[[], Awaitable[None]]


class Transport(Protocol):
    """A way to reach one app, for one event loop.

    Every call raises the errors of :mod:`deployments.clients.errors`: NotFound for unknown ids, UnreachableError where
    no answer comes within the transport's own time-out.
    """

    async def submit(self, request: GenerationRequest, options: SubmitOptions) -> Video:
        """Submit a job that outlives the caller; return its video."""

    async def start_attached(
        self, request: GenerationRequest, options: SubmitOptions, timeout_s: float
    ) -> AttachedVideo:
        """Start a video for the caller alone; return when it is accepted.

        The video is stopped if the caller is cancelled before that, or if it takes longer than ``timeout_s``.
        """

    async def remix(self, video_id: str, prompt: str, options: SubmitOptions) -> Video:
        """Submit a video again with another prompt; return the new video."""

    async def get_video(self, video_id: str) -> Video:
        """Return a video."""

    async def list_videos(self, after: str | None, limit: int, order: str) -> VideoPage:
        """Return a page of videos."""

    async def cancel(self, video_id: str) -> Video:
        """Stop a video and return it; one that has ended stays as it is."""

    async def delete(self, video_id: str) -> None:
        """Stop a video and delete its record and file."""

    def events(self, video_id: str, after: int, timeout_s: float) -> AsyncGenerator[VideoEvent, None]:
        """Yield the events after number ``after`` over one connection, which may break or end too early."""

    def content(self, video_id: str, variant: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Yield a video's file in parts, within ``timeout_s``."""

    async def list_models(self) -> ModelList:
        """Return the list of models."""

    async def aclose(self) -> None:
        """Close the connections."""


def read_answer(kind: type[_M], values: Any) -> _M:
    """Validate an answer, without keys unknown to this version; raise AnswerError if it is not such an answer."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise AnswerError(200, f"the app answers, but not as this API does ({what}); is it a cosmos3 app?") from None


def read_event(kind: str, data: Mapping[str, Any], seq: int | None = None) -> VideoEvent:
    """Return the event that came as JSON; raise AnswerError if its values are not those of its kind."""
    try:
        return event_of_json(kind, data, seq)
    except ValueError:
        message = f"the app sends the event {kind!r}, but not as this API does; is it a cosmos3 app?"
        raise AnswerError(200, message) from None


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
            is_final = (await transport.get_video(video_id)).has_ended
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
    """Yield the events that the app sends to this caller alone; raise UnreachableError if they end too early."""
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
    ``stop``.

    Raises, while iterating:
        DeadlineExceeded, StageFailed, JobCancelled ...: the video failed.
    """

    _has_ended = True  # until there is something to stop

    def __init__(
        self,
        video_id: str,
        events: AsyncGenerator[VideoEvent, None],
        stop: Callable[[], Awaitable[None]],
    ) -> None:
        self.video_id = video_id
        self._events = events
        self._stop = stop
        self._loop = asyncio.get_running_loop()
        self._stopping: asyncio.Task[None] | None = None
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
                error = event.video.error
                raise read_failure(self.video_id, error.code if error else "", error.message if error else "it failed")
        return event

    async def aclose(self) -> None:
        """Stop the work. Does nothing once the video has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._stopping = self._loop.create_task(_stop_video(self.video_id, self._events, self._stop))
        if self._stopping is not None:
            await asyncio.shield(self._stopping)  # the app is asked to stop even where the caller is cancelled

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    def __del__(self) -> None:
        if not self._has_ended:
            stopping = _stop_video(self.video_id, self._events, self._stop)
            try:
                self._loop.call_soon_threadsafe(_run_later, stopping)
            except RuntimeError:  # the loop is gone, and with it the connections
                stopping.close()


# Holds the tasks of dropped streams: an event loop keeps no strong reference to its tasks.
_stop_tasks: set[asyncio.Task[None]] = set()


def _run_later(stopping: Coroutine[Any, Any, None]) -> None:
    task = asyncio.get_running_loop().create_task(stopping)
    _stop_tasks.add(task)
    task.add_done_callback(_stop_tasks.discard)


async def _stop_video(
    video_id: str, events: AsyncGenerator[VideoEvent, None], stop: Callable[[], Awaitable[None]]
) -> None:
    """Stop a video. A failure is logged, not raised: the caller is ending for another reason."""
    try:
        async with asyncio.timeout(STOP_S):
            await events.aclose()
            await stop()
    except NotFound:
        pass  # it was deleted meanwhile
    except (Cosmos3Error, TimeoutError) as error:
        logger.warning("%s could not be stopped: %s", video_id, str(error) or "no answer in time")
