"""An app over HTTP."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping
from typing import Any
from urllib.parse import quote

from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.request import GenerationRequest
from deployments.clients.answers import read_event
from deployments.clients.deadline import Deadline
from deployments.clients.errors import NotFound, UnreachableError
from deployments.clients.http_body import body_of
from deployments.clients.http_calls import Connecting, HttpCalls
from deployments.clients.server_sent_events import EventReader
from deployments.clients.transport import LEAVE_S, VIDEO, Attached, JobObject
from deployments.jobs.events import VideoEvent
from deployments.jobs.job import SubmitOptions

logger = logging.getLogger(__name__)

# Followers get a sign of life every 15 s.
_SILENCE_S = 60.0


class HttpTransport:
    """See :class:`deployments.clients.transport.Transport`.

    Args:
        url: of the app.
        api_key: None where the app asks for none.
        timeout_s: for one call, uploads included.
        connecting: see the class.

    Raises:
        RequestError: not a URL, or a key that no header can hold.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float, connecting: Connecting) -> None:
        self._calls = HttpCalls(url, api_key, connecting)
        self._timeout_s = timeout_s
        self._withdrawals: set[asyncio.Task[None]] = set()

    async def submit(self, request: GenerationRequest, options: SubmitOptions) -> JobObject:
        """See the protocol."""

        def written() -> bytes:
            body = body_of(request)
            if options.service_class is not None:
                body["service_class"] = options.service_class
            if options.previews:
                body["previews"] = options.previews
            return json.dumps(body).encode()

        # Files are read and encoded beside the event loop.
        body = await asyncio.to_thread(written)
        return await self._json("POST", "/v1/videos", body=body, headers=_headers(options))

    async def attach(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float) -> Attached:
        """See the protocol. The app does not know that somebody waits: it has to be told when nobody does any more."""
        submitting = asyncio.create_task(self.submit(request, options))
        try:
            done, _ = await asyncio.wait([submitting], timeout=timeout_s)
        except asyncio.CancelledError:
            await self._withdraw(submitting)
            raise
        if not done:
            await self._withdraw(submitting)
            raise UnreachableError(f"{self._calls.url}: no complete answer within {timeout_s:g} s")
        video_id = str(submitting.result().get("id"))

        async def leave() -> None:
            await self.cancel(video_id)

        return Attached(video_id, None, leave)

    async def remix(self, video_id: str, prompt: str, options: SubmitOptions) -> JobObject:
        """See the protocol."""
        body = json.dumps({"prompt": prompt}).encode()
        return await self._json("POST", f"{_path(video_id)}/remix", body=body, headers=_headers(options))

    async def job(self, video_id: str) -> JobObject:
        """See the protocol."""
        return await self._json("GET", _path(video_id))

    async def jobs(self, after: str | None, limit: int, order: str) -> Mapping[str, Any]:
        """See the protocol."""
        params: dict[str, str | int] = {"limit": limit, "order": order}
        if after is not None:
            params["after"] = after
        return await self._json("GET", "/v1/videos", params=params)

    async def cancel(self, video_id: str) -> JobObject:
        """See the protocol."""
        return await self._json("POST", f"{_path(video_id)}/cancel")

    async def delete(self, video_id: str) -> None:
        """See the protocol."""
        await self._json("DELETE", _path(video_id))

    async def events(self, video_id: str, after: int, timeout_s: float) -> AsyncGenerator[VideoEvent, None]:
        """See the protocol."""
        headers = {"accept": "text/event-stream"}
        if after:
            headers["last-event-id"] = str(after)
        call = self._calls.answer(
            "GET",
            f"{_path(video_id)}/events",
            deadline=Deadline(timeout_s),
            headers=headers,
            silence_s=_SILENCE_S,
        )
        async with call as answer:
            await answer.check()
            if answer.status == 204:  # nothing is to come
                return
            if answer.media_type != "text/event-stream":
                raise answer.foreign()
            reader = EventReader()
            async for part in answer.parts():
                for raw in reader.feed(part):
                    yield read_event(raw.kind, raw.data, raw.seq)

    async def content(self, video_id: str, variant: str, timeout_s: float) -> AsyncGenerator[bytes, None]:
        """See the protocol."""
        params = {} if variant == VIDEO else {"variant": variant}
        path = f"{_path(video_id)}/content"
        async with self._calls.answer("GET", path, deadline=Deadline(timeout_s), params=params) as answer:
            await answer.check()
            async for part in answer.parts():
                yield part

    async def models(self) -> Mapping[str, Any]:
        """See the protocol."""
        return await self._json("GET", "/v1/models")

    async def aclose(self) -> None:
        """See the protocol."""
        if self._withdrawals:
            await asyncio.wait(self._withdrawals, timeout=LEAVE_S)
        await self._calls.aclose()

    async def _withdraw(self, submitting: asyncio.Task[JobObject]) -> None:
        """Have a video stopped whose id is still to come: the app may make it, whoever has left."""
        withdrawal = asyncio.create_task(self._withdrawn(submitting))
        self._withdrawals.add(withdrawal)
        withdrawal.add_done_callback(self._withdrawals.discard)
        await asyncio.wait([withdrawal], timeout=LEAVE_S)

    async def _withdrawn(self, submitting: asyncio.Task[JobObject]) -> None:
        try:
            video_id = str((await submitting).get("id"))
        except UnreachableError as error:
            logger.warning("a video may be made that nobody waits for any more: %s", error)
            return
        except Cosmos3Error:
            return  # it was refused
        try:
            await self.cancel(video_id)
        except NotFound:
            pass  # somebody has deleted it
        except Cosmos3Error as error:
            logger.warning("%s could not be stopped: %s", video_id, error)

    async def _json(
        self,
        method: str,
        path: str,
        *,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
    ) -> dict[str, Any]:
        deadline = Deadline(self._timeout_s)
        return await self._calls.json(method, path, deadline=deadline, body=body, headers=headers, params=params)


def _path(video_id: str) -> str:
    return f"/v1/videos/{quote(video_id, safe='')}"


def _headers(options: SubmitOptions) -> dict[str, str]:
    named = {"x-request-id": options.request_id, "idempotency-key": options.idempotency_key}
    return {name: value for name, value in named.items() if value is not None}
