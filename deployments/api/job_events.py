"""Route of a job's events as server-sent events: its history, then what comes, to the end."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncGenerator
from typing import Annotated

from fastapi import Header
from starlette.responses import Response

from cluster.errors import DeadlineExceeded
from cosmos3_core.errors import RequestError
from deployments.api.call import CurrentCall, VideoId, logger, new_router
from deployments.api.content import PartsResponse
from deployments.api.openapi import Responses, responses
from deployments.errors import JobsError
from deployments.jobs.job import JobEvent

# Proxies close a connection that is silent for longer.
_KEEP_ALIVE_S = 15.0
# Then the client reconnects, with the number of its last event.
_LONGEST_S = 3600.0
_COME_BACK_MS = 2000
_LastEventId = Annotated[
    str,
    Header(alias="Last-Event-ID", description="begin behind this one", json_schema_extra={"pattern": "^[0-9]{0,18}$"}),
]
_ANSWERS: Responses = {
    200: {"description": "events", "content": {"text/event-stream": {"schema": {"type": "string"}}}},
    204: {"description": "the client has the last one"},
}

router = new_router()


@router.get("/v1/videos/{video_id}/events", responses=responses(_ANSWERS, 404), response_class=Response)
async def follow_video(video_id: VideoId, call: CurrentCall, last_event_id: _LastEventId = "") -> Response:
    """Send a job's events from the one behind ``Last-Event-ID`` on, as server-sent events.

    queued {position, eta_s}, started {attempt}, step {step, num_steps, sigma, eta_s, step_s, pid},
    preview {step, sigma, media_type, b64_json}, previews_off {reason}, file {media_type}: the content can be read,
    decoding {chunk, num_frames}, retried {stage, attempt, from_step}; and as the last one completed, failed or
    cancelled with the whole video, or deleted. Those with an id are history, which Last-Event-ID goes on with.
    """
    if not re.fullmatch("[0-9]{0,18}", last_event_id):
        raise RequestError("Last-Event-ID", last_event_id[:100], "the id of an event")
    after = int(last_event_id or 0)
    job = await call.service.jobs.get(video_id, call.caller.owner)
    if job.state.is_final and after >= job.last_seq:
        return Response(status_code=204)  # by the standard, a client that gets this does not reconnect
    events = call.service.jobs.follow(job, after, _LONGEST_S)
    coming = asyncio.ensure_future(anext(events, None))
    await asyncio.wait((coming,), timeout=0)
    if coming.done() and coming.exception() is not None:
        coming.result()  # raises a refusal before anything is sent
    headers = {"cache-control": "no-store", "x-accel-buffering": "no"}
    return PartsResponse(_lines(events, coming), headers, "text/event-stream", on_end=coming.cancel)


async def _lines(
    events: AsyncGenerator[JobEvent, None], coming: asyncio.Future[JobEvent | None]
) -> AsyncGenerator[bytes, None]:
    """Yield events as they are sent, first the one that is ``coming``; one outside of the history has no id."""
    yield f"retry: {_COME_BACK_MS}\n\n".encode()
    try:
        while True:
            await asyncio.wait((coming,), timeout=_KEEP_ALIVE_S)
            if not coming.done():
                yield b": keep-alive\n\n"
                continue
            if (event := coming.result()) is None:
                break
            number = f"id: {event.seq}\n" if event.seq else ""
            yield f"{number}event: {event.kind}\ndata: {json.dumps(event.data)}\n\n".encode()
            coming = asyncio.ensure_future(anext(events, None))
    except DeadlineExceeded:
        return
    except JobsError:  # the client reconnects
        logger.exception("a follower of a job was sent away")
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await events.aclose()
