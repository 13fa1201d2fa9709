"""An event loop in a thread of its own, for callers that have none."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Coroutine
from typing import Any, TypeVar

from cosmos3_core.errors import ClosedError

T = TypeVar("T")

_STOP_S = 10.0
# A signal that comes just before a thread falls asleep does not wake it: how long an interrupt may go unnoticed.
_NOTICE_S = 0.5


class LoopThread:
    """Runs coroutines for any number of threads. Ends when it is closed, when nobody holds it, or with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="cosmos3-client", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._loop)

    @property
    def is_open(self) -> bool:
        """Whether it still runs what it is given."""
        return self._stop.alive

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run it and wait for its result. Where the wait is interrupted it is cancelled, and its end is waited for.

        Raises:
            ClosedError: the thread has been stopped, or is before there is a result.
            Exception: whatever it raises.
        """
        if not self.is_open or threading.current_thread() is self._thread:
            work.close()
            raise ClosedError("the client is closed, or was called from its own event loop")
        # Not a lock of Python's own: an interrupt between two of its lines would leave it held, and the loop hanging.
        ended: queue.SimpleQueue[asyncio.Task[T] | None] = queue.SimpleQueue()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
            if not task.cancelled():
                task.exception()  # or it would be reported as one that nobody asked for
            ended.put(task)

        def cancel() -> None:
            if not tasks:
                work.close()  # the interrupt came before it was handed over
            elif tasks[0].cancel():
                return
            ended.put(None)  # nobody else says so, or not again

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
            # Behind the task's first step, wherever between two lines the interrupt came.
            self._loop.call_soon_threadsafe(self._loop.call_soon, cancel)
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=_STOP_S)
            raise

    def close(self) -> None:
        """Stop, when what still runs has ended or was cancelled. May be called twice."""
        self._stop()
        if threading.current_thread() is not self._thread:
            self._thread.join(2 * _STOP_S)


def _serve(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    try:
        loop.run_forever()
        loop.run_until_complete(_settle())
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(loop.shutdown_default_executor())
    finally:
        loop.close()


async def _settle() -> None:
    """Let what was begun come to its end: who has been left is told so."""
    await asyncio.sleep(0)  # what was scheduled last is a task then
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
