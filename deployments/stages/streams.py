"""Streams between stages: follow one by reference, produce one on credit, wait within a deadline.

The only module that uses Serve's underscored API.

Serve's public generators copy every item to the iterating process. The Director only passes frames and latents on, so
it takes their references from ``_to_object_ref_gen``, which needs Serve's by-reference transport (the default).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from cluster.errors import DeadlineExceeded
from deployments.messages import RequestContext

T = TypeVar("T")


async def wait_within(context: RequestContext, stage: str, awaitable: Awaitable[T]) -> T:
    """Await something within the request's deadline; raise DeadlineExceeded on a timeout here or on the other side."""
    try:
        # Await it even with no time left: an unawaited coroutine would never be closed.
        async with asyncio.timeout(max(0.0, context.deadline_s - time.monotonic())):
            return await awaitable
    except TimeoutError:
        raise DeadlineExceeded(stage, context.limit_s) from None


class RefStream:
    """The items of one streaming call of a handle, as object references, within the request's deadline."""

    def __init__(self, response: Any, context: RequestContext, stage: str) -> None:
        self._response = response
        self._context = context
        self._stage = stage
        self._refs: Any = None

    async def next_ref(self) -> Any:
        """Return the next item's reference, or None after the last one; raise as the stage did."""
        try:
            if self._refs is None:
                self._refs = await wait_within(self._context, self._stage, self._response._to_object_ref_gen())
            return await wait_within(self._context, self._stage, anext(self._refs))
        except StopAsyncIteration:
            return None

    async def next_value(self) -> Any:
        """Return the next item itself, a small message, or None after the last one; raise as :meth:`next_ref`."""
        ref = await self.next_ref()
        return None if ref is None else await wait_within(self._context, self._stage, ref)

    def cancel(self) -> None:
        """Stop the producer, which would run to its end if the response were only dropped."""
        self._response.cancel()


@asynccontextmanager
async def follow_stream(response: Any, context: RequestContext, stage: str) -> AsyncIterator[RefStream]:
    """Open a :class:`RefStream`, and cancel it at the end of the block."""
    stream = RefStream(response, context, stage)
    try:
        yield stream
    finally:
        stream.cancel()


async def produce_on_credit(
    context: RequestContext,
    clips: Any,
    stream_id: str,
    producer: str,
    make: Callable[[], Awaitable[T | None]],
    wait_for_credit: Callable[[Awaitable[bool]], Awaitable[bool]] | None = None,
) -> AsyncGenerator[tuple[int, T], None]:
    """Yield chunks with their indices until ``make`` returns None or the stream is closed.

    While the consumer handles a chunk, the next one is made as soon as there is a credit for it.

    Args:
        clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
        producer: names this producer in the clip's stream.
        make: returns the next chunk, or None after the last one.
        wait_for_credit: waits, and raises if the gang fails first.
    """

    async def next_chunk() -> T | None:
        left_s = context.remaining_s("decode")
        acquired = clips.acquire.remote(stream_id, producer, left_s)
        if not await wait_within(context, "decode", acquired if wait_for_credit is None else wait_for_credit(acquired)):
            return None
        chunk = await wait_within(context, "decode", make())
        if chunk is None:
            # Ends this producer only: the clip's other producer continues.
            await wait_within(context, "decode", clips.return_credit.remote(stream_id, producer))
        return chunk

    index = 0
    making = asyncio.ensure_future(next_chunk())
    try:
        while (chunk := await making) is not None:
            making = asyncio.ensure_future(next_chunk())
            yield index, chunk
            del chunk  # frees its memory for the next chunk
            index += 1
    finally:
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
