"""Routes of videos: create, wait, list, get, cancel, delete, remix."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

from fastapi import Query
from starlette.responses import Response

from cluster.errors import StageFailed
from deployments.api.call import Call, CurrentCall, IdempotencyKey, NoReplay, RequestId, VideoId, new_router
from deployments.api.exchange import Exchange, accept, accept_limit_s
from deployments.api.field_types import integer_type, text_type
from deployments.api.fields import Endpoint, RemixBody, SyncBody, VideoBody
from deployments.api.media_answer import ActionsAnswer, live_answer, media_answer, service_headers
from deployments.api.openapi import ACCEPTED, POLLED, describe_files, responses, takes
from deployments.jobs.job import Job, SubmitOptions
from deployments.jobs.service import MAX_PAGE, ORDERS
from deployments.jobs.video import Video, VideoDeleted, VideoPage, poll_after_ms

_PAGE = 20
_LIMIT = replace(integer_type("videos in the page", 0, MAX_PAGE), takes_text=True)

router = new_router()


@router.post(Endpoint.VIDEOS, responses=responses(ACCEPTED, has_body=True), openapi_extra=takes(VideoBody))
async def create_video(
    call: CurrentCall, response: Response, idempotency_key: IdempotencyKey = None, request_id: RequestId = None
) -> Video:
    """Accept a request as a job, which keeps running when its caller disconnects."""
    with call.service.room.hold() as reserved:
        body = await call.body(VideoBody, reserved)
        (generation,) = body.requests
        options = call.options(body.options, request_id, idempotency_key)
        submission = call.service.director.submit.remote(generation, options)
        limit_s, origins = accept_limit_s(generation), body.origins
        del body, generation
        with origins.restore_names():
            job = await _wait_for_job(submission, limit_s)
    return await _video(call, job, response)


@router.post(
    Endpoint.SYNC,
    responses=responses({200: describe_files(ActionsAnswer)}, has_body=True),
    openapi_extra=takes(SyncBody),
)
async def create_video_and_wait(
    call: CurrentCall, no_replay: NoReplay = None, request_id: RequestId = None
) -> Response:
    """Generate and answer with the file, or with JSON where actions are generated.

    Leaving stops it.
    """
    service = call.service
    async with Exchange.open(service.streaming, request_id, service.http.request_timeout_s) as exchange:
        with service.room.hold() as reserved:
            body = await call.body(SyncBody, reserved)
            is_live = body.fields.stream
            options = call.options(body.options, exchange.request_id, no_replay=no_replay)
            with body.origins.restore_names():
                await exchange.submit(body.requests[0], options)
            del body
        if is_live:
            answer = await live_answer(exchange, service.jobs.media)
        else:
            with service.room.hold() as reserved:  # the request's body is gone
                answer = await media_answer(exchange, reserved, service.jobs.media)
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
        prompt = (await call.fields(RemixBody, reserved)).check().prompt
    options = call.options(SubmitOptions(service_class=call.caller.service_class), request_id, idempotency_key)
    submission = call.service.director.remix.remote(video_id, prompt, options)
    return await _video(call, await _wait_for_job(submission, accept_limit_s(None)), response)


async def _wait_for_job(submission: Any, limit_s: float) -> Job:
    try:
        job: Job = await accept(submission, limit_s)
        return job
    except StageFailed:
        submission.cancel()
        raise


async def _video(call: Call, job: Job, response: Response) -> Video:
    video = await call.service.jobs.describe(job)
    response.headers["cache-control"] = "no-store"
    if not job.state.is_final:
        response.headers["openai-poll-after-ms"] = str(poll_after_ms(video.eta_s))
    return video
