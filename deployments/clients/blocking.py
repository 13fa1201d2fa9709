"""The client for threads: the calls of :mod:`deployments.clients.asynchronous`, run by an event loop in a thread.

anyio's blocking portal cannot replace the thread: there a cancelled call can await nothing more, so an interrupt would
return before its video is stopped; and closing the portal either cancels all calls at once or waits without a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import queue
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterator
from typing import Any, Concatenate, Generic, ParamSpec, Protocol, Self, TypeVar

from cosmos3_core.errors import ClosedError
from cosmos3_core.request import GenerationRequest
from deployments.clients.asynchronous import DEFAULT_CALL_S, DEFAULT_TIMEOUT_S, AsyncCosmos3Client
from deployments.clients.http_connection import DIRECTLY, Connecting
from deployments.clients.transport import DEFAULT_PATIENCE, AsyncVideoStream, Patience
from deployments.jobs.events import VideoEvent

_P = ParamSpec("_P")
_T = TypeVar("_T")
_T_co = TypeVar("_T_co", covariant=True)

_STOP_S = 10.0
# Longest time that an interrupt goes unnoticed: a signal just before a thread falls asleep does not wake it.
_NOTICE_S = 0.5


class LoopThread:
    """An event loop in a thread of its own. It ends when it is closed or dropped, or with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="cosmos3-client", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._loop)

    @property
    def is_open(self) -> bool:
        """Whether it accepts work."""
        return self._stop.alive

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run a coroutine, which an interrupt cancels and waits for; raise ClosedError if the thread was stopped."""
        if not self.is_open or threading.current_thread() is self._thread:
            work.close()
            raise ClosedError("the client is closed, or was called from its own event loop")
        # Not a queue.Queue: an interrupt between two of its lines would leave its lock held, and the loop hanging.
        ended: queue.SimpleQueue[asyncio.Task[_T] | None] = queue.SimpleQueue()
        tasks: list[asyncio.Task[_T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(end)

        def end(task: asyncio.Task[_T]) -> None:
            if not task.cancelled():
                task.exception()  # marks it as retrieved, or asyncio would log it
            ended.put(task)

        def cancel() -> None:
            if not tasks:
                work.close()  # the interrupt came before it was handed over
            elif tasks[0].cancel():
                return
            ended.put(None)  # no task will call end, or it has called it already

        try:
            self._loop.call_soon_threadsafe(begin)
            task = None
            while task is None:
                with contextlib.suppress(queue.Empty):
                    task = ended.get(timeout=_NOTICE_S)
            return task.result()
        except asyncio.CancelledError:
            raise ClosedError("the client was closed before this had an end") from None
        except (KeyboardInterrupt, SystemExit):
            # Scheduled twice, so that it runs after the task's first step wherever the interrupt came.
            self._loop.call_soon_threadsafe(self._loop.call_soon, cancel)
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=_STOP_S)
            raise

    def close(self) -> None:
        """Stop when running work has ended; after a while, cancel it. May be called twice."""
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * _STOP_S)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_finish_tasks())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


async def _finish_tasks() -> None:
    """Wait for running tasks, such as those that ask the app to stop a video; after a while cancel them."""
    await asyncio.sleep(0)  # callbacks that were scheduled last create their tasks
    own = {asyncio.current_task()}
    deadline_s = time.monotonic() + _STOP_S
    while others := asyncio.all_tasks() - own:
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            break
        await asyncio.wait(others, timeout=left_s)
    for task in others:
        task.cancel()
    if others:
        await asyncio.wait(others, timeout=_STOP_S)


def _stop(loop: asyncio.AbstractEventLoop) -> None:
    loop.call_soon_threadsafe(loop.stop)


def _make_blocking(
    method: Callable[Concatenate[AsyncCosmos3Client, _P], Coroutine[Any, Any, _T]],
) -> Callable[Concatenate[Cosmos3Client, _P], _T]:
    """Return the blocking twin of a method, with its parameters and docstring."""

    @functools.wraps(method)
    def call(self: Cosmos3Client, /, *args: _P.args, **kwargs: _P.kwargs) -> _T:
        return self._thread.run(method(self._client, *args, **kwargs))

    return call


def _make_blocking_iterator(
    method: Callable[Concatenate[AsyncCosmos3Client, _P], AsyncGenerator[_T, None]],
) -> Callable[Concatenate[Cosmos3Client, _P], BlockingIterator[_T]]:
    """Return the blocking twin of an asynchronous generator, with its parameters and docstring."""

    @functools.wraps(method)
    def call(self: Cosmos3Client, /, *args: _P.args, **kwargs: _P.kwargs) -> BlockingIterator[_T]:
        return BlockingIterator(self._thread, method(self._client, *args, **kwargs))

    # For ``help``, which otherwise shows what the generator's method returns.
    vars(call)["__signature__"] = inspect.signature(method).replace(return_annotation="BlockingIterator")
    return call


class Cosmos3Client:
    """A client of one app, for any number of threads; from :meth:`over_http` or :func:`deployments.client.connect`.

    Calls do and raise what those of :class:`~deployments.clients.asynchronous.AsyncCosmos3Client` do. An interrupt,
    Ctrl-C for example, stops the call. ``client``, which runs the calls, is owned by this client from now on.
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

    create = _make_blocking(AsyncCosmos3Client.create)
    remix = _make_blocking(AsyncCosmos3Client.remix)
    retrieve = _make_blocking(AsyncCosmos3Client.retrieve)
    list = _make_blocking(AsyncCosmos3Client.list)
    list_all = _make_blocking_iterator(AsyncCosmos3Client.list_all)
    cancel = _make_blocking(AsyncCosmos3Client.cancel)
    delete = _make_blocking(AsyncCosmos3Client.delete)
    models = _make_blocking(AsyncCosmos3Client.models)
    events = _make_blocking_iterator(AsyncCosmos3Client.events)
    wait = _make_blocking(AsyncCosmos3Client.wait)
    content = _make_blocking_iterator(AsyncCosmos3Client.content)
    save = _make_blocking(AsyncCosmos3Client.save)
    generate = _make_blocking(AsyncCosmos3Client.generate)

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


class _AsyncIterator(Protocol[_T_co]):
    """An asynchronous iterator that can be closed: a generator or a stream."""

    def __anext__(self) -> Awaitable[_T_co]: ...

    def aclose(self) -> Coroutine[Any, Any, None]: ...


class BlockingIterator(Generic[_T], Iterator[_T]):
    """An asynchronous generator as an iterator and context manager, which owns it: closing or dropping ends it."""

    def __init__(self, thread: LoopThread, items: _AsyncIterator[_T]) -> None:
        # Its loop closes a dropped generator: ``__del__`` must not wait for that. Attributes are dropped in this order,
        # so the loop still runs then.
        self._items = items
        self._thread = thread

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


class VideoStream(BlockingIterator[VideoEvent]):
    """The events of a video that is made for this caller: an :class:`AsyncVideoStream` as an iterator."""

    def __init__(self, thread: LoopThread, stream: AsyncVideoStream) -> None:
        super().__init__(thread, stream)
        self.video_id = stream.video_id
