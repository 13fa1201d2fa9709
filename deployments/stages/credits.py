"""A producer's side of a clip's stream: each chunk is made when there is a credit for it."""

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
    """Chunks with their numbers, until there are none, or they are not wanted any more.

    The next one is begun, as soon as there is a credit for it, while this one is on its way.

    Args:
        context: of the request.
        clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
        stream_id: the clip's.
        producer: this one's name in it.
        make: the next chunk, None after the last.
        while_up: waits for a credit, and raises where the maker is gone before one comes.

    Raises:
        Exception: what ``make`` and ``while_up`` raise.
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
            # The clip's other producer may still need it.
            await wait_within(context, "decode", clips.drop.remote(stream_id, producer))
        return chunk

    index = 0
    making = asyncio.ensure_future(next_chunk())
    try:
        while (chunk := await making) is not None:
            making = asyncio.ensure_future(next_chunk())
            yield index, chunk
            del chunk  # its memory is the next one's
            index += 1
    finally:
        making.cancel()
        await asyncio.gather(making, return_exceptions=True)
