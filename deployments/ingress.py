"""Ingress: HTTP in, the Director's events or file out."""

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI
from ray import serve
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from cluster.errors import DeadlineExceeded
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.presets import PRESETS
from deployments.api.bodies import VideoBody, parse_video_body
from deployments.api.body_limit import read_fields, request_id_of
from deployments.api.errors import error_response
from deployments.messages import Finished, MediaPart

logger = logging.getLogger("ray.serve")

# Beyond the request's own deadline, which the Director keeps.
_SLACK_S = 15.0
# Until the Director says that it has a request, or why not. A dead one is back within seconds.
_ACCEPT_S = 60.0
# Until the next part of a file that is there.
_PART_S = 60.0
_READY_S = 10.0
_READY_CACHE_S = 1.0

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


async def _finished(events: Any) -> Finished:
    """The event that the file's parts follow."""
    async with asyncio.timeout(_ACCEPT_S):
        await anext(events)  # Accepted, or why not; it comes at once from a Director that lives
    async for event in events:
        if isinstance(event, Finished):
            return event
    raise RuntimeError("the Director's stream ended before the file")


async def _parts(events: Any) -> AsyncIterator[bytes]:
    try:
        while True:
            async with asyncio.timeout(_PART_S):
                event = await anext(events, None)
            if event is None:
                return
            if isinstance(event, MediaPart):
                yield event.data
    finally:
        _cancel(events)


def _cancel(events: Any) -> None:
    """Stop the stages. A response that is only dropped runs on."""
    if events is not None:
        events.cancel()


def _not_ready(waiting_for: list[str]) -> JSONResponse:
    body = {"status": "not ready", "waiting_for": waiting_for}
    return JSONResponse(body, status_code=503, headers={"retry-after": "5"})


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
        self._app_name = serve.get_replica_context().app_name  # whatever it was deployed as
        self._max_body_bytes = max_body_bytes
        self._request_timeout_s = request_timeout_s
        self._director = director.options(stream=True)
        self._started_s = int(time.time())
        self._is_draining = False
        self._known_deployments: dict[str, Any] = {}
        self._known_at_s = -math.inf
        self._asking = asyncio.Lock()

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
                finished = await _finished(events)
            return StreamingResponse(_parts(events), media_type=finished.media_type, headers=_headers(finished))
        except TimeoutError:
            _cancel(events)
            return error_response(DeadlineExceeded("director", self._request_timeout_s), request_id)
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
        try:
            async with asyncio.timeout(_READY_S):
                deployments = await self._deployments()
        except TimeoutError:
            return _not_ready(["Serve's controller"])
        missing = sorted(name for name, it in deployments.items() if it.replica_states.get("RUNNING", 0) < 1)
        if missing or not deployments:
            return _not_ready(missing)
        return JSONResponse({"status": "ready"})

    async def drain(self) -> None:
        """Say so at /ready: whoever balances the load sends no more. The Director refuses new requests."""
        self._is_draining = True

    async def _deployments(self) -> dict[str, Any]:
        """The app's deployments. Serve's controller is asked once a second, whoever asks here how often."""
        async with self._asking:
            if time.monotonic() > self._known_at_s + _READY_CACHE_S:
                applications = (await asyncio.to_thread(serve.status)).applications
                self._known_deployments = applications[self._app_name].deployments
                self._known_at_s = time.monotonic()
            return self._known_deployments
