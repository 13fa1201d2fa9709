"""Routes about the service itself: its model, its health, its metrics, its OpenAPI document."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Path, Query
from fastapi.routing import APIRoute
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from deployments.api.call import CurrentCall, get_service, make_router
from deployments.api.openapi import Responses, header_docs, make_document, responses
from deployments.api_model import ApiModel, Model, ModelList
from deployments.errors import ApiError
from deployments.observability.cluster_metrics import select_families
from deployments.threads import run_in_thread

_RETRY_S = 5
_Match = Annotated[str, Query(max_length=100, description="only metrics whose names contain it, such as cosmos3")]
_Name = Annotated[str, Path(pattern=r"^[\w.-]+$", max_length=200)]


class Health(ApiModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Ready(ApiModel):
    """Every stage has a running replica."""

    status: Literal["ready"] = "ready"


class NotReadyAnswer(ApiModel):
    """Requests should go elsewhere for now."""

    status: Literal["not ready", "shutting down"]
    waiting_for: Annotated[
        tuple[str, ...], Field(description="stages without a running replica, and faults that must pass first")
    ] = ()


_OPEN: dict[str, list[str]] = {"security": []}
_NOT_READY: Responses = {
    503: {"model": NotReadyAnswer, "description": "not yet, or not any more", "headers": header_docs("Retry-After")}
}
_NUMBERS: Responses = {200: {"description": "numbers", "content": {"text/plain": {"schema": {"type": "string"}}}}}

router = make_router()


@router.get("/v1/models", responses=responses({}))
async def list_models(call: CurrentCall) -> ModelList:
    """List the one model that is served, and what it can do."""
    return ModelList.of(call.service.model)


@router.get("/v1/models/{name}", responses=responses({}, 404))
async def show_model(name: _Name, call: CurrentCall) -> Model:
    """Show the model that is served, by one of its names."""
    names = call.service.rules.model_names
    if name not in names:
        message = f"no model {name!r} is served here; the names of the one that is: {', '.join(names)}"
        raise ApiError(404, "model_not_found", message)
    return call.service.model


@router.get("/v1/models/{owner}/{name}", responses=responses({}, 404))
async def show_owned_model(owner: _Name, name: _Name, call: CurrentCall) -> Model:
    """Show the model that is served, by one of its names with an owner."""
    return await show_model(f"{owner}/{name}", call)


@router.get("/health", responses=responses({}, is_open=True), openapi_extra=_OPEN)
async def health() -> Health:
    """Say that the process is up; whether it can serve is /ready's answer."""
    return Health()


@router.get("/ready", responses=responses(_NOT_READY, is_open=True), openapi_extra=_OPEN, response_model=Ready)
async def ready(request: Request) -> Response:
    """Say whether every stage has a running replica; if not, name the stages that have none."""
    service = get_service(request)
    if service.is_draining:
        body: Ready | NotReadyAnswer = NotReadyAnswer(status="shutting down")
    elif waiting_for := await service.find_missing_stages():
        body = NotReadyAnswer(status="not ready", waiting_for=tuple(waiting_for))
    else:
        return JSONResponse(Ready().as_json())
    return JSONResponse(body.model_dump(exclude_unset=True), status_code=503, headers={"retry-after": str(_RETRY_S)})


@router.get("/metrics", responses=responses(_NUMBERS, 401, 403, 422, 429, 503, is_open=True), response_class=Response)
async def metrics(request: Request, match: _Match = "") -> Response:
    """Return numbers for Prometheus."""
    text, media_type = await get_service(request).metrics_text()
    return Response(select_families(text, match), media_type=media_type)


@router.get("/openapi.json", responses=responses({}, is_open=True), openapi_extra=_OPEN)
async def openapi(request: Request) -> Response:
    """Return this API as an OpenAPI document."""
    root_path = request.scope.get("root_path", "")
    return JSONResponse(await run_in_thread(make_document, request.app, get_service(request), root_path))


OPEN_PATHS = tuple(it.path for it in router.routes if isinstance(it, APIRoute) and it.openapi_extra == _OPEN)
"""Paths that need no key."""
