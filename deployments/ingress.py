"""Ingress: HTTP in, the Director's events or file out."""

import asyncio
import logging
import time
import uuid
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import DeadlineExceeded
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.presets import PRESETS
from deployments.api.bodies import VideoBody, parse_video_body
from deployments.api.body_limit import read_fields, request_id_of
from deployments.api.errors import error_response
from deployments.api.media_answer import cancel, finished, media_answer
from deployments.readiness import Readiness

logger = logging.getLogger("ray.serve")

# Beyond the request's own deadline, which the Director keeps.
_SLACK_S = 15.0

api = FastAPI(title="cosmos3-serve", docs_url=None, redoc_url=None)

_VIDEO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": VideoBody.model_json_schema()} for kind in ("application/json", "multipart/form-data")
        },
    }
}


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
        max_body_bytes: of a request.
        request_timeout_s: for reading it and making its file. The Director keeps it; this is for one that is gone.
        director: its handle.
    """

    def __init__(
        self, checkpoint: str, model_name: str | None, max_body_bytes: int, request_timeout_s: float, director: Any
    ) -> None:
        layout = CheckpointLayout.open(checkpoint)
        self._model_name = model_name or layout.name
        self._modes = sorted(mode for family, mode in PRESETS if family == layout.family)
        self._family = layout.family
        self._readiness = Readiness()
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._director = director.options(stream=True)
        self._started_s = int(time.time())
        self._is_draining = False

    @api.post("/v1/videos/sync", openapi_extra=_VIDEO_BODY, response_class=Response)
    async def create_video(self, request: Request) -> Response:
        """Make a video from a prompt; the answer is the file."""
        request_id = uuid.uuid4().hex
        events: Any = None
        try:
            request_id = request_id_of(request.headers, request_id)
            async with asyncio.timeout(self._request_timeout_s + _SLACK_S):
                fields = await read_fields(request, self._max_body_bytes)
                events = self._director.stream.remote(parse_video_body(fields, self._model_name), request_id)
                event = await finished(events)
            return media_answer(event, events)
        except TimeoutError:
            cancel(events)
            return error_response(DeadlineExceeded("director", self._request_timeout_s))
        except Exception as error:  # every error becomes an answer
            response = error_response(error)
            if response.status_code == 500:
                logger.exception("request %s failed", request_id)
            cancel(events)
            return response
        except asyncio.CancelledError:
            cancel(events)
            raise

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
