"""The HTTP API as one ASGI application, whatever serves it."""

from __future__ import annotations

from collections.abc import Callable

from fastapi import FastAPI
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
    """The application.

    Args:
        get_service: what it works with; called for every request.
    """
    # The document is written by hand. A redirect would lead to whatever Host says.
    app = FastAPI(title="cosmos3-serve", openapi_url=None, redirect_slashes=False)
    app.state.get_service = get_service
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    # The one that is added last is the first to see a request.
    app.add_middleware(KeyMiddleware, get_service=get_service)
    app.add_middleware(Cors, get_service=get_service)
    app.add_middleware(SafeHeaders)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        # The framework names the methods of the first route of this path alone.
        error = HTTPException(405, error.detail, {"allow": ", ".join(sorted(_methods(request)))})
    return error_response(error)


def _methods(request: Request) -> set[str]:
    """That a path can be asked with."""
    routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, Route)]
    matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
    return {method for route in matching for method in route.methods or ()}
