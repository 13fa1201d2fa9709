"""HTTP calls to an app: each has a deadline, and every failure is typed."""

from __future__ import annotations

import json
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import aclosing, asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import httpx2

from cosmos3_core.errors import RequestError
from deployments.api_model import JSON
from deployments.clients.errors import AnswerError, UnreachableError, read_refusal
from deployments.clients.transport import Deadline

# Longest error message that is read.
_MAX_TEXT_BYTES = 1 << 16
_MAX_JSON_BYTES = 1 << 26
# Bound of one event's text: a finished video with its actions is far below.
_MAX_EVENT_BYTES = 1 << 24
_CONNECT_S = 10.0
# Each open stream holds one.
_MAX_CONNECTIONS = 256
_MAX_HEADER_CHARS = 256

_T = TypeVar("_T")


@dataclass(frozen=True)
class Connecting:
    """How an app is reached.

    Attributes:
        proxy: URL of an HTTP proxy. Proxies of the environment are not used: an app on this machine is reached
            directly, and the API key goes to no other server.
        certificates: to verify an https server with; None: the public ones.
        transport: replaces the network, in tests for example.
    """

    proxy: str | None = None
    certificates: ssl.SSLContext | None = None
    transport: httpx2.AsyncBaseTransport | None = None


DIRECTLY = Connecting()


class HttpConnection:
    """The connections to one app, for one event loop. The path of ``url`` goes before every call's.

    Raises RequestError if ``url`` is not a URL, or no header can hold the key.
    """

    def __init__(self, url: str, api_key: str | None = None, connecting: Connecting = DIRECTLY) -> None:
        self.url = url
        self._base = _normalize_url(url)
        headers = {"accept-encoding": "identity"}  # so that content-length counts the bytes that are read
        if api_key is not None:
            if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
                raise RequestError("api_key", "***", "printable ASCII characters without a space, one at least")
            headers["authorization"] = f"Bearer {api_key}"
        # Certificates are read for https only: that takes a moment.
        certificates: ssl.SSLContext | bool = connecting.certificates or self._base.startswith("https:")
        self._http = httpx2.AsyncClient(
            headers=headers,
            proxy=connecting.proxy,
            verify=certificates,
            transport=connecting.transport,
            trust_env=False,
            follow_redirects=False,  # the key is for this server
            limits=httpx2.Limits(max_connections=_MAX_CONNECTIONS),
        )

    @asynccontextmanager
    async def send(
        self,
        method: str,
        path: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
        silence_s: float | None = None,
    ) -> AsyncIterator[Answer]:
        """Send a request and yield its answer when that begins.

        Args:
            deadline: for the whole answer.
            body: JSON.
            silence_s: longest silence before the connection counts as dead; None: no bound.

        Raises UnreachableError, also while the answer is read.
        """
        sent = dict(headers or {})
        for name, value in sent.items():
            _check_header(name, value)
        if body is not None:
            sent["content-type"] = JSON
        limits = httpx2.Timeout(silence_s, connect=_CONNECT_S, pool=_CONNECT_S)
        request = self._http.build_request(
            method, self._base + path, content=body, headers=sent, params=params, timeout=limits
        )
        with _translate_errors(self.url, deadline):
            response = await deadline.wait(self._http.send(request, stream=True))
        try:
            yield Answer(self.url, response, deadline)
        finally:
            await response.aclose()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


class Answer:
    """The answer to one call; its body is still to be read."""

    def __init__(self, url: str, response: httpx2.Response, deadline: Deadline) -> None:
        self._url, self._response, self._deadline = url, response, deadline

    @property
    def status(self) -> int:
        """HTTP status."""
        return self._response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        """Headers; names in any case."""
        return self._response.headers

    @property
    def media_type(self) -> str:
        """Media type of the body, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def check(self, idempotency_key: str | None = None) -> None:
        """Raise the error of :func:`~deployments.clients.errors.read_refusal` if the server refused."""
        if not 200 <= self.status < 300:
            reason = self._response.reason_phrase
            raise read_refusal(self.status, reason, self.headers, await self.read_text(), idempotency_key)

    def iter_parts(self) -> AsyncGenerator[bytes, None]:
        """Yield the body as it arrives; raise UnreachableError if it breaks off, or is not complete in time."""
        return self._iterate(self._response.aiter_raw())

    async def iter_events(self) -> AsyncGenerator[RawEvent, None]:
        """Yield the body's server-sent events; raise as :meth:`iter_parts`, and AnswerError for an invalid event."""
        last_id = ""
        async with aclosing(self._iterate(aiter(httpx2.EventSource(self._response, _MAX_EVENT_BYTES)))) as events:
            async for event in events:
                if event.data:
                    # An event without an id repeats the last one's, as the HTML standard says.
                    yield _parse_event(event, "" if event.id == last_id else event.id)
                last_id = event.id

    async def _iterate(self, items: AsyncIterator[_T]) -> AsyncGenerator[_T, None]:
        while True:
            with _translate_errors(self._url, self._deadline):
                try:
                    item = await self._deadline.wait(anext(items))
                except StopAsyncIteration:
                    return
                except (httpx2.RemoteProtocolError, httpx2.ReadError):
                    announced, num_bytes = self.headers.get("content-length"), self._response.num_bytes_downloaded
                    size = f"{num_bytes} bytes" if announced is None else f"{num_bytes} of {announced} bytes"
                    raise UnreachableError(f"{self._url}: the answer broke off after {size}") from None
            yield item

    async def read_text(self) -> str:
        """Return the body as text, cut off beyond the length of any message."""
        return (await self._read(_MAX_TEXT_BYTES)).decode("utf-8", "replace")

    async def read_json(self, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
        """Return the body; raise AnswerError if it is not a JSON object of at most ``max_bytes``."""
        try:
            answer = json.loads(await self._read(max_bytes))
            if not isinstance(answer, dict):
                raise TypeError
        except (ValueError, TypeError):
            raise self.make_foreign_error() from None
        return answer

    async def _read(self, max_bytes: int) -> bytes:
        """Return the body, cut off at a length."""
        content = bytearray()
        async for part in self.iter_parts():
            content += part
            if len(content) >= max_bytes:
                break
        return bytes(content[:max_bytes])

    def make_foreign_error(self) -> AnswerError:
        """Return the error for an answer that is not of this API."""
        return AnswerError(self.status, f"{self._url} answers, but not as this API does; is it a cosmos3 app?")


class RawEvent(NamedTuple):
    """An event as it was sent; ``seq`` is its number in the video's history, None for events that are not stored."""

    seq: int | None
    kind: str
    data: Mapping[str, Any]


def _parse_event(event: httpx2.ServerSentEvent, number: str) -> RawEvent:
    try:
        values = json.loads(event.data)
        if not isinstance(values, dict):
            raise TypeError
        return RawEvent(int(number) if number else None, event.event, values)
    except (ValueError, TypeError):
        raise AnswerError(200, f"the app sends an event {event.event!r} that is no JSON object") from None


@contextmanager
def _translate_errors(url: str, deadline: Deadline) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise UnreachableError(f"{url}: no complete answer within {deadline.limit_s:g} s") from None
    except httpx2.SSEError as error:
        raise AnswerError(200, f"{url}: {error}") from None
    except httpx2.PoolTimeout:
        raise UnreachableError(f"{url}: all {_MAX_CONNECTIONS} connections of this client are busy") from None
    except httpx2.ReadTimeout:
        raise UnreachableError(f"{url}: nothing came for too long; the connection is dead") from None
    except (httpx2.HTTPError, OSError, ValueError) as error:  # ValueError: a host name that cannot be encoded
        if _is_refused(error):
            raise UnreachableError(f"{url}: nothing listens there; `cosmos3 serve` starts an app") from None
        raise UnreachableError(f"{url}: {type(error).__name__}: {error}") from None


def _is_refused(error: BaseException | None) -> bool:
    """Return whether a refused connection is the cause of an error."""
    if isinstance(error, BaseExceptionGroup):  # a name has several addresses
        return any(map(_is_refused, error.exceptions))
    return error is not None and (
        isinstance(error, ConnectionRefusedError) or _is_refused(error.__cause__ or error.__context__)
    )


def _normalize_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.username or parts.password:
            raise ValueError("no address")
        if any(character.isspace() for character in parts.netloc):
            raise ValueError("no address")
        _ = parts.port
        httpx2.URL(url)
    except (ValueError, TypeError, AttributeError, httpx2.InvalidURL):
        raise RequestError("url", url, "an address such as http://127.0.0.1:8000") from None
    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}"


def _check_header(name: str, value: str) -> None:
    if not value or len(value) > _MAX_HEADER_CHARS or not value.isascii() or not value.isprintable():
        field = name.replace("-", "_").removeprefix("x_")
        raise RequestError(field, value, f"1 to {_MAX_HEADER_CHARS} printable ASCII characters")
