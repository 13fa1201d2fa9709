"""A producer's side of a clip's stream: each chunk is made when there is a credit for it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

from cluster.envelope import TensorEnvelope
from deployments.messages import RequestContext
from deployments.on_device import within_memory
from deployments.streams import in_time


async def made_on_credit(
    context: RequestContext, clips: Any, stream_id: str, device: Any, make: Callable[[], TensorEnvelope | None]
) -> AsyncGenerator[tuple[int, TensorEnvelope], None]:
    """Chunks with their numbers, until there are none, or the stream was closed.

    Args:
        context: of the request.
        clips: the Director's :class:`cluster.clip_stream.ClipStreams`.
        stream_id: the clip's.
        device: that ``make`` works on.
        make: the next chunk, None after the last; called in a thread.

    Raises:
        DeadlineExceeded: the request's time is up.
        OutOfMemory: a chunk does not fit.
    """
    index = 0
    while await in_time(context, "decode", clips.acquire.remote(stream_id, context.remaining_s("decode"))):
        chunk = await asyncio.to_thread(within_memory, device, make)
        if chunk is None:
            # The clip's other producer may still need it.
            await in_time(context, "decode", clips.release.remote(stream_id))
            return
        yield index, chunk
        index += 1
