"""Blocking work in threads, periodic work, tasks that outlive their request, and the end of a replica."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import os
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

logger = logging.getLogger("ray.serve")

# Lets the failures reach their callers before the process exits.
_GRACE_S = 0.2

T = TypeVar("T")


async def run_in_thread(work: Callable[..., T], *arguments: object) -> T:
    """Run work as :func:`asyncio.to_thread` does, but let a cancellation wait for its end.

    A thread cannot be stopped, and the caller must not close what it still works on.
    """
    working = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        working.exception()  # marks it as retrieved, so that asyncio does not log it
        raise cancelled
    return working.result()


async def run_in_thread_or_exit(timeout_s: float, work: Callable[..., T], *arguments: object) -> T:
    """Run work as :func:`run_in_thread`; exit this process if it takes longer.

    A thread that hangs cannot be stopped. Serve then starts another replica, on which callers try again.
    """

    def give_up() -> None:
        logger.error("%s has not returned after %g s: this process exits", work, timeout_s)
        exit_soon()

    hanging = asyncio.get_running_loop().call_later(timeout_s, give_up)
    try:
        return await run_in_thread(work, *arguments)
    finally:
        hanging.cancel()


async def repeat_in_thread(work: Callable[[], object], period_s: float) -> None:
    """Run work in a thread, now and every ``period_s`` seconds; log what it raises."""
    while True:
        try:
            await run_in_thread(work)
        except Exception:  # such as an unreachable database: the next round tries again
            logger.exception("%s failed; it is tried again in %g s", work, period_s)
        await asyncio.sleep(period_s)


def start_task(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task that belongs to no request; the caller must keep a reference to it.

    Its context is empty: a task made in a request's context would be cancelled with the request.
    """
    return asyncio.get_running_loop().create_task(work, context=contextvars.Context())


def exit_soon() -> None:
    """Exit this process as soon as its failures have reached their callers. Serve then starts another replica."""
    asyncio.get_running_loop().call_later(_GRACE_S, os._exit, 1)
