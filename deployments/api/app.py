"""The HTTP API as one ASGI application, and the guard that every request passes first."""

from __future__ import annotations

import re
from collections.abc import Callable

from fastapi import FastAPI
from fastapi.routing import APIRoute
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosmos3_core.errors import Cosmos3Error
from deployments.api import content, generations, service_info
from deployments.api.auth import Caller
from deployments.api.call import CALLER, answer_error, error_response
from deployments.api.openapi import HEADERS
from deployments.api.remote_url import DEFAULT_PORTS
from deployments.api.service import Service
from deployments.errors import ApiError

_PORT = re.compile(r":[0-9]{1,5}$")
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_UNSAFE_METHODS = ("POST", "DELETE")
_OWN_HEAD = "/content"  # the end of paths whose HEAD has a route of its own
_ALLOWED_HEADERS = (
    *("authorization", "content-type", "idempotency-key", "last-event-id", "x-request-id"),
    *("range", "if-range", "if-none-match"),
)
_EXPOSED_HEADERS = ("accept-ranges", "x-request-id", *(name.lower() for name in HEADERS))
_ROUTERS = tuple(module.router for module in (generations, content, service_info))


def build_api(get_service: Callable[[], Service]) -> FastAPI:
    """Return the application; it calls ``get_service`` for every request."""
    app = FastAPI(
        title="cosmos3-serve",
        version="1",
        description="Videos, images, sound and actions with NVIDIA's Cosmos3. Every answer has an x-request-id.",
        openapi_url=None,  # our own route completes the document; FastAPI's pages for it would load scripts
        redirect_slashes=False,  # a redirect would lead to the host that the client wrote into its Host header
        generate_unique_id_function=_operation_id,
    )
    app.state.get_service = get_service
    app.state.document = None  # made on the first request for it
    for router in _ROUTERS:
        app.include_router(router)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(Exception, _answer)
    app.add_middleware(Guard, get_service=get_service)
    return app


def _operation_id(route: APIRoute) -> str:
    first, *others = route.name.split("_")
    return first + "".join(word.capitalize() for word in others)


async def _answer(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        # The framework lists only the methods of the path's first route.
        routes = [route for router in _ROUTERS for route in router.routes if isinstance(route, Route)]
        matching = [route for route in routes if route.matches(request.scope)[0] is not Match.NONE]
        methods = {method for route in matching for method in route.methods or ()}
        error = HTTPException(405, error.detail, {"allow": ", ".join(sorted(methods))})
    return error_response(error)


class _HeadAnswered(Exception):
    """The headers of an answer to HEAD have been sent."""


class Guard:
    """Middleware that checks host, origin and API key, and keeps browsers from guessing the type of an answer.

    Pages of foreign origins may not even send unsafe requests whose answers they could not read. HEAD gets the headers
    of GET everywhere; a stream ends with them.
    """

    def __init__(self, app: ASGIApp, get_service: Callable[[], Service]) -> None:
        self._app, self._get_service = app, get_service
        self._with_cors: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-content-type-options"] = "nosniff"
            await send(message)

        if scope["method"] == "HEAD" and not scope["path"].endswith(_OWN_HEAD):

            async def send_headers(message: Message) -> None:
                if message["type"] == "http.response.start":
                    await send_safely(message)
                    return
                await send_safely({"type": "http.response.body", "body": b""})
                raise _HeadAnswered

            try:
                await self._guard({**scope, "method": "GET"}, receive, send_headers)
            except* _HeadAnswered:
                pass
        else:
            await self._guard(scope, receive, send_safely)

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, unless its host, origin or key is refused."""
        service = self._get_service()
        if refusal := _find_refusal(scope["method"], Headers(scope=scope), service, is_open=_is_open(scope)):
            await error_response(refusal)(scope, receive, send)
            return
        if self._with_cors is None:
            self._with_cors = self._check_key
            if service.http.cors_origins:
                self._with_cors = CORSMiddleware(
                    self._check_key,
                    allow_origins=service.http.cors_origins,
                    allow_methods=_METHODS,
                    allow_headers=_ALLOWED_HEADERS,
                    expose_headers=_EXPOSED_HEADERS,
                )
        await self._with_cors(scope, receive, send)

    async def _check_key(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request that has a valid key, or needs none."""
        auth = self._get_service().auth
        try:
            scope[CALLER] = (
                Caller() if auth is None or _is_open(scope) else await auth.find_caller(Headers(scope=scope))
            )
        except Cosmos3Error as error:
            await answer_error(error, "the check of a key")(scope, receive, send)
            return
        await self._app(scope, receive, send)


def _is_open(scope: Scope) -> bool:
    return scope["path"].removeprefix(scope.get("root_path", "")) in service_info.OPEN_PATHS


def _find_refusal(method: str, headers: Headers, service: Service, *, is_open: bool) -> ApiError | None:
    """Return why a request's host or origin is refused; None if both are allowed."""
    # Probes of HTTP/1.0 name no host; browsers always do.
    is_probe = is_open and "host" not in headers
    if (
        service.hosts is not None
        and not is_probe
        and _PORT.sub("", headers.get("host", "").lower()) not in service.hosts
    ):
        names = ", ".join(sorted(service.hosts))
        message = f"this app is called by {names} alone, as it asks for no keys; http.allowed_hosts allows more"
        return ApiError(403, "wrong_host", message)
    origins = service.http.cors_origins
    is_allowed = "*" in origins or headers.get("origin") in origins
    if method in _UNSAFE_METHODS and not is_allowed and _is_foreign(headers):
        return ApiError(403, "cross_origin", "pages of this origin may not call; http.cors_origins allows some")
    return None


def _is_foreign(headers: Headers) -> bool:
    """Return whether the browser reports that a page of another origin sends the request."""
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    # Browsers send Sec-Fetch-Site over plain http to this machine only, older ones never. Other clients send no Origin.
    if (origin := headers.get("origin")) is None:
        return False
    scheme, _, called = origin.lower().partition("://")
    port = f":{DEFAULT_PORTS[scheme]}" if scheme in DEFAULT_PORTS else ""
    return not called or called.removesuffix(port) != headers.get("host", "").lower().removesuffix(port)
