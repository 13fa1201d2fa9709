"""A finished file as an HTTP answer, and the waiting for it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.responses import StreamingResponse

from cluster.errors import StageFailed
from deployments.messages import Finished, MediaPart

# Until the Director says that it has a request, or why not. A dead one is back within seconds.
_ACCEPT_S = 60.0
# Until the next part of a file that is there.
_PART_S = 60.0


async def finished(events: Any) -> Finished:
    """Follow a request to the event that the file's parts come after.

    Args:
        events: the Director's stream.

    Raises:
        StageFailed: the Director does not take the request.
        Exception: whatever the Director raised.
    """
    try:
        async with asyncio.timeout(_ACCEPT_S):
            await anext(events)  # Accepted, or why not; it comes at once from a Director that lives
    except TimeoutError:
        raise StageFailed("director", 1, f"no word of the request within {_ACCEPT_S:g} s") from None
    async for event in events:
        if isinstance(event, Finished):
            return event
    raise RuntimeError("the Director's stream ended before the file")


def media_answer(event: Finished, events: Any) -> StreamingResponse:
    """The answer that streams the file, with what is to be said about it in its headers."""
    headers = {
        "content-length": str(event.num_bytes),
        "x-seed": str(event.seed),
        "x-frames-sha256": event.frames_sha256,
        "x-negative-prompt": event.negative_origin,
        "x-inference-time-s": f"{event.stage_seconds['total']:.3f}",
        "x-stage-durations": json.dumps({name: round(value, 4) for name, value in event.stage_seconds.items()}),
        "x-notes": json.dumps(event.notes),
    }
    return StreamingResponse(_parts(events), media_type=event.media_type, headers=headers)


def cancel(events: Any) -> None:
    """Stop the stages. A stream that is only dropped runs on."""
    if events is not None:
        events.cancel()


async def _parts(events: Any) -> AsyncIterator[bytes]:
    try:
        while True:
            async with asyncio.timeout(_PART_S):
                event = await anext(events, None)
            if event is None:
                return
            if isinstance(event, MediaPart):
                yield event.data
    finally:
        cancel(events)
