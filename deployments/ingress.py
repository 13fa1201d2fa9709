"""Ingress: HTTP in, the Director's events or file out."""

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.presets import PRESETS
from deployments.api.bodies import VideoBody, parse_video_body
from deployments.api.body_limit import read_fields
from deployments.api.errors import error_response
from deployments.messages import Finished, MediaPart

logger = logging.getLogger("ray.serve")

api = FastAPI(title="cosmos3-serve", docs_url=None, redoc_url=None)

_VIDEO_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": VideoBody.model_json_schema()} for kind in ("application/json", "multipart/form-data")
        },
    }
}


# serve.ingress copies the app, and with it what its routes refer to, when it decorates the class: helpers come first.


async def _parts(events: Any) -> AsyncIterator[bytes]:
    try:
        async for event in events:
            if isinstance(event, MediaPart):
                yield event.data
    finally:
        _cancel(events)


def _cancel(events: Any) -> None:
    """Stop the stages. A response that is only dropped runs on."""
    if events is not None:
        events.cancel()


def _headers(event: Finished) -> dict[str, str]:
    return {
        "content-length": str(event.num_bytes),
        "x-request-id": event.request_id,
        "x-seed": str(event.seed),
        "x-frames-sha256": event.frames_sha256,
        "x-negative-prompt": event.negative_origin,
        "x-inference-time-s": f"{event.stage_seconds['total']:.3f}",
        "x-stage-durations": json.dumps({name: round(value, 4) for name, value in event.stage_seconds.items()}),
        "x-notes": json.dumps(event.notes),
    }


@serve.ingress(api)
class Ingress:
    """See the module.

    Args:
        checkpoint: the checkpoint's directory.
        app_name: of the Serve application, for readiness.
        model_name: what clients call the model; None = the checkpoint's name.
        max_body_bytes: of a request.
        director: its handle.
    """

    def __init__(
        self, checkpoint: str, app_name: str, model_name: str | None, max_body_bytes: int, director: Any
    ) -> None:
        layout = CheckpointLayout.open(checkpoint)
        self._model_name = model_name or layout.name
        self._modes = sorted(mode for family, mode in PRESETS if family == layout.family)
        self._family = layout.family
        self._app_name = app_name
        self._max_body_bytes = max_body_bytes
        self._director = director.options(stream=True)
        self._started_s = int(time.time())
        self._is_draining = False

    @api.post("/v1/videos/sync", openapi_extra=_VIDEO_BODY, response_class=Response)
    async def create_video(self, request: Request) -> Response:
        """Make a video from a prompt; the answer is the file."""
        request_id = request.headers.get("x-request-id") or uuid.uuid4().hex
        events: Any = None
        try:
            fields = await read_fields(request, self._max_body_bytes)
            events = self._director.stream.remote(parse_video_body(fields, self._model_name), request_id)
            async for event in events:
                if isinstance(event, Finished):
                    return StreamingResponse(_parts(events), media_type=event.media_type, headers=_headers(event))
            raise RuntimeError("the Director's stream ended before the file")
        except Exception as error:  # every error becomes an answer
            response = error_response(error, request_id)
            if response.status_code == 500:
                logger.exception("request %s failed", request_id)
            _cancel(events)
            return response
        except asyncio.CancelledError:
            _cancel(events)
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
        status = await asyncio.to_thread(serve.status)
        deployments = status.applications[self._app_name].deployments
        missing = sorted(name for name, it in deployments.items() if it.replica_states.get("RUNNING", 0) < 1)
        if missing:
            body = {"status": "not ready", "waiting_for": missing}
            return JSONResponse(body, status_code=503, headers={"retry-after": "5"})
        return JSONResponse({"status": "ready"})

    async def drain(self) -> None:
        """Say so at /ready: whoever balances the load sends no more. The Director refuses new requests."""
        self._is_draining = True
