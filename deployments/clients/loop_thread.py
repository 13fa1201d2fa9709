"""An event loop in a thread of its own, for callers without one.

anyio's blocking portal cannot replace it: there a cancelled call can await nothing more, so an interrupt would return
before its video is stopped; and closing the portal either cancels all calls at once or waits for them without a bound.
"""

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
# Longest time that an interrupt goes unnoticed: a signal just before a thread falls asleep does not wake it.
_NOTICE_S = 0.5


class LoopThread:
    """Runs coroutines for any number of threads. It ends when closed, when dropped, or with the process."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=_serve, args=(self._loop,), name="cosmos3-client", daemon=True)
        self._thread.start()
        self._stop = weakref.finalize(self, _stop, self._loop)

    @property
    def is_open(self) -> bool:
        """Whether it accepts work."""
        return self._stop.alive

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine and return its result. An interrupt cancels the coroutine and waits for its end.

        Raises:
            ClosedError: the thread was stopped before there was a result.
            Exception: of the coroutine.
        """
        if not self.is_open or threading.current_thread() is self._thread:
            work.close()
            raise ClosedError("the client is closed, or was called from its own event loop")
        # Not a queue.Queue: an interrupt between two of its lines would leave its lock held, and the loop hanging.
        ended: queue.SimpleQueue[asyncio.Task[T] | None] = queue.SimpleQueue()
        tasks: list[asyncio.Task[T]] = []

        def begin() -> None:
            tasks.append(self._loop.create_task(work))
            tasks[0].add_done_callback(end)

        def end(task: asyncio.Task[T]) -> None:
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
            # Twice soon, so that it runs after the task's first step wherever the interrupt came.
            self._loop.call_soon_threadsafe(self._loop.call_soon, cancel)
            with contextlib.suppress(queue.Empty):
                ended.get(timeout=_STOP_S)
            raise

    def close(self) -> None:
        """Stop when running work has ended, or was cancelled after a while. May be called twice."""
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
    """Wait for running tasks, such as those that ask the app to stop a video; cancel them after ``_STOP_S``."""
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
