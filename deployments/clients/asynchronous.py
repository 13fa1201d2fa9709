"""The client for event loops. The one for threads, :mod:`deployments.clients.blocking`, runs this one."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self, TypeVar

from cluster.errors import DeadlineExceeded
from cosmos3_core import checks
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import GenerationRequest
from deployments.clients.answers import read_answer
from deployments.clients.deadline import Deadline
from deployments.clients.errors import COMEBACK, NotFound, UnreachableError
from deployments.clients.following import DEFAULT_PATIENCE, Patience, following
from deployments.clients.http_calls import DIRECTLY, Connecting
from deployments.clients.http_transport import HttpTransport
from deployments.clients.saving import write_parts
from deployments.clients.transport import VIDEO, Transport
from deployments.clients.video_stream import AsyncVideoStream, told
from deployments.jobs.events import VideoEnded, VideoEvent
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Video, VideoPage
from deployments.served_model import Model, ModelList

DEFAULT_TIMEOUT_S = 3600.0
"""For a video: making it, waiting for it, reading its file."""
DEFAULT_CALL_S = 120.0
"""For a call that answers at once, uploads included."""

_T = TypeVar("_T")
LONGEST_S = 1e6
"""Any time-out is at most this."""
_MAX_PAGE = 100
# Of any id that an app gives; what looks otherwise is not asked for.
_ID = re.compile(r"[A-Za-z0-9_-]{1,128}")


@dataclass(frozen=True)
class Generation:
    """A finished request in one piece.

    Attributes:
        media: its file; empty where there is none, only actions.
        video: what is known of it.
    """

    media: bytes = field(repr=False)
    video: Video


class AsyncCosmos3Client:
    """A running app, for one event loop; made by :meth:`over_http` or :func:`deployments.client.connect_async`.

    Every call raises what :mod:`deployments.clients.errors` has: :class:`NotFound` where there is no such video,
    :class:`UnreachableError` where no answer comes in time.

    Args:
        transport: how the app is reached.
        patience: what is tried again.
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
        """Of an app's URL.

        Args:
            url: such as http://127.0.0.1:8000.
            api_key: None where the app asks for none.
            timeout_s: for one call that answers at once.
            patience: what is tried again; by default nothing but broken streams of events.
            connecting: proxy, certificates.

        Raises:
            RequestError: not a URL, or a key that no header can hold.
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
        """Have a video made, whatever becomes of the caller.

        Args:
            request: what is asked for; images and clips given as paths are read here, in the caller's process.
            idempotency_key: a second call with it gives the video of the first.
            service_class: that it waits in; None: the app's standard one.
            previews: how many pictures of what is being made to put among its events, 32 at most.
            request_id: the caller's name for it, for logs.

        Raises:
            RequestError: the request is wrong, or its image or clip cannot be read.
            OverloadedError, ShuttingDown: no place is free; says when to try again.
            IdempotencyConflict: the key was used for another request.
            ContentBlocked: a guardrail has stopped it.
        """
        options = _options(request_id, idempotency_key, service_class, previews)
        return read_answer(Video, await self._patiently(lambda: self._transport.submit(request, options)))

    async def remix(
        self,
        video_id: str,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
    ) -> Video:
        """Have a video made again with the same seed and fields and another prompt.

        Raises:
            Cosmos3Error: as :meth:`create`.
        """
        options = _options(request_id, idempotency_key, None, 0)
        _check_id(video_id)
        return read_answer(Video, await self._patiently(lambda: self._transport.remix(video_id, prompt, options)))

    async def retrieve(self, video_id: str) -> Video:
        """What is known of a video; of one that failed as well."""
        _check_id(video_id)
        return read_answer(Video, await self._patiently(lambda: self._transport.job(video_id)))

    async def list(self, after: str | None = None, *, limit: int = 20, order: str = "desc") -> VideoPage:
        """Some of the videos: those behind ``after``, the newest first unless ``order`` is "asc".

        Raises:
            RequestError: a value is out of range, or nothing is known of ``after``.
        """
        limit = checks.integer("limit", limit, 1, _MAX_PAGE)
        order = checks.choice("order", order, ("asc", "desc"))
        return read_answer(VideoPage, await self._patiently(lambda: self._transport.jobs(after, limit, order)))

    async def list_all(self, *, order: str = "desc") -> AsyncGenerator[Video, None]:
        """All videos, page after page."""
        after: str | None = None
        while True:
            page = await self.list(after, limit=_MAX_PAGE, order=order)
            for video in page.videos:
                yield video
            if not page.has_more or not page.videos:
                return
            after = page.videos[-1].id

    async def cancel(self, video_id: str) -> Video:
        """Stop a video; one that has ended stays as it is. It has failed then, with the code "cancelled"."""
        _check_id(video_id)
        return read_answer(Video, await self._patiently(lambda: self._transport.cancel(video_id)))

    async def delete(self, video_id: str) -> None:
        """Stop a video and forget it, file and all."""
        _check_id(video_id)
        await self._patiently(lambda: self._transport.delete(video_id))

    async def models(self) -> tuple[Model, ...]:
        """What is served."""
        return read_answer(ModelList, await self._patiently(self._transport.models)).data

    async def events(
        self, video_id: str, after: int = 0, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> AsyncGenerator[VideoEvent, None]:
        """What happens to a video, from event number ``after`` on; :class:`VideoEnded` is the last.

        Goes on by itself where the connection breaks, with every event once. Leaving it leaves the video alone.

        Raises, while iterating:
            DeadlineExceeded: it has not ended within ``timeout_s``.
            UnreachableError: the app is away for too long.
        """
        _check_id(video_id)
        deadline = _deadline(timeout_s)
        async with aclosing(following(self._transport, video_id, after, deadline, self._patience)) as events:
            async for event in events:
                yield event

    async def wait(self, video_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Video:
        """The video when it has ended, well or not.

        Raises:
            DeadlineExceeded: it has not ended in time; it goes on.
        """
        async with aclosing(self.events(video_id, timeout_s=timeout_s)) as events:
            async for event in events:
                if isinstance(event, VideoEnded):
                    return event.video
        raise AssertionError("events end with the last one, or raise")

    async def content(
        self, video_id: str, variant: str = VIDEO, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> AsyncGenerator[bytes, None]:
        """A video's file in parts, never the whole of it.

        Args:
            video_id: of a finished video; over HTTP also of one whose file grows.
            variant: "video", the file itself, whatever it is; "thumbnail", "spritesheet", "audio" or "action".
            timeout_s: for all of it.

        Raises, while iterating:
            NotFound: there is no such file, or not any more.
            NotReady: not yet.
            UnreachableError: it did not come whole, or not in time.
        """
        _check_id(video_id)
        timeout_s = checks.real("timeout_s", timeout_s, 0, LONGEST_S)
        async with aclosing(self._transport.content(video_id, variant, timeout_s)) as parts:
            async for part in parts:
                yield part

    async def save(
        self, video_id: str, path: str | Path, variant: str = VIDEO, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Path:
        """Write a video's file to a path, where it appears when it is whole. Returns the path.

        Raises:
            RequestError: no place for a file.
            MediaError: it cannot be written.
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
        """Have a video made for this caller alone, and follow it; returns when it has its place.

        Leaving the stream, closing or dropping it stops the work of every stage.

        Args:
            request, service_class, previews, request_id: as of :meth:`create`.
            timeout_s: until it is done; the app may have a shorter limit.

        Raises:
            Cosmos3Error: as :meth:`create`.
            DeadlineExceeded: it has no place in time.
        """
        options = _options(request_id, None, service_class, previews)
        deadline = _deadline(timeout_s)
        try:
            attached = await self._patiently(
                lambda: self._transport.attach(request, options, deadline.left_s), deadline.left_s
            )
        except UnreachableError:
            if not deadline.left_s:
                raise DeadlineExceeded("submit", timeout_s) from None
            raise
        if attached.events is not None:
            events = told(attached.events, deadline)
        else:
            events = following(self._transport, attached.video_id, 0, deadline, self._patience)
        return AsyncVideoStream(attached.video_id, events, attached.leave)

    async def generate(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        service_class: str | None = None,
        request_id: str | None = None,
    ) -> Generation:
        """Have a video made and wait for its file. Who gives up waiting stops it.

        Raises:
            Cosmos3Error: as :meth:`create`; and why it failed, as the stream of :meth:`stream`.
        """
        deadline = _deadline(timeout_s)
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
        """Close the connections. Streams that are open break."""
        await self._transport.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.aclose()

    async def _patiently(self, call: Callable[[], Awaitable[_T]], limit_s: float = LONGEST_S) -> _T:
        """A call, put off where the app says when to come back, as long as ``max_wait_s`` and the limit allow."""
        left_s = min(self._patience.max_wait_s, limit_s)
        while True:
            try:
                return await call()
            except COMEBACK as error:
                pause_s = max(error.retry_after_s, self._patience.first_pause_s)
                if pause_s > left_s:
                    raise
            left_s -= pause_s
            # Not all who were told the same come back at the same moment.
            await asyncio.sleep(pause_s * random.uniform(1.0, 1.1))


def _options(
    request_id: str | None, idempotency_key: str | None, service_class: str | None, previews: int
) -> SubmitOptions:
    return SubmitOptions(
        request_id=request_id,
        idempotency_key=idempotency_key,
        service_class=service_class,
        previews=checks.integer("previews", previews, 0, MAX_PREVIEWS),
    )


def _deadline(timeout_s: float) -> Deadline:
    return Deadline(checks.real("timeout_s", timeout_s, 0, LONGEST_S))


def _check_id(video_id: str) -> None:
    if not isinstance(video_id, str) or not _ID.fullmatch(video_id):
        raise NotFound.video(str(video_id)[:200])
