"""Routes of generations: videos as jobs, with their events; videos and images for clients that wait."""

from __future__ import annotations

import asyncio
import io
import json
import re
import time
import zipfile
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated

from fastapi import Header, Query
from pydantic import Field
from starlette.responses import JSONResponse, Response

from cluster.errors import DeadlineExceeded
from cosmos3_core.errors import RequestError
from cosmos3_core.media.file_kinds import SUFFIXES
from deployments.api.bodies import ParsedBody
from deployments.api.body_reader import Reservation
from deployments.api.call import Call, CurrentCall, IdempotencyKey, RequestId, UnusedKey, VideoId, logger, make_router
from deployments.api.content import PartsResponse
from deployments.api.exchange import (
    ActionsAnswer,
    Base64,
    Exchange,
    answer_when_done,
    answer_while_growing,
    answer_with_file,
    await_acceptance,
    read_file,
    service_headers,
    to_base64,
)
from deployments.api.field_types import integer_type, text_type
from deployments.api.fields import B64_JSON, Endpoint, ImageBody, RemixBody, SyncBody, VideoBody
from deployments.api.openapi import ACCEPTED, POLLED, Responses, describe_body, describe_files, responses
from deployments.api_model import ApiModel
from deployments.errors import JobsError
from deployments.jobs.job import Job, JobEvent, SubmitOptions
from deployments.jobs.video import (
    MAX_PAGE,
    ORDERS,
    Count,
    JobId,
    Seconds,
    Video,
    VideoDeleted,
    VideoPage,
    poll_after_ms,
)
from deployments.media.store import MediaStore
from deployments.messages import Finished, round_seconds

_PAGE = 20
_LIMIT = replace(integer_type("videos in the page", 0, MAX_PAGE), takes_text=True)
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

router = make_router()


class Image(ApiModel):
    """One of several images."""

    id: JobId
    b64_json: Base64
    url: None = None
    revised_prompt: None = None
    seed: Count
    frames_sha256: str


class ImageMetrics(ApiModel):
    """Durations of the images."""

    stage_durations: Mapping[str, Seconds]


class Images(ApiModel):
    """Images that were made while the client waited."""

    created: Count
    data: tuple[Image, ...]
    output_format: str
    size: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9]+x[0-9]+$"})]
    metrics: ImageMetrics


@router.post(Endpoint.VIDEOS, responses=responses(ACCEPTED, has_body=True), openapi_extra=describe_body(VideoBody))
async def create_video(
    call: CurrentCall, response: Response, idempotency_key: IdempotencyKey = None, request_id: RequestId = None
) -> Video:
    """Accept a request as a job, which keeps running when its caller disconnects."""
    with call.service.body_memory.reserve() as reserved:
        body = await call.read_body(VideoBody, reserved)
        (generation,) = body.requests
        options = call.complete_options(body.options, request_id, idempotency_key)
        submission = call.service.director.submit.remote(generation, options)
        has_clip, origins = generation.video is not None, body.origins
        del body, generation
        with origins.restore_names():
            job: Job = await await_acceptance(submission, submission.cancel, has_clip=has_clip)
    return await _video(call, job, response)


@router.post(
    Endpoint.SYNC,
    responses=responses({200: describe_files(ActionsAnswer)}, has_body=True),
    openapi_extra=describe_body(SyncBody),
)
async def create_video_and_wait(
    call: CurrentCall, unused_key: UnusedKey = None, request_id: RequestId = None
) -> Response:
    """Generate and answer with the file, or with JSON where actions are generated.

    Leaving stops it.
    """
    service = call.service
    async with Exchange.open(service.streaming, request_id, service.http.request_timeout_s) as exchange:
        with service.body_memory.reserve() as reserved:
            body = await call.read_body(SyncBody, reserved)
            is_live = body.fields.stream
            options = call.complete_options(body.options, exchange.request_id, unused_key=unused_key)
            with body.origins.restore_names():
                await exchange.submit(body.requests[0], options)
            del body
        if is_live:
            answer = await answer_while_growing(exchange, service.jobs.media)
        else:
            with service.body_memory.reserve() as reserved:  # the request's body is gone
                answer = await answer_when_done(exchange, reserved, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, options.warnings))
        return answer


@router.get(Endpoint.VIDEOS, responses=responses({}))
async def list_videos(
    call: CurrentCall,
    response: Response,
    after: Annotated[str | None, Query(description="the last one of the page before")] = None,
    limit: Annotated[int, _LIMIT] = _PAGE,
    order: Annotated[str, text_type("by the time of acceptance", *ORDERS)] = "desc",
) -> VideoPage:
    """List the caller's jobs, in pages."""
    response.headers["cache-control"] = "no-store"
    return await call.service.jobs.list(call.caller.owner, after, limit, order)


@router.get("/v1/videos/{video_id}", responses=responses(POLLED, 404))
async def get_video(video_id: VideoId, call: CurrentCall, response: Response) -> Video:
    """Return a job as it stands; one that has failed as well."""
    return await _video(call, await call.service.jobs.get(video_id, call.caller.owner), response)


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


@router.post("/v1/videos/{video_id}/cancel", responses=responses(POLLED, 404))
async def cancel_video(video_id: VideoId, call: CurrentCall, response: Response) -> Video:
    """Stop a job, which then has failed with the code cancelled; one that has ended stays as it is."""
    return await _video(call, await call.service.jobs.cancel(video_id, call.caller.owner), response)


@router.delete("/v1/videos/{video_id}", responses=responses({}, 404))
async def delete_video(video_id: VideoId, call: CurrentCall, response: Response) -> VideoDeleted:
    """Stop and forget a job, its files too."""
    response.headers["cache-control"] = "no-store"
    return await call.service.jobs.delete(video_id, call.caller.owner)


@router.post(
    "/v1/videos/{video_id}/remix",
    responses=responses(ACCEPTED, 404, has_body=True),
    openapi_extra=describe_body(RemixBody),
)
async def remix_video(
    video_id: VideoId,
    call: CurrentCall,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    request_id: RequestId = None,
) -> Video:
    """Accept an earlier job's request again, with the same seed and fields and another prompt."""
    with call.service.body_memory.reserve() as reserved:
        prompt = (await call.read_fields(RemixBody, reserved)).check().prompt
    options = call.complete_options(SubmitOptions(service_class=call.caller.service_class), request_id, idempotency_key)
    submission = call.service.director.remix.remote(video_id, prompt, options)
    job: Job = await await_acceptance(submission, submission.cancel, has_clip=True)  # of the earlier job, perhaps
    return await _video(call, job, response)


async def _video(call: Call, job: Job, response: Response) -> Video:
    video = await call.service.jobs.describe(job)
    response.headers["cache-control"] = "no-store"
    if not job.state.is_final:
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(video.eta_s))
    return video


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


@router.post(
    Endpoint.IMAGES,
    responses=responses({200: describe_files(Images, "application/zip")}, has_body=True),
    openapi_extra=describe_body(ImageBody),
)
async def create_images(call: CurrentCall, unused_key: UnusedKey = None, request_id: RequestId = None) -> Response:
    """Make n images from a prompt, one after the other; image i has the seed + i."""
    service = call.service
    async with Exchange.open(service.streaming, request_id, service.http.request_timeout_s) as exchange:
        with service.body_memory.reserve() as reserved:
            body = await call.read_body(ImageBody, reserved)
            options = call.complete_options(body.options, exchange.request_id, unused_key=unused_key)
            with body.origins.restore_names():
                await exchange.submit(body.requests[0], options)
        with service.body_memory.reserve() as reserved:
            answer = await answer_with_images(exchange, body, options, reserved, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, options.warnings))
        return answer


async def answer_with_images(
    exchange: Exchange, body: ParsedBody[ImageBody], options: SubmitOptions, reserved: Reservation, media: MediaStore
) -> Response:
    """Answer with the images of a body; the Director already works on the first."""
    is_json = body.fields.response_format == B64_JSON
    event = await exchange.wait_for_end()
    if not is_json and len(body.requests) == 1:
        exchange.cancel()
        return await answer_with_file(event, media)
    made = [(event, await read_file(event, reserved, media))]
    for request in body.requests[1:]:
        event = await exchange.submit_next(request, options)
        made.append((event, await read_file(event, reserved, media)))
    exchange.cancel()
    stages = dict.fromkeys(stage for event, _ in made for stage in event.stage_seconds)
    stage_durations = round_seconds({it: sum(event.stage_seconds.get(it, 0.0) for event, _ in made) for it in stages})
    if not is_json:
        seeds = ",".join(str(event.seed) for event, _ in made)
        headers = {"x-seed": seeds, "x-stage-durations": json.dumps(stage_durations)}
        return Response(_zip(made), media_type="application/zip", headers=headers)
    answer = Images(
        created=int(time.time()),
        data=tuple(
            Image(id=event.job_id, b64_json=to_base64(data), seed=event.seed, frames_sha256=event.frames_sha256)
            for event, data in made
        ),
        output_format=body.fields.output_format,
        size=f"{event.width}x{event.height}",
        metrics=ImageMetrics(stage_durations=stage_durations),
    )
    return JSONResponse(answer.as_json())


def _zip(made: Sequence[tuple[Finished, bytes]]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:  # images are compressed already
        for index, (event, data) in enumerate(made):
            archive.writestr(f"{index}{SUFFIXES[event.media_type]}", data)
    return file.getvalue()
