"""The HTTP API as one ASGI application, whatever serves it."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route

from deployments.api import images, job_events, service_info, video_content, videos
from deployments.api.errors import error_response
from deployments.api.middleware import Cors, KeyMiddleware, SafeHeaders
from deployments.api.service import Service

_ROUTERS = tuple(module.router for module in (videos, video_content, job_events, images, service_info))


def build_api(get_service: Callable[[], Service]) -> FastAPI:
    """Return the application.

    Args:
        get_service: returns what it works with; called for every request.
    """
    app = FastAPI(
        title="cosmos3-serve",
        version="1",
        description="Videos, images, sound and actions with NVIDIA's Cosmos3. Every answer has an x-request-id.",
        openapi_url=None,  # a route of our own completes the document; pages that show it would load scripts
        redirect_slashes=False,  # a redirect would lead to whatever Host says
        generate_unique_id_function=_operation_id,
    )
    app.state.get_service = get_service
    app.state.document = None  # made when it is asked for
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    # The one that is added last is the first to see a request.
    app.add_middleware(KeyMiddleware, get_service=get_service)
    app.add_middleware(Cors, get_service=get_service)
    app.add_middleware(SafeHeaders)
    return app


def _operation_id(route: APIRoute) -> str:
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        # The framework names the methods of the first route of this path alone.
        error = HTTPException(405, error.detail, {"allow": ", ".join(sorted(_methods(request)))})
    return error_response(error)


def _methods(request: Request) -> set[str]:
    """Return the methods that a path takes."""
    routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in matching for method in route.methods or ()}
