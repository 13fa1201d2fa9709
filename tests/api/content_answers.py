"""Answers about files of a media store, without the jobs that they belong to, and what a client gets of them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import Response

from deployments.api.call import error_response
from deployments.api.content import answer_with_content as answer_record
from deployments.errors import ApiError
from deployments.media.store import MediaStore
from deployments.media.variants import VIDEO, find_or_make


@dataclass
class Answer:
    """A received answer."""

    status: int = 0
    headers: Headers = field(default_factory=Headers)
    body: bytes = b""

    @property
    def code(self) -> str:
        """The code of a refusal."""
        return str(json.loads(self.body)["error"]["code"])


async def send_answer(response: Response) -> Answer:
    """Send a response to a client that stays; return what it received."""
    answer = Answer()

    async def receive() -> Any:
        await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            answer.status, answer.headers = message["status"], Headers(raw=message["headers"])
        answer.body += message.get("body", b"")

    await response({"type": "http", "asgi": {"spec_version": "2.4"}}, receive, send)
    return answer


async def content_answer(
    store: MediaStore, media_id: str, method: str, headers: Mapping[str, str], variant: str = VIDEO
) -> Response:
    """The answer of ``GET /v1/videos/{id}/content`` for a job that is completed."""
    try:
        return await answer_record(store, await find_or_make(store, media_id, variant), method, headers)
    except ApiError as refusal:
        return error_response(refusal)


async def variant_answer(
    store: MediaStore, media_id: str, variant: str, method: str, headers: Mapping[str, str]
) -> Response:
    """The same for a variant, which is made of the file."""
    return await content_answer(store, media_id, method, headers, variant)
