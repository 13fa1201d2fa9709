"""What a client needs of a way to talk to an app; there is one over HTTP and one over handles."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cosmos3_core.request import GenerationRequest
from deployments.jobs.events import VideoEvent
from deployments.jobs.job import SubmitOptions

VIDEO = "video"
"""The variant that is the file itself; others are "thumbnail", "spritesheet", "audio" and "action"."""

LEAVE_S = 10.0
"""Who leaves waits no longer for the app to hear of it."""

JobObject = Mapping[str, Any]
"""A video as the HTTP API has it; :class:`deployments.jobs.video.Video` is the value."""


@dataclass(frozen=True)
class Attached:
    """A video whose maker waits for it.

    Attributes:
        video_id: names it.
        events: of it; None where they are followed like those of any other.
        leave: stops it.
    """

    video_id: str
    events: AsyncGenerator[VideoEvent, None] | None
    leave: Callable[[], Awaitable[None]]


class Transport(Protocol):
    """See the module. Of one event loop.

    Every call raises what :mod:`deployments.clients.errors` has: NotFound for ids that nothing is known of,
    UnreachableError where no answer comes within the transport's own time.
    """

    async def submit(self, request: GenerationRequest, options: SubmitOptions) -> JobObject:
        """Have a video made that stays."""
        ...

    async def attach(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float) -> Attached:
        """Have a video made for the caller alone, within so many seconds; returns when it has its place.

        Of who is cancelled meanwhile, or for whom that takes too long, no video is left.
        """
        ...

    async def remix(self, video_id: str, prompt: str, options: SubmitOptions) -> JobObject:
        """Have the video of another prompt made."""
        ...

    async def job(self, video_id: str) -> JobObject:
        """What is known of it."""
        ...

    async def jobs(self, after: str | None, limit: int, order: str) -> Mapping[str, Any]:
        """A page: "data" with job objects, and "has_more"."""
        ...

    async def cancel(self, video_id: str) -> JobObject:
        """Stop it; nothing happens to one that has ended."""
        ...

    async def delete(self, video_id: str) -> None:
        """Stop it and forget it, file and all."""
        ...

    def events(self, video_id: str, after: int, timeout_s: float) -> AsyncGenerator[VideoEvent, None]:
        """What comes behind that event, over one connection: it may break, or end too early."""
        ...

    def content(self, video_id: str, variant: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """Its file in parts, within so many seconds."""
        ...

    async def models(self) -> Mapping[str, Any]:
        """Return "data", a list of models."""
        ...

    async def aclose(self) -> None:
        """Give back what is held."""
        ...
