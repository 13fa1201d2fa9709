"""The client for threads: the same calls as :mod:`deployments.clients.asynchronous`, which it runs in a thread."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Generic, Self, TypeVar

from cosmos3_core.request import GenerationRequest
from deployments.clients.asynchronous import DEFAULT_CALL_S, DEFAULT_TIMEOUT_S, AsyncCosmos3Client, Generation
from deployments.clients.following import DEFAULT_PATIENCE, Patience
from deployments.clients.http_calls import DIRECTLY, Connecting
from deployments.clients.loop_thread import LoopThread
from deployments.clients.transport import VIDEO
from deployments.clients.video_stream import AsyncVideoStream
from deployments.jobs.events import VideoEvent
from deployments.jobs.video import Video, VideoPage
from deployments.served_model import Model

_T = TypeVar("_T")


class Cosmos3Client:
    """A running app, for any number of threads; made by :meth:`over_http` or :func:`deployments.client.connect`.

    What the calls do and raise is said at :class:`~deployments.clients.asynchronous.AsyncCosmos3Client`. A call that is
    interrupted, by Ctrl-C say, is stopped.

    Args:
        client: that is run; nobody else uses it.
    """

    def __init__(self, client: AsyncCosmos3Client) -> None:
        self._client = client
        self._thread = LoopThread()

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
        """Of an app's URL."""
        made = AsyncCosmos3Client.over_http(url, api_key, timeout_s=timeout_s, patience=patience, connecting=connecting)
        return cls(made)

    def create(
        self,
        request: GenerationRequest,
        *,
        idempotency_key: str | None = None,
        service_class: str | None = None,
        previews: int = 0,
        request_id: str | None = None,
    ) -> Video:
        """Have a video made, whatever becomes of the caller."""
        return self._thread.run(
            self._client.create(
                request,
                idempotency_key=idempotency_key,
                service_class=service_class,
                previews=previews,
                request_id=request_id,
            )
        )

    def remix(
        self,
        video_id: str,
        prompt: str,
        *,
        idempotency_key: str | None = None,
        request_id: str | None = None,
    ) -> Video:
        """Have a video made again with the same seed and fields and another prompt."""
        return self._thread.run(
            self._client.remix(
                video_id,
                prompt,
                idempotency_key=idempotency_key,
                request_id=request_id,
            )
        )

    def retrieve(self, video_id: str) -> Video:
        """What is known of a video; of one that failed as well."""
        return self._thread.run(self._client.retrieve(video_id))

    def list(self, after: str | None = None, *, limit: int = 20, order: str = "desc") -> VideoPage:
        """Some of the videos: those behind ``after``, the newest first unless ``order`` is "asc"."""
        return self._thread.run(self._client.list(after, limit=limit, order=order))

    def list_all(self, *, order: str = "desc") -> Items[Video]:
        """All videos, page after page."""
        return Items(self._thread, self._client.list_all(order=order))

    def cancel(self, video_id: str) -> Video:
        """Stop a video; one that has ended stays as it is. It has failed then, with the code "cancelled"."""
        return self._thread.run(self._client.cancel(video_id))

    def delete(self, video_id: str) -> None:
        """Stop a video and forget it, file and all."""
        self._thread.run(self._client.delete(video_id))

    def models(self) -> tuple[Model, ...]:
        """What is served."""
        return self._thread.run(self._client.models())

    def events(self, video_id: str, after: int = 0, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Items[VideoEvent]:
        """What happens to a video, from event number ``after`` on. Leaving it leaves the video alone."""
        return Items(self._thread, self._client.events(video_id, after, timeout_s=timeout_s))

    def wait(self, video_id: str, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Video:
        """The video when it has ended, well or not."""
        return self._thread.run(self._client.wait(video_id, timeout_s=timeout_s))

    def content(self, video_id: str, variant: str = VIDEO, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Items[bytes]:
        """A video's file in parts, never the whole of it."""
        return Items(self._thread, self._client.content(video_id, variant, timeout_s=timeout_s))

    def save(
        self, video_id: str, path: str | Path, variant: str = VIDEO, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Path:
        """Write a video's file to a path, where it appears when it is whole. Returns the path."""
        return self._thread.run(self._client.save(video_id, path, variant, timeout_s=timeout_s))

    def stream(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        service_class: str | None = None,
        previews: int = 0,
        request_id: str | None = None,
    ) -> VideoStream:
        """Have a video made for this caller alone, and follow it; returns when it has its place."""
        stream = self._thread.run(
            self._client.stream(
                request,
                timeout_s=timeout_s,
                service_class=service_class,
                previews=previews,
                request_id=request_id,
            )
        )
        return VideoStream(self._thread, stream)

    def generate(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        service_class: str | None = None,
        request_id: str | None = None,
    ) -> Generation:
        """Have a video made and wait for its file. Who gives up waiting stops it."""
        return self._thread.run(
            self._client.generate(request, timeout_s=timeout_s, service_class=service_class, request_id=request_id)
        )

    def close(self) -> None:
        """Close the connections and end the thread. May be called twice; no other call after it."""
        if self._thread.is_open:
            self._thread.run(self._client.aclose())
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class Items(Generic[_T], Iterator[_T]):
    """An asynchronous generator as an iterator. Closing or dropping it ends the generator.

    Args:
        thread: that runs it.
        items: the generator; nobody else uses it.
    """

    def __init__(self, thread: LoopThread, items: AsyncGenerator[_T, None]) -> None:
        self._thread = thread
        # Dropped, it is closed by its loop: what an iterator's end may wait for must not be waited for in ``__del__``.
        self._items = items

    def __next__(self) -> _T:
        return _next(self._thread, self._items)

    def close(self) -> None:
        """End it."""
        self._thread.run(self._items.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class VideoStream(Iterator[VideoEvent]):
    """The events of a video that is made for this caller; :class:`VideoEnded`, the last, has the finished one.

    Closing it, leaving its ``with`` block, or dropping it stops the work of every stage.

    Raises, while iterating:
        DeadlineExceeded, StageFailed, JobCancelled ...: it could not be done.

    Args:
        thread: that runs it.
        stream: that is followed; nobody else does.

    Attributes:
        video_id: of the video.
    """

    def __init__(self, thread: LoopThread, stream: AsyncVideoStream) -> None:
        self._thread = thread
        self._stream = stream
        self.video_id = stream.video_id

    def __next__(self) -> VideoEvent:
        return _next(self._thread, self._stream)

    def close(self) -> None:
        """Stop. Does nothing once the video has ended."""
        self._thread.run(self._stream.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _next(thread: LoopThread, items: AsyncIterator[_T]) -> _T:
    async def item() -> _T:
        return await anext(items)

    try:
        return thread.run(item())
    except StopAsyncIteration:
        raise StopIteration from None
