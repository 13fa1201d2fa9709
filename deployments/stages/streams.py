"""Following another deployment's stream. The one module that touches Serve's underscored API.

Serve's public generators fetch every item to whoever iterates. The Director must not: frames and latents pass through
it as references. ``_to_object_ref_gen`` gives those; it needs Serve's by-reference transport, which is the default.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from cluster.errors import DeadlineExceeded
from deployments.messages import RequestContext

T = TypeVar("T")


async def wait_within(context: RequestContext, stage: str, awaitable: Awaitable[T]) -> T:
    """Wait for something, no longer than the request has left.

    Raises:
        DeadlineExceeded: it did not come in time, by this clock or by the other side's.
    """
    try:
        # A time-out of zero still starts the wait, and ends it: what is never awaited would be left hanging.
        async with asyncio.timeout(max(0.0, context.deadline_s - time.monotonic())):
            return await awaitable
    except TimeoutError:
        raise DeadlineExceeded(stage, context.limit_s) from None


class RefStream:
    """The items of one streaming call, as object references.

    Args:
        response: what ``handle.method.remote(...)`` gave, with ``stream=True``.
        context: of the request; bounds every wait.
        stage: for messages.
    """

    def __init__(self, response: Any, context: RequestContext, stage: str) -> None:
        self._response = response
        self._context = context
        self._stage = stage
        self._refs: Any = None

    async def next_ref(self) -> Any:
        """The next item's reference, or None after the last one.

        Raises:
            DeadlineExceeded: the request's time is up.
            Exception: whatever the stage raised.
        """
        try:
            if self._refs is None:
                self._refs = await wait_within(self._context, self._stage, self._response._to_object_ref_gen())
            return await wait_within(self._context, self._stage, anext(self._refs))
        except StopAsyncIteration:
            return None

    async def next_value(self) -> Any:
        """The next item itself, or None after the last one. For small messages.

        Raises:
            Exception: as :meth:`next_ref`.
        """
        ref = await self.next_ref()
        return None if ref is None else await wait_within(self._context, self._stage, ref)

    def cancel(self) -> None:
        """Stop the producer. Dropping the response would let it run to its end."""
        self._response.cancel()


@asynccontextmanager
async def follow_stream(response: Any, context: RequestContext, stage: str) -> AsyncIterator[RefStream]:
    """A :class:`RefStream` that is cancelled when the block is left, however it is left."""
    stream = RefStream(response, context, stage)
    try:
        yield stream
    finally:
        stream.cancel()
