"""The client for event loops, which :mod:`deployments.clients.blocking` runs for threads."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, AsyncIterable, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from cluster.errors import DeadlineExceeded
from cosmos3_core import checks
from cosmos3_core.errors import MediaError
from cosmos3_core.media.output import OutputFile
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import GenerationRequest
from deployments.api_model import Model
from deployments.clients.errors import WITH_RETRY_AFTER, NotFound, UnreachableError
from deployments.clients.http_connection import DIRECTLY, Connecting
from deployments.clients.http_transport import HttpTransport
from deployments.clients.transport import (
    DEFAULT_PATIENCE,
    VIDEO,
    AsyncVideoStream,
    Deadline,
    Patience,
    Transport,
    follow_attached,
    follow_video,
)
from deployments.jobs.events import VideoEnded, VideoEvent
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import MAX_PAGE, ORDERS, Video, VideoPage

DEFAULT_TIMEOUT_S = 3600.0
"""Time-out for a video: to generate it, to wait for it, to read its file."""
DEFAULT_CALL_S = 120.0
"""Time-out for a call that answers at once, uploads included."""

LONGEST_S = 1e6
"""Longest time-out that is accepted."""

_T = TypeVar("_T")
# All ids of an app match it.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class Generation:
    """A finished video with its file in memory; ``media`` is empty if there are only actions."""

    media: bytes = field(repr=False)
    video: Video


class AsyncCosmos3Client:
    """A client of one app, for one event loop; from :meth:`over_http` or :func:`deployments.client.connect_async`.

    Every call raises the errors of :mod:`deployments.clients.errors`: :class:`NotFound` for an unknown video,
    :class:`UnreachableError` if no answer comes in time.
    """

    def __init__(self, transport: Transport, patience: Patience = DEFAULT_PATIENCE) -> None:
        self._transport = transport
        self._patience = patience

    @classmethod
    def over_http(
        cls,
        url: str,
        api_key: str | None = None,
        *,
        timeout_s: float = DEFAULT_CALL_S,
        patience: Patience = DEFAULT_PATIENCE,
        connecting: Connecting = DIRECTLY,
    ) -> Self:
        """Make a client of the app at a URL.

        Args:
            url: such as http://127.0.0.1:8000.
            api_key: None if the app requires none.
            timeout_s: for one call that answers at once.
            patience: what is retried; by default only broken streams of events.
            connecting: proxy and certificates.

        Raises:
            RequestError: ``url`` is not a URL, or no header can hold the key.
        """
        timeout_s = checks.real("timeout_s", timeout_s, 0, LONGEST_S)
        return cls(HttpTransport(url, api_key, timeout_s, connecting), patience)

    async def create(
        self,
        request: GenerationRequest,
        *,
        idempotency_key: str | None = None,
        service_class: str | None = None,
        previews: int = 0,
        request_id: str | None = None,
    ) -> Video:
        """Submit a video, which keeps running when the caller leaves.

        Args:
            request: images and clips given as paths are read here, in the caller's process.
            idempotency_key: a second call with the same key returns the video of the first.
            service_class: of the queue; None: the app's standard class.
            previews: number of preview events, 32 at most.
            request_id: the caller's name for the video, for logs.

        Raises:
            RequestError: the request is wrong, or its image or clip cannot be read.
            OverloadedError, ShuttingDown: no place is free; try again after ``retry_after_s``.
            IdempotencyConflict: the key was used for another request.
            ContentBlocked: a guardrail blocked the request.
        """
        options = _make_options(request_id, idempotency_key, service_class, previews)
        return await self._call(lambda: self._transport.submit(request, options))

    async def remix(
        self,
        video_id: str,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
    ) -> Video:
        """Submit a video again with the same seed and fields and another prompt. Raises as :meth:`create`."""
        options = _make_options(request_id, idempotency_key, None, 0)
        return await self._call(lambda: self._transport.remix(_check_id(video_id), prompt, options))

    async def retrieve(self, video_id: str) -> Video:
        """Return a video, failed ones too."""
        return await self._call(lambda: self._transport.get_video(_check_id(video_id)))

    async def list(self, after: str | None = None, *, limit: int = 20, order: str = "desc") -> VideoPage:
        """Return a page of the videos after ``after``, the newest first unless ``order`` is "asc".

        Raises RequestError for a value out of range, or an unknown ``after``.
        """
        limit = checks.integer("limit", limit, 1, MAX_PAGE)
        order = checks.choice("order", order, ORDERS)
        return await self._call(lambda: self._transport.list_videos(after, limit, order))

    async def list_all(self, *, order: str = "desc") -> AsyncGenerator[Video, None]:
        """Yield all videos, page by page."""
        after: str | None = None
        while True:
            page = await self.list(after, limit=MAX_PAGE, order=order)
            for video in page.videos:
                yield video
            if not page.has_more or not page.videos:
                return
            after = page.videos[-1].id

    async def cancel(self, video_id: str) -> Video:
        """Stop a video, which then has failed with the code "cancelled"; one that has ended stays as it is."""
        return await self._call(lambda: self._transport.cancel(_check_id(video_id)))

    async def delete(self, video_id: str) -> None:
        """Stop a video and delete its record and file."""
        await self._call(lambda: self._transport.delete(_check_id(video_id)))

    async def models(self) -> tuple[Model, ...]:
        """Return the models that the app serves."""
        return (await self._call(self._transport.list_models)).data

    async def events(
        self, video_id: str, after: int = 0, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> AsyncGenerator[VideoEvent, None]:
        """Yield a video's events after number ``after``; :class:`VideoEnded` is the last.

        Reconnects when the connection breaks; every event comes once. Closing the iterator does not stop the video.

        Raises, while iterating:
            DeadlineExceeded: the video has not ended within ``timeout_s``.
            UnreachableError: the app is away for longer than ``patience`` allows.
        """
        following = follow_video(self._transport, _check_id(video_id), after, _make_deadline(timeout_s), self._patience)
        async with aclosing(following) as events:
            async for event in events:
                yield event

    async def wait(self, video_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Video:
        """Return the video when it has ended, completed or failed; raise DeadlineExceeded, and it keeps running."""
        async with aclosing(self.events(video_id, timeout_s=timeout_s)) as events:
            async for event in events:
                if isinstance(event, VideoEnded):
                    return event.video
        raise AssertionError("events end with the last one, or raise")

    async def content(
        self, video_id: str, variant: str = VIDEO, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> AsyncGenerator[bytes, None]:
        """Yield a video's file in parts.

        Args:
            video_id: of a finished video; over HTTP also of one whose file grows.
            variant: "video" (the file itself), "thumbnail", "spritesheet", "audio" or "action".
            timeout_s: for the whole file.

        Raises, while iterating:
            NotFound, NotReady: the file is not there, or not written yet.
            UnreachableError: the file broke off, or did not come in time.
        """
        timeout_s = checks.real("timeout_s", timeout_s, 0, LONGEST_S)
        async with aclosing(self._transport.content(_check_id(video_id), variant, timeout_s)) as parts:
            async for part in parts:
                yield part

    async def save(
        self, video_id: str, path: str | Path, variant: str = VIDEO, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Path:
        """Write a video's file to a path, where it appears when it is whole; return the path.

        Raises:
            RequestError, MediaError: there can be no file at ``path``, or it cannot be written.
            Cosmos3Error: as :meth:`content`.
        """
        async with aclosing(self.content(video_id, variant, timeout_s=timeout_s)) as parts:
            await write_parts(parts, Path(path))
        return Path(path)

    async def stream(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        service_class: str | None = None,
        previews: int = 0,
        request_id: str | None = None,
    ) -> AsyncVideoStream:
        """Generate a video for this caller alone; return its events when it is accepted.

        Closing or dropping the stream, or leaving its block, stops the work of every stage.

        Args:
            request, service_class, previews, request_id: as in :meth:`create`, and so are the errors.
            timeout_s: for the whole video; the app may have a shorter limit.

        Raises:
            DeadlineExceeded: the video was not accepted in time.
        """
        options = _make_options(request_id, None, service_class, previews)
        deadline = _make_deadline(timeout_s)
        try:
            attached = await self._call(
                lambda: self._transport.start_attached(request, options, deadline.left_s), deadline.left_s
            )
        except UnreachableError:
            if not deadline.left_s:
                raise DeadlineExceeded("submit", timeout_s) from None
            raise
        if attached.events is not None:
            events = follow_attached(attached.events, deadline)
        else:
            events = follow_video(self._transport, attached.video_id, 0, deadline, self._patience)
        return AsyncVideoStream(attached.video_id, events, attached.stop)

    async def generate(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        service_class: str | None = None,
        request_id: str | None = None,
    ) -> Generation:
        """Generate a video and return it with its file. Cancelling the call stops the work.

        Raises as :meth:`create`, and the failure of the video.
        """
        deadline = _make_deadline(timeout_s)
        events = await self.stream(request, timeout_s=timeout_s, service_class=service_class, request_id=request_id)
        async with events:
            video = [event.video async for event in events if isinstance(event, VideoEnded)][-1]
        media = bytearray()
        if video.has_file:
            try:
                async with aclosing(self.content(video.id, timeout_s=deadline.left_s)) as parts:
                    async for part in parts:
                        media += part
            except UnreachableError:
                if not deadline.left_s:
                    raise DeadlineExceeded("read", timeout_s) from None
                raise
        return Generation(bytes(media), video)

    async def aclose(self) -> None:
        """Close the connections; open streams break."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def _call(self, call: Callable[[], Awaitable[_T]], limit_s: float = LONGEST_S) -> _T:
        """Call, and retry after the app's ``retry_after_s`` while ``max_wait_s`` and the limit allow it."""
        left_s = min(self._patience.max_wait_s, limit_s)
        while True:
            try:
                return await call()
            except WITH_RETRY_AFTER as error:
                pause_s = max(error.retry_after_s, self._patience.first_pause_s)
                if pause_s > left_s:
                    raise
            left_s -= pause_s
            # Random, so that clients refused together do not come back together.
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.1))


def _make_options(
    request_id: str | None, idempotency_key: str | None, service_class: str | None, previews: int
) -> SubmitOptions:
    return SubmitOptions(
        request_id=request_id,
        idempotency_key=idempotency_key,
        service_class=service_class,
        previews=checks.integer("previews", previews, 0, MAX_PREVIEWS),
    )


def _make_deadline(timeout_s: float) -> Deadline:
    return Deadline(checks.real("timeout_s", timeout_s, 0, LONGEST_S))


def _check_id(video_id: str) -> str:
    if not isinstance(video_id, str) or not _ID.fullmatch(video_id):
        raise NotFound.video(str(video_id)[:200])
    return video_id


async def write_parts(parts: AsyncIterable[bytes], path: Path) -> int:
    """Write parts to a file, which appears when it is whole; return its size in bytes.

    Raises:
        RequestError: there can be no file at ``path``.
        MediaError: the file cannot be written.
    """
    file = OutputFile(path)
    num_bytes = 0
    try:
        with file.path.open("wb") as stream:
            async for part in parts:
                num_bytes += await asyncio.to_thread(stream.write, part)
        file.commit()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error}") from error
    finally:
        file.discard()
    return num_bytes
