"""Ray's references and actors and Serve's handles in one process and one event loop, as far as the product uses them.

What crosses a process boundary on Ray is pickled here too: nobody shares an object with its caller, arrays arrive
read-only, and what cannot be pickled fails.
"""

from __future__ import annotations

import asyncio
import contextvars
import io
import os
import pickle
import threading
from collections import Counter
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from ray.serve.exceptions import BackPressureError

from cluster.rank import Rank, RankInfo


class Loop:
    """An event loop in a thread; other threads and loops can wait for what it runs."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="app", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        """Start a coroutine in its own context, as another process would."""
        return contextvars.Context().run(asyncio.run_coroutine_threadsafe, work, self._loop)

    def run(self, work: Coroutine[Any, Any, Any], timeout_s: float) -> Any:
        """Run a coroutine and wait for its result in another thread."""
        return self.start(work).result(timeout_s)

    def close(self) -> None:
        """Cancel what still runs, and end the thread."""
        self.run(self._cancel_all(), timeout_s=60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(60)
        self._loop.close()

    async def _cancel_all(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._loop.shutdown_asyncgens()
        await self._loop.shutdown_default_executor()


class _Pickler(pickle.Pickler):
    """Passes references and handles on as they are."""

    def __init__(self, *arguments: Any, passed: list[Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._passed = passed

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Ref | Actor | Handle | _application_type()):
            return None
        self._passed.append(value)
        return len(self._passed) - 1


def _application_type() -> type:
    from ray.serve import Application

    return Application


@dataclass(frozen=True)
class Packed:
    """A value on its way to another process: each :meth:`unpack` makes a new one."""

    data: bytes
    buffers: tuple[bytes, ...]
    passed: tuple[Any, ...]

    @classmethod
    def of(cls, value: Any) -> Packed:
        stream, passed, buffers = io.BytesIO(), [], []  # type: ignore[var-annotated]
        _Pickler(stream, protocol=5, buffer_callback=buffers.append, passed=passed).dump(value)
        return cls(stream.getvalue(), tuple(bytes(buffer.raw()) for buffer in buffers), tuple(passed))

    def unpack(self, as_passed: Callable[[Any], Any] = lambda value: value) -> Any:
        unpickler = pickle.Unpickler(io.BytesIO(self.data), buffers=self.buffers)
        unpickler.persistent_load = lambda index: as_passed(self.passed[index])  # type: ignore[method-assign]
        return unpickler.load()


class Ref:
    """A reference to a value, or to the error that came in its place."""

    def __init__(self, packed: Future[Packed]) -> None:
        self._packed = packed

    @classmethod
    def of(cls, value: Any) -> Ref:
        packed: Future[Packed] = Future()
        packed.set_result(Packed.of(value))
        return cls(packed)

    @classmethod
    def of_error(cls, error: BaseException) -> Ref:
        packed: Future[Packed] = Future()
        packed.set_exception(error)
        return cls(packed)

    def __await__(self) -> Any:
        return self._value().__await__()

    async def _value(self) -> Any:
        try:
            # A waiter that leaves does not stop the work.
            return (await asyncio.shield(asyncio.wrap_future(self._packed))).unpack()
        except Exception as error:
            raise Packed.of(error).unpack() from error


async def resolve(packed: Packed) -> list[Any]:
    """Arguments as the other side gets them: references that stand alone are replaced by their values."""
    return [await it if isinstance(it, Ref) else it for it in packed.unpack()]


@dataclass(frozen=True)
class Method:
    """``handle.method`` and ``actor.method``."""

    call: Callable[..., Any]

    def remote(self, *arguments: Any) -> Any:
        return self.call(*arguments)


@dataclass(frozen=True)
class ActorMethod(Method):
    """``actor.method``, which a concurrency group calls beside others."""

    beside: Method

    def options(self, *, concurrency_group: str) -> Method:
        assert concurrency_group
        return self.beside


class Actor:
    """An actor: an asynchronous one answers in the event loop, another one in its one thread, call after call.

    Calls in a concurrency group have a second thread.
    """

    def __init__(self, loop: Loop, body: Any, is_async: bool) -> None:
        self._loop, self._body, self._is_async = loop, body, is_async
        self._thread, self._second_thread = (
            ThreadPoolExecutor(1, thread_name_prefix=type(body).__name__) for _ in range(2)
        )

    def __getattr__(self, name: str) -> ActorMethod:
        if name.startswith("_"):
            raise AttributeError(name)

        def call_in(thread: ThreadPoolExecutor) -> Callable[..., Ref]:
            return lambda *arguments: Ref(self._loop.start(self._answer(name, Packed.of(arguments), thread)))

        return ActorMethod(call_in(self._thread), Method(call_in(self._second_thread)))

    async def _answer(self, name: str, arguments: Packed, thread: ThreadPoolExecutor) -> Packed:
        method, given = getattr(self._body, name), await resolve(arguments)
        if self._is_async:
            return Packed.of(await method(*given))
        return await asyncio.wrap_future(thread.submit(lambda: Packed.of(method(*given))))

    def hold(self, until: threading.Event) -> threading.Event:
        """Do nothing after the current call; return an event that is set from then on."""
        begun = threading.Event()
        self._thread.submit(lambda: (begun.set(), until.wait()))
        return begun

    def stop(self) -> None:
        for thread in (self._thread, self._second_thread):
            thread.shutdown(cancel_futures=True)


class _RankHere:
    """A rank in this process, whose log is the caller's."""

    _rank: int

    def log_to_stderr(self) -> None:
        pass

    def describe(self) -> RankInfo:
        return RankInfo(self._rank, os.getpid(), "here")


class LocalRay:
    """Replaces ``ray`` in :mod:`cluster`."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self._actors: list[Actor] = []

    def remote(self, body: type | None = None, *, concurrency_groups: dict[str, int] | None = None) -> Any:
        if body is None:
            assert concurrency_groups is not None
            return self.remote
        if issubclass(body, Rank):
            body = type(body.__name__, (_RankHere, body), {})
        is_async = any(asyncio.iscoroutinefunction(member) for member in vars(body).values())

        def make(*arguments: Any) -> Actor:
            self._actors.append(Actor(self._loop, body(*Packed.of(arguments).unpack()), is_async))
            return self._actors[-1]

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=make))

    def put(self, value: Any) -> Ref:
        return Ref.of(value)

    def kill(self, actor: Actor) -> None:
        actor.stop()

    def get_runtime_context(self) -> Any:
        return SimpleNamespace(get_node_id=lambda: "here")

    def close(self) -> None:
        for actor in self._actors:
            actor.stop()


class Deployment:
    """A deployment's replicas, each of them an object, and the bounds of their queues.

    Args:
        loop: that runs them.
        replicas: as many as there are.
        max_ongoing: calls of one replica at a time.
        max_queued: calls that wait for a replica, -1 for any number.
    """

    def __init__(self, loop: Loop, replicas: list[Any], max_ongoing: int, max_queued: int) -> None:
        self.loop, self.replicas = loop, replicas
        self._places = asyncio.Semaphore(max_ongoing * len(replicas))
        self._max_queued, self._num_queued = max_queued, 0
        self._num_ongoing: Counter[int] = Counter()

    @asynccontextmanager
    async def replica(self) -> AsyncIterator[Any]:
        """Take the replica with the fewest calls for one call."""
        if self._places.locked() and 0 <= self._max_queued <= self._num_queued:
            raise BackPressureError(num_queued_requests=self._num_queued, max_queued_requests=self._max_queued)
        self._num_queued += 1
        try:
            await self._places.acquire()
        finally:
            self._num_queued -= 1
        index = min(range(len(self.replicas)), key=lambda it: self._num_ongoing[it])
        self._num_ongoing[index] += 1
        try:
            yield self.replicas[index]
        finally:
            self._num_ongoing[index] -= 1
            self._places.release()


class Handle:
    """The handle of a deployment."""

    def __init__(self, deployment: Deployment, *, is_streaming: bool = False) -> None:
        self._deployment, self._is_streaming = deployment, is_streaming

    def options(self, *, stream: bool) -> Handle:
        return Handle(self._deployment, is_streaming=stream)

    def __getattr__(self, name: str) -> Method:
        if name.startswith("_"):
            raise AttributeError(name)
        kind = StreamResponse if self._is_streaming else Response
        return Method(lambda *arguments: kind(self._deployment, name, arguments))


class Response:
    """The answer of a call that answers once."""

    def __init__(self, deployment: Deployment, name: str, arguments: tuple[Any, ...]) -> None:
        self._answer = deployment.loop.start(self._answer_call(deployment, name, Packed.of(arguments)))

    @staticmethod
    async def _answer_call(deployment: Deployment, name: str, arguments: Packed) -> Packed:
        async with deployment.replica() as replica:
            return Packed.of(await getattr(replica, name)(*await resolve(arguments)))

    def __await__(self) -> Any:
        return Ref(self._answer).__await__()

    def cancel(self) -> None:
        self._answer.cancel()


class StreamResponse:
    """The items of a streaming call. As with Serve, the producer does not wait for its reader."""

    def __init__(self, deployment: Deployment, name: str, arguments: tuple[Any, ...]) -> None:
        self._loop = deployment.loop
        self._refs: asyncio.Queue[Ref | None] = asyncio.Queue()
        self._work = self._loop.start(self._produce(deployment, name, Packed.of(arguments)))

    async def _produce(self, deployment: Deployment, name: str, arguments: Packed) -> None:
        try:
            async with deployment.replica() as replica:
                items = getattr(replica, name)(*await resolve(arguments))
                async with aclosing(items):
                    async for item in items:
                        self._refs.put_nowait(Ref.of(item))
        except BaseException as error:
            self._refs.put_nowait(Ref.of_error(error))
            raise
        finally:
            self._refs.put_nowait(None)

    async def _to_object_ref_gen(self) -> AsyncIterator[Ref]:
        return self._each_ref()

    async def _each_ref(self) -> AsyncIterator[Ref]:
        while (ref := await self._next_ref()) is not None:
            yield ref

    def __aiter__(self) -> StreamResponse:
        return self

    async def __anext__(self) -> Any:
        if (ref := await self._next_ref()) is None:
            raise StopAsyncIteration
        return await ref

    async def _next_ref(self) -> Ref | None:
        return await asyncio.wrap_future(self._loop.start(self._refs.get()))

    def cancel(self) -> None:
        self._work.cancel()
