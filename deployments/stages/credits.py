"""The producer's side of a clip's stream: it makes one chunk for each credit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, TypeVar

from deployments.messages import RequestContext
from deployments.stages.streams import wait_within

Chunk = TypeVar("Chunk")


async def produce_on_credit(
    context: RequestContext,
    clips: Any,
    stream_id: str,
    producer: str,
    make: Callable[[], Awaitable[Chunk | None]],
    while_up: Callable[[Awaitable[bool]], Awaitable[bool]] | None = None,
) -> AsyncGenerator[tuple[int, Chunk], None]:
    """Yield chunks with their indices until ``make`` returns None or the stream is closed.

    The next chunk is made, as soon as there is a credit for it, while the consumer handles this one.

    Args:
        context: of the request.
        clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
        stream_id: names the clip's stream.
        producer: names this producer in the stream.
        make: makes the next chunk; returns None after the last one.
        while_up: waits for a credit, and raises if the gang dies first.

    Raises:
        Exception: as ``make`` and ``while_up`` raise.
        DeadlineExceeded: the request's time is up.
        OutOfMemory: a chunk does not fit.
    """

    async def next_chunk() -> Chunk | None:
        left_s = context.remaining_s("decode")
        acquired = clips.acquire.remote(stream_id, producer, left_s)
        if not await wait_within(context, "decode", acquired if while_up is None else while_up(acquired)):
            return None
        chunk = await wait_within(context, "decode", make())
        if chunk is None:
            # Ends this producer only: the clip's other producer goes on.
            await wait_within(context, "decode", clips.drop.remote(stream_id, producer))
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
