"""Following another deployment's stream. The one module that touches Serve's underscored API.

Serve's public generators fetch every item to whoever iterates. The Director must not: frames and latents pass through
it as references. ``_to_object_ref_gen`` gives those; it needs Serve's by-reference transport, which is the default.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from cluster.errors import DeadlineExceeded
from deployments.messages import RequestContext


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
        limit_s = self._context.remaining_s(self._stage)
        try:
            async with asyncio.timeout(limit_s):
                if self._refs is None:
                    self._refs = await self._response._to_object_ref_gen()
                return await anext(self._refs)
        except StopAsyncIteration:
            return None
        except TimeoutError:
            raise DeadlineExceeded(self._stage, self._context.limit_s) from None

    async def next_value(self) -> Any:
        """The next item itself, or None after the last one. For small messages.

        Raises:
            Exception: as :meth:`next_ref`.
        """
        ref = await self.next_ref()
        return None if ref is None else await ref

    def cancel(self) -> None:
        """Stop the producer. Dropping the response would let it run to its end."""
        self._response.cancel()


@asynccontextmanager
async def following(response: Any, context: RequestContext, stage: str) -> AsyncIterator[RefStream]:
    """A :class:`RefStream` that is cancelled when the block is left, however it is left."""
    stream = RefStream(response, context, stage)
    try:
        yield stream
    finally:
        stream.cancel()
