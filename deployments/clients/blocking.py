"""The client for threads: the calls of :mod:`deployments.clients.asynchronous`, run by an event loop in a thread."""

from __future__ import annotations

import functools
import inspect
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from cosmos3_core.request import GenerationRequest
from deployments.clients.asynchronous import DEFAULT_CALL_S, DEFAULT_TIMEOUT_S, AsyncCosmos3Client
from deployments.clients.http_calls import DIRECTLY, Connecting
from deployments.clients.loop_thread import LoopThread
from deployments.clients.streams import DEFAULT_PATIENCE, AsyncVideoStream, Patience
from deployments.jobs.events import VideoEvent

_P = ParamSpec("_P")
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)


def _block(
    method: Callable[Concatenate[AsyncCosmos3Client, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Cosmos3Client, _P], _T]:
    """Return the blocking twin of a method, with its parameters and docstring."""

    @functools.wraps(method)
    def call(self: Cosmos3Client, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._thread.run(method(self._client, *args, **kwargs))

    return call


def _iterate(
    method: Callable[Concatenate[AsyncCosmos3Client, _P], AsyncGenerator[_T, None]],
) -> Callable[Concatenate[Cosmos3Client, _P], Items[_T]]:
    """Return the blocking twin of an asynchronous generator, with its parameters and docstring."""

    @functools.wraps(method)
    def call(self: Cosmos3Client, /, *args: _P.args, **kwargs: _P.kwargs) -> Items[_T]:
        return Items(self._thread, method(self._client, *args, **kwargs))

    # For ``help``, which otherwise shows what the generator's method returns.
    vars(call)["__signature__"] = inspect.signature(method).replace(return_annotation="Items")
    return call


class Cosmos3Client:
    """A client of one app, for any number of threads; from :meth:`over_http` or :func:`deployments.client.connect`.

    Calls do and raise what those of :class:`~deployments.clients.asynchronous.AsyncCosmos3Client` do. An interrupt,
    Ctrl-C for example, stops the call.

    Args:
        client: runs the calls; owned by this client from now on.
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
        """Make a client of the app at a URL, as :meth:`AsyncCosmos3Client.over_http`."""
        client = AsyncCosmos3Client.over_http(
            url, api_key, timeout_s=timeout_s, patience=patience, connecting=connecting
        )
        return cls(client)

    create = _block(AsyncCosmos3Client.create)
    remix = _block(AsyncCosmos3Client.remix)
    retrieve = _block(AsyncCosmos3Client.retrieve)
    list = _block(AsyncCosmos3Client.list)
    list_all = _iterate(AsyncCosmos3Client.list_all)
    cancel = _block(AsyncCosmos3Client.cancel)
    delete = _block(AsyncCosmos3Client.delete)
    models = _block(AsyncCosmos3Client.models)
    events = _iterate(AsyncCosmos3Client.events)
    wait = _block(AsyncCosmos3Client.wait)
    content = _iterate(AsyncCosmos3Client.content)
    save = _block(AsyncCosmos3Client.save)
    generate = _block(AsyncCosmos3Client.generate)

    def stream(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        service_class: str | None = None,
        previews: int = 0,
        request_id: str | None = None,
    ) -> VideoStream:
        """Generate a video for this caller alone; return its events when it is accepted."""
        stream = self._client.stream(
            request, timeout_s=timeout_s, service_class=service_class, previews=previews, request_id=request_id
        )
        return VideoStream(self._thread, self._thread.run(stream))

    def close(self) -> None:
        """Close the connections and end the thread. May be called twice; no other call after it."""
        if self._thread.is_open:
            self._thread.run(self._client.aclose())
            self._thread.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _AsyncItems(Protocol[_T_co]):
    """An asynchronous iterator that can be closed: a generator or a stream."""

    def __anext__(self) -> Awaitable[_T_co]: ...

    def aclose(self) -> Coroutine[Any, Any, None]: ...


class Items(Generic[_T], Iterator[_T]):
    """An asynchronous generator as an iterator and context manager. Closing or dropping it ends the generator.

    Args:
        thread: runs the generator.
        items: the generator; owned by this iterator.
    """

    def __init__(self, thread: LoopThread, items: _AsyncItems[_T]) -> None:
        self._thread = thread
        # Its loop closes a dropped generator: ``__del__`` must not wait for that.
        self._items = items

    def __next__(self) -> _T:
        async def advance() -> _T:
            return await anext(self._items)

        try:
            return self._thread.run(advance())
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        """End the generator; that of a :class:`VideoStream` stops its work."""
        self._thread.run(self._items.aclose())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class VideoStream(Items[VideoEvent]):
    """The events of a video that is made for this caller; :class:`VideoEnded`, the last, holds the finished video.

    Closing it, leaving its ``with`` block, or dropping it stops the work of every stage.

    Raises, while iterating:
        DeadlineExceeded, StageFailed, JobCancelled ...: the video failed.

    Args:
        thread: runs the stream.
        stream: owned by this iterator.

    Attributes:
        video_id: of the video.
    """

    def __init__(self, thread: LoopThread, stream: AsyncVideoStream) -> None:
        super().__init__(thread, stream)
        self.video_id = stream.video_id
