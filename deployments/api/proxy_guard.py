"""Middleware of Serve's HTTP proxies: it bounds requests in their memory, and answers Serve's own errors in JSON.

Serve's server is uvicorn with httptools, which buffers a head of any size before any code sees it. Here uvicorn runs
with h11, whose buffer is bounded. A front server of our own would add a hop to every request, and Serve's HAProxy mode
listens on all interfaces and takes 30 s to stop. Bodies go on to a replica through a queue of Serve's that has no
bound, and all that lies in it is packed as one message: :class:`_BodyWindow` keeps it short. The replica's end of that
queue has no bound either; the app reads it at once, up to its own bound, and requests whose body it never reads are
refused here if that is large.

Serve calls :func:`make_middlewares` in each proxy, as :data:`CALLBACK_SETTING` tells it. The command line sets that
for the Ray that it starts; nodes of other clusters need it in their environment.
"""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import h11
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http import auto
from uvicorn.protocols.http.h11_impl import H11Protocol

from deployments.errors import ApiError
from deployments.process_memory import LARGE_BYTES, give_memory_back

logger = logging.getLogger("ray.serve")

CALLBACK_SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH=deployments.api.proxy_guard.make_middlewares"
"""The setting by which Serve's proxies use this module."""

MAX_HEAD_BYTES, MAX_HEADERS, HEAD_S = 64 * 1024, 128, 20.0
"""Bounds of a request's line and headers: their bytes, their number, and the seconds until the last of them."""

# For the answer to a client that has closed its half of the connection. One that has left looks the same, and its work
# must stop soon.
_HALF_CLOSED_S = 5.0
_METHODS_WITH_BODIES = frozenset({"POST", "PUT", "PATCH"})
_MAX_UNREAD_BYTES = 64 * 1024  # Some clients send a few bytes with a GET.
# Parts of a body that may wait for the replica; uvicorn makes them a few hundred kB large at most.
_MAX_WAITING_PARTS = 16
# A mark of the app's own answers: :class:`deployments.api.app.Guard` sets it.
_OWN_MARK = "x-content-type-options"
_ROUTES_PATH, _HEALTH_PATH = "/-/routes", "/-/healthz"

_TOO_LARGE = ApiError(
    431,
    "head_too_large",
    f"the request's line and headers must have at most {MAX_HEAD_BYTES} bytes and {MAX_HEADERS} headers",
)
_TOO_SLOW = ApiError(408, "head_too_slow", f"the request's line and headers must come within {HEAD_S:g} s")
_BROKEN = ApiError(400, "broken_request", "the request is not valid HTTP/1.1")
_NOT_UTF8 = ApiError(
    400, "invalid_header", "headers that the service reads must be UTF-8, and this one has other bytes"
)
_UNREAD = ApiError(
    413,
    "body_too_large",
    f"only POST, PUT and PATCH requests may have a body of more than {_MAX_UNREAD_BYTES} bytes, or without a "
    "Content-Length",
)
_NO_ROUTE = ApiError(404, "no_such_route", "Not Found; /openapi.json has all routes")
_FULL = ApiError(429, "overloaded", "too many requests wait for this app; try again later", {"retry-after": "5"})
_LATE = ApiError(408, "deadline_exceeded", "the request was not done in the time that Serve allows")
_LOST = ApiError(
    503,
    "unavailable",
    "the process that was to answer is gone; if this was a new request, it may have been accepted: send it again with "
    "the same Idempotency-Key, or look into GET /v1/videos",
    {"retry-after": "5"},
)


def make_middlewares() -> list[Middleware]:
    """Return the middlewares of Serve's proxies."""
    return [Middleware(ProxyGuard)]


class ProxyGuard:
    """The outermost middleware of a proxy. Serve makes it just before its server starts."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        auto.AutoHTTPProtocol = BoundedProtocol  # what uvicorn starts where its options name none, as Serve's do

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request; answer in JSON what Serve itself refuses or fails at."""
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if scope["type"] != "http" or path == _HEALTH_PATH:
            await self._app(scope, receive, send)
        elif path == _ROUTES_PATH:
            await _respond(_NO_ROUTE)(scope, receive, send)
        elif scope["method"] not in _METHODS_WITH_BODIES and _has_large_body(Headers(scope=scope)):
            await _respond(_UNREAD)(scope, receive, send)
        else:
            await self._serve(scope, receive, send)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        replaced: JSONResponse | None = None
        is_started = False
        window = _BodyWindow(receive)

        async def send_json(message: Message) -> None:
            nonlocal replaced, is_started
            if message["type"] == "http.response.start":
                replaced = _replace_error_of_serve(message)
                is_started = replaced is None
            if replaced is None:
                await send(message)
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                is_started = True
                await replaced(scope, receive, send)

        try:
            await self._app(scope, window, send_json)
        except Exception as error:
            if is_started:
                raise
            is_bad_request = isinstance(error, UnicodeDecodeError)  # Serve reads some headers as UTF-8
            if not is_bad_request:
                logger.exception("the proxy failed at %s %s", scope["method"], scope["path"])
            await _respond(_NOT_UTF8 if is_bad_request else _LOST)(scope, receive, send)
        finally:
            if window.num_bytes > LARGE_BYTES:
                give_memory_back()


class _BodyPart(dict[str, Any]):
    """A message with a part of a body. It travels as a plain dict; here its end can be noticed."""

    __slots__ = ("__weakref__",)

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        return dict, (dict(self),)


class _BodyWindow:
    """Receives a request's body no faster than its replica fetches it, so that a slow one does not fill this process.

    Serve drops a part when the replica has fetched it; nothing else tells. Serve ends the wait with the request: when
    the replica has answered, or has died.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self.num_bytes = 0
        self._num_waiting = 0
        self._has_fetched = asyncio.Event()

    async def __call__(self) -> Message:
        """Return the next message, once there is room for it."""
        while self._num_waiting >= _MAX_WAITING_PARTS:
            self._has_fetched.clear()
            await self._has_fetched.wait()
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        part = _BodyPart(message)
        self.num_bytes += len(message.get("body", b""))
        self._num_waiting += 1
        weakref.finalize(part, self._count_fetched)
        return part

    def _count_fetched(self) -> None:
        self._num_waiting -= 1
        self._has_fetched.set()


def _has_large_body(headers: Headers) -> bool:
    return "transfer-encoding" in headers or int(headers.get("content-length", 0)) > _MAX_UNREAD_BYTES


def _replace_error_of_serve(start: Message) -> JSONResponse | None:
    """Return what is sent instead of an answer that begins so; None if it is the app's own, or no error."""
    headers = Headers(raw=start["headers"])
    if start["status"] < 400 or _OWN_MARK in headers or not headers.get("content-type", "").startswith("text/plain"):
        return None
    kept = {name: value for name, value in headers.items() if name in ("x-request-id", "retry-after")}
    return _respond({404: _NO_ROUTE, 408: _LATE, 429: _FULL}.get(start["status"], _LOST), kept)


def _respond(error: ApiError, headers: Mapping[str, str] = MappingProxyType({})) -> JSONResponse:
    return JSONResponse(error.as_json(), status_code=error.status, headers={**error.headers, **headers})


class _BoundedConnection(h11.Connection):
    """Parser of one connection's requests that also bounds heads which come in one piece."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal = _BROKEN

    def next_event(self) -> Any:
        """Return the next event; raise RemoteProtocolError, with :attr:`refusal` set."""
        try:
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            if error.error_status_hint == _TOO_LARGE.status:
                self.refusal = _TOO_LARGE
            raise
        if isinstance(event, h11.Request):
            headers = event.headers.raw_items()
            num_bytes = len(event.target) + sum(len(name) + len(value) + len(": \r\n") for name, value in headers)
            if num_bytes > MAX_HEAD_BYTES or len(headers) > MAX_HEADERS:
                self.refusal = _TOO_LARGE
                raise h11.RemoteProtocolError(_TOO_LARGE.message, _TOO_LARGE.status)
        return event


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol on h11, with bounds on a request's head, and JSON for what cannot be parsed."""

    conn: _BoundedConnection

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.conn = _BoundedConnection()
        self._head_timer: asyncio.TimerHandle | None = None
        self._is_half_closed = False

    def connection_made(self, transport: Any) -> None:
        """Start the timer of the first request's head."""
        super().connection_made(transport)
        self._start_timer()

    def data_received(self, data: bytes) -> None:
        """Parse what has come."""
        self._start_timer()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_timer()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timer of heads."""
        self._stop_timer()
        super().connection_lost(exc)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection for the answer that is under way, if there is one: the client may still read."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        self._is_half_closed = True
        self.loop.call_later(_HALF_CLOSED_S, self.transport.close)
        return True

    def on_response_complete(self) -> None:
        """Close a connection that brings no more requests."""
        super().on_response_complete()
        if self._is_half_closed:
            self.transport.close()

    def _start_timer(self) -> None:
        if self._head_timer is None and self.conn.their_state is h11.IDLE:
            self._head_timer = self.loop.call_later(HEAD_S, self._refuse, _TOO_SLOW)

    def _stop_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what could not be parsed."""
        self._refuse(self.conn.refusal)

    def _refuse(self, refusal: ApiError) -> None:
        """Answer, unless an answer has begun, and close the connection."""
        self._stop_timer()
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            answer = _respond(refusal, {"connection": "close"})
            response = h11.Response(status_code=refusal.status, headers=answer.raw_headers)
            for event in (response, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
