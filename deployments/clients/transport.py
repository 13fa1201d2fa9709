"""The interface between a client and its way to an app, and how both transports read the app's JSON.

:mod:`deployments.clients.http_transport` and :mod:`deployments.clients.handle_transport` implement it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from pydantic import BaseModel, ValidationError

from cosmos3_core.request import GenerationRequest
from deployments.clients.errors import AnswerError
from deployments.jobs.events import VideoEvent, event_of_json
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Video, VideoPage
from deployments.served_model import ModelList

VIDEO = "video"
"""The variant that is the file itself; others are "thumbnail", "spritesheet", "audio" and "action"."""

LEAVE_S = 10.0
"""Longest time that leaving a video waits for the app's answer."""

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
class Attached:
    """A video that is made for one caller, who waits for it; ``leave`` stops it.

    ``events`` is None where its events are followed like those of any other video.
    """

    video_id: str
    events: AsyncGenerator[VideoEvent, None] | None
    leave: Callable[[], Awaitable[None]]


class Transport(Protocol):
    """A way to reach one app, for one event loop.

    Every call raises the errors of :mod:`deployments.clients.errors`: NotFound for unknown ids, UnreachableError where
    no answer comes within the transport's own time-out.
    """

    async def submit(self, request: GenerationRequest, options: SubmitOptions) -> Video:
        """Submit a job that outlives the caller; return its video."""

    async def attach(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float) -> Attached:
        """Start a video for the caller alone; return when it is accepted.

        The video is stopped if the caller is cancelled before that, or if it takes longer than ``timeout_s``.
        """

    async def remix(self, video_id: str, prompt: str, options: SubmitOptions) -> Video:
        """Submit a video again with another prompt; return the new video."""

    async def job(self, video_id: str) -> Video:
        """Return a video."""

    async def jobs(self, after: str | None, limit: int, order: str) -> VideoPage:
        """Return a page of videos."""

    async def cancel(self, video_id: str) -> Video:
        """Stop a video and return it; one that has ended stays as it is."""

    async def delete(self, video_id: str) -> None:
        """Stop a video and delete its record and file."""

    def events(self, video_id: str, after: int, timeout_s: float) -> AsyncGenerator[VideoEvent, None]:
        """Yield the events after number ``after`` over one connection, which may break or end too early."""

    def content(self, video_id: str, variant: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Yield a video's file in parts, within ``timeout_s``."""

    async def models(self) -> ModelList:
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
