"""Ingress: HTTP in, the Director's events or file out."""

import time
from collections.abc import Callable
from typing import Any, TypeVar

from fastapi import FastAPI
from ray import serve
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.resolve import offered_modes
from deployments.api.bodies import parse_image_body, parse_video_body
from deployments.api.body_limit import read_fields
from deployments.api.body_room import BodyRoom, Held
from deployments.api.content import content_answer
from deployments.api.errors import error_response
from deployments.api.exchange import Exchange, answered
from deployments.api.fields import IMAGE_FIELDS, VIDEO_FIELDS, openapi
from deployments.api.media_answer import images_answer, live_answer, media_answer
from deployments.media_store import MediaSpec
from deployments.readiness import Readiness

_Asked = TypeVar("_Asked")

api = FastAPI(title="cosmos3-serve", docs_url=None, redoc_url=None)


async def _no_such_route(request: Request, error: Exception) -> JSONResponse:
    return error_response(error)


# serve.ingress copies the app when it decorates the class: what belongs to it comes first.
api.add_exception_handler(HTTPException, _no_such_route)


@serve.ingress(api)
class Ingress:
    """See the module.

    Args:
        checkpoint: the checkpoint's directory.
        model_name: what clients call the model; None = the checkpoint's name.
        is_sound_offered: whether the app has a decoder of sound.
        max_body_bytes: of a request.
        max_bodies_bytes: of all bodies that are in memory at a time.
        request_timeout_s: for reading it and making its file. The Director keeps it; this is for one that is gone.
        media: of the store where files are.
        director: its handle.
    """

    def __init__(
        self,
        checkpoint: str,
        model_name: str | None,
        is_sound_offered: bool,
        max_body_bytes: int,
        max_bodies_bytes: int,
        request_timeout_s: float,
        media: MediaSpec,
        director: Any,
    ) -> None:
        layout = CheckpointLayout.open(checkpoint)
        self._model_name = model_name or layout.name
        self._modes = offered_modes(layout, is_sound_offered=is_sound_offered)
        self._family = layout.family
        self._readiness = Readiness()
        self._max_body_bytes = max_body_bytes
        self._room = BodyRoom(max_bodies_bytes)
        self._request_timeout_s = request_timeout_s
        self._media = media.open()
        self._director = director.options(stream=True)
        self._started_s = int(time.time())
        self._is_draining = False

    @api.post("/v1/videos/sync", openapi_extra=openapi(VIDEO_FIELDS), response_class=Response)
    async def create_video(self, request: Request) -> Response:
        """Make a video, an image, sound or actions, from a prompt and what else the mode takes.

        The answer is the file; where actions were generated it is JSON, with the file in it if there is one.
        """

        async def work(exchange: Exchange) -> Response:
            with self._room.hold() as held:
                job = await self._body(request, parse_video_body, held)
                is_live = job.is_live
                await exchange.ask(job.request)
                del job
            if is_live:
                return await live_answer(exchange, self._media)
            with self._room.hold() as held:  # the request's body is gone
                return await media_answer(exchange, held, self._media)

        return await answered(request, self._director, self._request_timeout_s, work)

    @api.post("/v1/images/generations", openapi_extra=openapi(IMAGE_FIELDS), response_class=Response)
    async def create_images(self, request: Request) -> Response:
        """Make n images from a prompt, one after the other; image i has the seed + i."""

        async def work(exchange: Exchange) -> Response:
            with self._room.hold() as held:
                job = await self._body(request, parse_image_body, held)
                await exchange.ask(job.requests[0])
            with self._room.hold() as held:
                return await images_answer(exchange, job, held, self._media)

        return await answered(request, self._director, self._request_timeout_s, work)

    @api.head("/v1/videos/{media_id}/content", include_in_schema=False)
    @api.get("/v1/videos/{media_id}/content", response_class=Response)
    async def get_content(self, media_id: str, request: Request) -> Response:
        """A file by the id that ``x-media-id`` said: whole, a range of it, or as it grows.

        Any number of clients may read it at a time, each as fast as it likes.
        """
        return await content_answer(self._media, media_id, request.method, request.headers)

    async def _body(self, request: Request, parse: Callable[[dict[str, Any], str], _Asked], held: Held) -> _Asked:
        return parse(await read_fields(request, self._max_body_bytes, held), self._model_name)

    @api.get("/v1/models")
    async def list_models(self) -> dict[str, Any]:
        """The one model that is served, and what it can do."""
        model = {
            "id": self._model_name,
            "object": "model",
            "created": self._started_s,
            "owned_by": "nvidia",
            "family": self._family,
            "modes": self._modes,
        }
        return {"object": "list", "data": [model]}

    @api.get("/health")
    async def health(self) -> dict[str, str]:
        """The process is up; whether it can serve is /ready's answer."""
        return {"status": "ok"}

    @api.get("/ready")
    async def ready(self) -> JSONResponse:
        """200 when every stage has a running replica, else 503 with the stages that have none."""
        if self._is_draining:
            return JSONResponse({"status": "shutting down"}, status_code=503, headers={"retry-after": "5"})
        if waiting_for := await self._readiness.waiting_for():
            body = {"status": "not ready", "waiting_for": waiting_for}
            return JSONResponse(body, status_code=503, headers={"retry-after": "5"})
        return JSONResponse({"status": "ready"})

    async def drain(self) -> None:
        """Say so at /ready: whoever balances the load sends no more. The Director refuses new requests."""
        self._is_draining = True
