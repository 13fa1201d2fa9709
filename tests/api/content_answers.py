"""Answers about files of a media store, without the jobs that they belong to."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.responses import Response

from deployments.api.content import content_answer as answer_record
from deployments.api.errors import error_response
from deployments.errors import ApiError
from deployments.media.store import MediaStore
from deployments.media.variants import VIDEO, find_content


async def content_answer(
    store: MediaStore, media_id: str, method: str, headers: Mapping[str, str], variant: str = VIDEO
) -> Response:
    """The answer of ``GET /v1/videos/{id}/content`` for a job that is completed."""
    try:
        return await answer_record(store, await find_content(store, media_id, variant), method, headers)
    except ApiError as refusal:
        return error_response(refusal)


async def variant_answer(
    store: MediaStore, media_id: str, variant: str, method: str, headers: Mapping[str, str]
) -> Response:
    """The same of something that is made of the file."""
    return await content_answer(store, media_id, method, headers, variant)
