"""Routes of videos: create, wait, list, get, cancel, delete, remix."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import Response

from cluster.errors import StageFailed
from deployments.api.answers import ActionsAnswer
from deployments.api.bodies import parse
from deployments.api.body_limit import read_fields
from deployments.api.call import Call, CurrentCall, IdempotencyKey, NoReplay, RequestId, VideoId, routes
from deployments.api.exchange import Exchange, accept_limit_s, answered
from deployments.api.field_types import integer_type, text_type
from deployments.api.fields import Endpoint, RemixBody, SyncBody, VideoBody
from deployments.api.media_answer import all_warnings, live_answer, media_answer, service_headers
from deployments.api.openapi import ACCEPTED, POLLED, made_files, responses, takes
from deployments.jobs.job import Job, SubmitOptions
from deployments.jobs.service import MAX_PAGE
from deployments.jobs.video import Video, VideoDeleted, VideoPage, poll_after_ms

_PAGE = 20
_LIMIT = replace(integer_type("videos in the page", 0, MAX_PAGE), is_text_too=True)

router = routes()


@router.post(Endpoint.VIDEOS, responses=responses(ACCEPTED, has_body=True), openapi_extra=takes(VideoBody))
async def create_video(
    call: CurrentCall, response: Response, idempotency_key: IdempotencyKey = None, request_id: RequestId = None
) -> Video:
    """Accept a request as a job, which runs whatever its caller does."""
    with call.service.room.hold() as reserved:
        body = await call.body(VideoBody, reserved)
        (generation,) = body.requests
        submitted = call.service.director.submit.remote(
            generation, call.options(body.options, request_id, idempotency_key)
        )
        limit_s, origins = accept_limit_s(generation), body.origins
        del body, generation
        with origins.restored():
            job = await _accepted(submitted, limit_s)
    return await _video(call, job, response)


@router.post(
    Endpoint.SYNC,
    responses=responses({200: made_files(ActionsAnswer)}, has_body=True),
    openapi_extra=takes(SyncBody),
)
async def create_video_and_wait(
    call: CurrentCall, no_replay: NoReplay = None, request_id: RequestId = None
) -> Response:
    """Make what is asked for and answer with it: the file, or JSON where actions are generated.

    Leaving stops it.
    """
    service = call.service

    async def work(exchange: Exchange) -> Response:
        with service.room.hold() as reserved:
            body = await call.body(SyncBody, reserved)
            is_live, warnings = body.fields.stream, all_warnings(no_replay, body.options)
            options = call.options(replace(body.options, warnings=warnings), exchange.request_id)
            with body.origins.restored():
                await exchange.ask(body.requests[0], options)
            del body
        if is_live:
            answer = await live_answer(exchange, service.jobs.media)
        else:
            with service.room.hold() as reserved:  # the request's body is gone
                answer = await media_answer(exchange, reserved, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, warnings))
        return answer

    return await answered(service.streaming, request_id, service.http.request_timeout_s, work)


@router.get(Endpoint.VIDEOS, responses=responses({}))
async def list_videos(
    call: CurrentCall,
    response: Response,
    after: Annotated[str | None, Query(description="the last one of the page before")] = None,
    limit: Annotated[int, _LIMIT] = _PAGE,
    order: Annotated[str, text_type("by the time of acceptance", "asc", "desc")] = "desc",
) -> VideoPage:
    """List the caller's jobs, in pages."""
    response.headers["cache-control"] = "no-store"
    return await call.service.jobs.list(call.caller.owner, after, limit, order)


@router.get("/v1/videos/{video_id}", responses=responses(POLLED, 404))
async def get_video(video_id: VideoId, call: CurrentCall, response: Response) -> Video:
    """Return a job as it stands; one that has failed as well."""
    return await _video(call, await call.job(video_id), response)


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
    "/v1/videos/{video_id}/remix", responses=responses(ACCEPTED, 404, has_body=True), openapi_extra=takes(RemixBody)
)
async def remix_video(
    video_id: VideoId,
    call: CurrentCall,
    response: Response,
    idempotency_key: IdempotencyKey = None,
    request_id: RequestId = None,
) -> Video:
    """Accept an earlier job's request again, with the same seed and fields and another prompt."""
    with call.service.room.hold() as reserved:
        fields = await read_fields(call.request, call.service.http.max_body_bytes, reserved)
        prompt = parse(RemixBody, fields).prompt
    options = call.options(SubmitOptions(service_class=call.caller.service_class), request_id, idempotency_key)
    submitted = call.service.director.remix.remote(video_id, prompt, options)
    return await _video(call, await _accepted(submitted, accept_limit_s(None)), response)


async def _accepted(response: Any, limit_s: float) -> Job:
    """Wait for the job that the Director makes of a request.

    Raises:
        StageFailed: no word of it.
        Exception: why it makes none.
    """
    try:
        async with asyncio.timeout(limit_s):
            job: Job = await response
            return job
    except TimeoutError:
        response.cancel()
        raise StageFailed("director", 1, f"no word of the request within {limit_s:g} s") from None


async def _video(call: Call, job: Job, response: Response) -> Video:
    video = await call.service.jobs.video(job)
    response.headers["cache-control"] = "no-store"
    if not job.state.is_final:
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(video.eta_s))
    return video
