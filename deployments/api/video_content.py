"""Route of what a job has made: its file, whole or as it grows, pictures and sound of it, its actions."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import Mapping

from starlette.requests import Request
from starlette.responses import Response

from cosmos3_core import checks
from deployments.api.call import Call, routes
from deployments.api.content import Conditions, content_answer, finished_answer, found_record, not_ready
from deployments.api.errors import error_response
from deployments.errors import ApiError
from deployments.jobs.job import Job, JobState
from deployments.jobs.video import retry_after_s
from deployments.media.record import DONE
from deployments.media.store import MediaStore
from deployments.media.variants import ACTION, CONTENT_VARIANTS, VIDEO, made_variant

router = routes()


@router.api_route("/v1/videos/{video_id}/content", methods=["GET", "HEAD"])
async def get_content(video_id: str, request: Request) -> Response:
    """What a job has made; the file from its first fragment on."""
    call = Call.of(request, "variant")
    variant = checks.choice("variant", call.query.get("variant", VIDEO), CONTENT_VARIANTS)
    job = await call.job(video_id)
    if job.state in (JobState.FAILED, JobState.CANCELLED):
        raise ApiError(410, "media_failed", "there is no file: the job has failed or was cancelled")
    if variant == ACTION:
        return await _actions(call, job)
    if job.state is JobState.COMPLETED and not job.media_id:
        raise ApiError(404, "no_such_variant", "this job has made actions alone; variant=action has them")
    if not job.media_id or (variant != VIDEO and job.state is not JobState.COMPLETED):
        raise await _not_ready(call, job)
    media, headers = call.service.media, request.headers
    if variant == VIDEO:
        answer = await content_answer(media, job.media_id, request.method, headers)
    else:
        answer = await variant_answer(media, job.media_id, variant, request.method, headers)
    if answer.status_code in (404, 410) and not job.state.is_final:
        raise await _not_ready(call, job)  # what has failed is an earlier try's file
    if answer.status_code == 404 and await _is_gone(call, job):
        return error_response(ApiError(410, "media_expired", "the file of this job is not kept any more"))
    return answer


async def _actions(call: Call, job: Job) -> Response:
    if job.state is not JobState.COMPLETED:
        raise await _not_ready(call, job)
    told = await call.service.objects.of(job)
    if told["action"] is None:
        raise ApiError(404, "no_such_variant", "this job has generated no actions")
    body = json.dumps(told["action"]).encode()
    etag = f'"{hashlib.sha256(body).hexdigest()}"'
    if Conditions(call.request.method, call.request.headers).knows(etag):
        return Response(status_code=304, headers={"etag": etag})
    return Response(body, headers={"etag": etag}, media_type="application/json")


async def _not_ready(call: Call, job: Job) -> ApiError:
    told = await call.service.objects.of(job)
    message = "there is nothing of it yet; the job's progress says how far it is"
    return ApiError(409, "media_not_ready", message, {"retry-after": str(retry_after_s(told["eta_s"]))})


async def _is_gone(call: Call, job: Job) -> bool:
    """Whether there is no file, not only none of the variant that was asked for."""
    media = call.service.media
    answer = await content_answer(media, job.media_id, "HEAD", {})
    return answer.status_code == 404


async def variant_answer(
    media: MediaStore, media_id: str, variant: str, method: str, headers: Mapping[str, str]
) -> Response:
    """A variant of a finished file, given as :func:`deployments.api.content.content_answer` gives finished files.

    Args:
        media: where the file is.
        media_id: of the file.
        variant: one of :data:`deployments.media.variants.MADE_VARIANTS`.
        method: GET or HEAD.
        headers: of the request, by lower-case names.

    Raises:
        MediaError: it cannot be made of this file, or not be written or read.
    """
    try:
        record = await asyncio.to_thread(found_record, media, media_id)
        if record.state != DONE:
            raise not_ready()
        return finished_answer(media, await made_variant(media, record, variant), method, headers)
    except ApiError as refusal:
        return error_response(refusal)
