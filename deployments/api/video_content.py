"""Route of the content of a job: its file, whole or as it grows, pictures and sound made of it, its actions."""

from __future__ import annotations

import hashlib
from typing import Annotated

from fastapi import Query
from starlette.responses import Response

from deployments.api.call import Call, CurrentCall, VideoId, routes
from deployments.api.content import Conditions, file_answer
from deployments.api.openapi import conditional_headers, content_answers, responses
from deployments.media.variants import CONTENT_VARIANTS, VIDEO

_CONTENT = "/v1/videos/{video_id}/content"
_ERRORS = (404, 409, 410, 416)
_Variant = Annotated[
    str,
    Query(
        description="the file itself (an image or sound where that was asked for), pictures or the sound of it, or "
        "generated actions",
        json_schema_extra={"enum": list(CONTENT_VARIANTS)},
    ),
]

router = routes()


@router.get(
    _CONTENT, responses=responses(content_answers(has_body=True), *_ERRORS), openapi_extra=conditional_headers()
)
async def get_video_content(video_id: VideoId, call: CurrentCall, variant: _Variant = VIDEO) -> Response:
    """Send the content of a job; the file itself from its first fragment on, and as it grows."""
    jobs = call.service.jobs
    job = await jobs.get(video_id, call.caller.owner)
    content = await jobs.content(job, variant)
    if isinstance(content, bytes):
        return _actions(call, content)
    return await file_answer(jobs.media, content, call.request.method, call.request.headers)


@router.head(
    _CONTENT,
    responses=responses(content_answers(has_body=False), *_ERRORS),
    openapi_extra=conditional_headers(),
    response_class=Response,
)
async def head_video_content(video_id: VideoId, call: CurrentCall, variant: _Variant = VIDEO) -> Response:
    """Send the headers that the content of a job has."""
    return await get_video_content(video_id, call, variant)


def _actions(call: Call, body: bytes) -> Response:
    etag = f'"{hashlib.sha256(body).hexdigest()}"'
    if Conditions(call.request.method, call.request.headers).knows(etag):
        return Response(status_code=304, headers={"etag": etag})
    return Response(body, headers={"etag": etag}, media_type="application/json")
