"""The transport over HTTP, from anywhere."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any, TypeVar
from urllib.parse import quote

from pydantic import BaseModel

from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.media.image import write_image
from cosmos3_core.request import GenerationRequest
from deployments.api_model import ModelList
from deployments.clients.errors import NotFound, UnreachableError
from deployments.clients.http_connection import Connecting, HttpConnection
from deployments.clients.transport import STOP_S, VIDEO, AttachedVideo, Deadline, read_answer, read_event
from deployments.jobs.events import VideoEvent
from deployments.jobs.job import SubmitOptions, encode_request
from deployments.jobs.video import Video, VideoDeleted, VideoPage

logger = logging.getLogger(__name__)

# The app sends followers a keep-alive comment every 15 s.
_SILENCE_S = 60.0
_M = TypeVar("_M", bound=BaseModel)


class HttpTransport:
    """A :class:`~deployments.clients.transport.Transport` over HTTP; ``timeout_s`` is for one call and its upload."""

    def __init__(self, url: str, api_key: str | None, timeout_s: float, connecting: Connecting) -> None:
        self._connection = HttpConnection(url, api_key, connecting)
        self._timeout_s = timeout_s
        self._withdrawals: set[asyncio.Task[None]] = set()

    async def submit(self, request: GenerationRequest, options: SubmitOptions) -> Video:
        # In a thread, as it reads and encodes files.
        body = await asyncio.to_thread(_encode_body, request, options)
        return await self._call(Video, "POST", "/v1/videos", body=body, headers=_make_headers(options))

    async def start_attached(
        self, request: GenerationRequest, options: SubmitOptions, timeout_s: float
    ) -> AttachedVideo:
        # To the app it is a job like any other, which is cancelled when the caller leaves.
        submitting = asyncio.create_task(self.submit(request, options))
        try:
            done, _ = await asyncio.wait([submitting], timeout=timeout_s)
        except asyncio.CancelledError:
            await self._withdraw(submitting)
            raise
        if not done:
            await self._withdraw(submitting)
            raise UnreachableError(f"{self._connection.url}: no complete answer within {timeout_s:g} s")
        video_id = submitting.result().id

        async def stop() -> None:
            await self.cancel(video_id)

        return AttachedVideo(video_id, None, stop)

    async def remix(self, video_id: str, prompt: str, options: SubmitOptions) -> Video:
        body = json.dumps({"prompt": prompt}).encode()
        return await self._call(
            Video, "POST", f"{_make_path(video_id)}/remix", body=body, headers=_make_headers(options)
        )

    async def get_video(self, video_id: str) -> Video:
        return await self._call(Video, "GET", _make_path(video_id))

    async def list_videos(self, after: str | None, limit: int, order: str) -> VideoPage:
        params: dict[str, str | int] = {"limit": limit, "order": order}
        if after is not None:
            params["after"] = after
        return await self._call(VideoPage, "GET", "/v1/videos", params=params)

    async def cancel(self, video_id: str) -> Video:
        return await self._call(Video, "POST", f"{_make_path(video_id)}/cancel")

    async def delete(self, video_id: str) -> None:
        await self._call(VideoDeleted, "DELETE", _make_path(video_id))

    async def events(self, video_id: str, after: int, timeout_s: float) -> AsyncGenerator[VideoEvent, None]:
        headers = {"accept": "text/event-stream"}
        if after:
            headers["last-event-id"] = str(after)
        path, deadline = f"{_make_path(video_id)}/events", Deadline(timeout_s)
        async with self._connection.send(
            "GET", path, deadline=deadline, headers=headers, silence_s=_SILENCE_S
        ) as answer:
            await answer.check()
            if answer.status == 204:  # no more events
                return
            if answer.media_type != "text/event-stream":
                raise answer.make_foreign_error()
            async with aclosing(answer.iter_events()) as events:
                async for raw in events:
                    yield read_event(raw.kind, raw.data, raw.seq)

    async def content(self, video_id: str, variant: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        params = {} if variant == VIDEO else {"variant": variant}
        path = f"{_make_path(video_id)}/content"
        async with self._connection.send("GET", path, deadline=Deadline(timeout_s), params=params) as answer:
            await answer.check()
            async for part in answer.iter_parts():
                yield part

    async def list_models(self) -> ModelList:
        return await self._call(ModelList, "GET", "/v1/models")

    async def aclose(self) -> None:
        if self._withdrawals:  # cancellations that are under way come first
            await asyncio.wait(self._withdrawals, timeout=STOP_S)
        await self._connection.aclose()

    async def _withdraw(self, submitting: asyncio.Task[Video]) -> None:
        """Cancel a video whose id has not come yet: the app may make it although its caller has left."""
        withdrawal = asyncio.create_task(self._cancel_submitted(submitting))
        self._withdrawals.add(withdrawal)
        withdrawal.add_done_callback(self._withdrawals.discard)
        await asyncio.wait([withdrawal], timeout=STOP_S)

    async def _cancel_submitted(self, submitting: asyncio.Task[Video]) -> None:
        try:
            video_id = (await submitting).id
        except UnreachableError as error:
            logger.warning("a video may be made though its caller has left: %s", error)
            return
        except Cosmos3Error:
            return  # it was refused
        try:
            await self.cancel(video_id)
        except NotFound:
            pass  # it was deleted meanwhile
        except Cosmos3Error as error:
            logger.warning("%s could not be stopped: %s", video_id, error)

    async def _call(
        self,
        kind: type[_M],
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
    ) -> _M:
        """Send a call that answers at once, and return its answer."""
        deadline = Deadline(self._timeout_s)
        call = self._connection.send(method, path, deadline=deadline, body=body, headers=headers, params=params)
        async with call as answer:
            await answer.check((headers or {}).get("idempotency-key"))
            return read_answer(kind, await answer.read_json())


def _make_path(video_id: str) -> str:
    return f"/v1/videos/{quote(video_id, safe='')}"


def _encode_body(request: GenerationRequest, options: SubmitOptions) -> bytes:
    body = make_body(request)
    if options.service_class is not None:
        body["service_class"] = options.service_class
    if options.previews:
        body["previews"] = options.previews
    return json.dumps(body).encode()


def _make_headers(options: SubmitOptions) -> dict[str, str]:
    named = {"x-request-id": options.request_id, "idempotency-key": options.idempotency_key}
    return {name: value for name, value in named.items() if value is not None}


def make_body(request: GenerationRequest) -> dict[str, Any]:
    """Return a request as a JSON body: the fields that differ from the defaults, an image or clip as a data URL.

    Raises RequestError for what cannot travel over HTTP, and for an image or clip that cannot be read.
    """
    body, media = encode_request(request.packed())
    if "append_metadata" in body:
        value = body["append_metadata"]
        raise RequestError("append_metadata", value, "the default over HTTP", "Generate in process instead.")
    for name, data in media.items():
        if isinstance(data, bytes):
            body[name] = _encode_data_url(data)
        elif name == "image":
            body[name] = _encode_data_url(_encode_png(data))
        else:
            raise RequestError(name, "frames", "a file over HTTP", "Write them to one, and give its path or bytes.")
    return body


def _encode_data_url(data: bytes) -> str:
    # The app reads the format from the content.
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def _encode_png(frame: Any) -> bytes:
    png = io.BytesIO()
    write_image(png, frame, "png")
    return png.getvalue()
