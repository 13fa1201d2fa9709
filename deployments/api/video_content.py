"""Route of the content of a job: its file, whole or as it grows, pictures and sound made of it, its actions."""

from __future__ import annotations

import hashlib

from starlette.requests import Request
from starlette.responses import Response

from deployments.api.call import Call, routes
from deployments.api.content import Conditions, file_answer
from deployments.media.variants import VIDEO

router = routes()


@router.api_route("/v1/videos/{video_id}/content", methods=["GET", "HEAD"])
async def get_content(video_id: str, request: Request) -> Response:
    """Send the content of a job; the file itself from its first fragment on."""
    call = Call.of(request, "variant")
    jobs = call.service.jobs
    job = await jobs.get(video_id, call.caller.owner)
    content = await jobs.content(job, call.query.get("variant", VIDEO))
    if isinstance(content, bytes):
        return _actions(call, content)
    return await file_answer(jobs.media, content, request.method, request.headers)


def _actions(call: Call, body: bytes) -> Response:
    etag = f'"{hashlib.sha256(body).hexdigest()}"'
    if Conditions(call.request.method, call.request.headers).knows(etag):
        return Response(status_code=304, headers={"etag": etag})
    return Response(body, headers={"etag": etag}, media_type="application/json")
