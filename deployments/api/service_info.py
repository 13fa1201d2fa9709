"""Routes about the service itself: what it serves, how it is, what it may be asked."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments.api.call import Call, routes, service_of
from deployments.api.openapi import document
from deployments.served_model import ModelList

OPEN_PATHS = ("/health", "/ready", "/openapi.json")
"""What needs no key."""

_RETRY_S = 5

router = routes()


@router.get("/v1/models")
async def list_models(request: Request) -> Response:
    """The one model that is served, and what it can do."""
    model = Call.of(request).service.model
    return JSONResponse(ModelList.of(model).as_json())


@router.get("/health")
async def health() -> Response:
    """The process is up; whether it can serve is /ready's answer."""
    return JSONResponse({"status": "ok"})


@router.get("/ready")
async def ready(request: Request) -> Response:
    """200 when every stage has a running replica, else 503 with the stages that have none."""
    service = service_of(request)
    headers = {"retry-after": str(_RETRY_S)}
    if service.is_draining:
        return JSONResponse({"status": "shutting down"}, status_code=503, headers=headers)
    if waiting_for := await service.ready.waiting_for():
        body = {"status": "not ready", "waiting_for": waiting_for}
        return JSONResponse(body, status_code=503, headers=headers)
    return JSONResponse({"status": "ready"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Numbers for Prometheus."""
    text, media_type = await service_of(request).metrics_text()
    return Response(text, media_type=media_type)


@router.get("/openapi.json")
async def openapi(request: Request) -> Response:
    """This API as an OpenAPI document."""
    return JSONResponse(document(service_of(request), request.scope.get("root_path", "")))
