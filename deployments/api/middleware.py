"""Middleware of every request: keys, rules for pages of other origins, safe headers."""

from __future__ import annotations

import re
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cosmos3_core.errors import Cosmos3Error
from deployments.api.auth import Caller
from deployments.api.call import CALLER, logger
from deployments.api.errors import error_response, is_explained
from deployments.api.service import Service
from deployments.api.service_info import OPEN_PATHS
from deployments.errors import ApiError

_PORT = re.compile(r":[0-9]{1,5}$")
_METHODS = ("GET", "HEAD", "POST", "DELETE")
_UNSAFE_METHODS = ("POST", "DELETE")
_DEFAULT_PORTS = {"http": ":80", "https": ":443"}
_ALLOWED_HEADERS = (
    *("authorization", "content-type", "idempotency-key", "last-event-id", "x-request-id"),
    *("range", "if-range", "if-none-match"),
)
_EXPOSED_HEADERS = (
    *("accept-ranges", "content-range", "etag", "openai-poll-after-ms", "retry-after", "x-request-id"),
    *("x-frames-sha256", "x-inference-time-s", "x-mode", "x-model", "x-negative-prompt", "x-notes", "x-seed"),
    *("x-stage-durations", "x-video-id", "x-warnings"),
)


class KeyMiddleware:
    """Guard that lets requests with a key through, where keys are needed; only listed paths are open.

    Args:
        app: behind it.
        get_service: whose keys they are.
    """

    def __init__(self, app: ASGIApp, get_service: Callable[[], Service]) -> None:
        self._app = app
        self._get_service = get_service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            if scope["path"].removeprefix(scope.get("root_path", "")) in OPEN_PATHS:
                scope[CALLER] = Caller()
            else:
                try:
                    scope[CALLER] = await self._get_service().caller(Headers(scope=scope))
                except Cosmos3Error as error:
                    if not is_explained(error):
                        logger.exception("a key could not be checked")
                    await error_response(error)(scope, receive, send)
                    return
        await self._app(scope, receive, send)


class Cors:
    """Guard against pages of other origins: allowed ones may call, others may not even send what they cannot read.

    Args:
        app: behind it.
        get_service: whose configuration says which.
    """

    def __init__(self, app: ASGIApp, get_service: Callable[[], Service]) -> None:
        self._app = app
        self._get_service = get_service
        self._with_cors: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, headers = self._get_service(), Headers(scope=scope)
        origins = service.http.cors_origins
        if service.hosts is not None and _PORT.sub("", headers.get("host", "").lower()) not in service.hosts:
            message = (
                f"this app is called by {', '.join(sorted(service.hosts))} alone, as it asks for no keys; "
                "http.allowed_hosts allows more"
            )
            await error_response(ApiError(403, "wrong_host", message))(scope, receive, send)
            return
        is_allowed = "*" in origins or headers.get("origin") in origins
        if scope["method"] in _UNSAFE_METHODS and not is_allowed and _is_foreign(headers):
            refusal = ApiError(403, "cross_origin", "pages of this origin may not call; http.cors_origins allows some")
            await error_response(refusal)(scope, receive, send)
            return
        if self._with_cors is None:
            self._with_cors = self._app
            if origins:
                self._with_cors = CORSMiddleware(
                    self._app,
                    allow_origins=origins,
                    allow_methods=_METHODS,
                    allow_headers=_ALLOWED_HEADERS,
                    expose_headers=_EXPOSED_HEADERS,
                )
        await self._with_cors(scope, receive, send)


def _is_foreign(headers: Headers) -> bool:
    """Return whether a page of another origin sends a request, as far as its browser says so."""
    if (site := headers.get("sec-fetch-site")) is not None:
        return site not in ("same-origin", "none")
    # Browsers do not say it of plain http but on this machine, and older ones never. Who is no browser has no origin.
    if (origin := headers.get("origin")) is None:
        return False
    scheme, _, called = origin.lower().partition("://")
    port = _DEFAULT_PORTS.get(scheme, "")
    return not called or called.removesuffix(port) != headers.get("host", "").lower().removesuffix(port)


class SafeHeaders:
    """Header that keeps browsers from guessing the type of an answer.

    Args:
        app: behind it.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["x-content-type-options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, send_safely)
