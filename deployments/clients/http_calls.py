"""Calls of an app over HTTP: each has a deadline, and every failure is typed."""

from __future__ import annotations

import json
import ssl
import urllib.parse
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2

from cosmos3_core.errors import RequestError
from deployments.clients.deadline import Deadline
from deployments.clients.errors import AnswerError, UnreachableError, refusal

JSON = "application/json"
# Of what a server says about an error.
_MAX_TEXT_BYTES = 1 << 16
_MAX_JSON_BYTES = 1 << 26
_CONNECT_S = 10.0
# Streams hold one each.
_MAX_CONNECTIONS = 256
_MAX_HEADER_CHARS = 256


@dataclass(frozen=True)
class Connecting:
    """How an app is reached.

    Attributes:
        proxy: URL of an HTTP proxy. Those of the environment are not heeded: what listens on this machine is asked
            directly, and nobody else gets the key.
        certificates: that an https server is trusted by; None: the public ones.
        transport: in place of the network, in tests say.
    """

    proxy: str | None = None
    certificates: ssl.SSLContext | None = None
    transport: httpx2.AsyncBaseTransport | None = None


DIRECTLY = Connecting()


class HttpCalls:
    """An app's URL, and the connections to it. Of one event loop.

    Args:
        url: of the app; its path goes before every call's.
        api_key: None where the app asks for none.
        connecting: see the class.

    Raises:
        RequestError: not a URL, or a key that no header can hold.
    """

    def __init__(self, url: str, api_key: str | None = None, connecting: Connecting = DIRECTLY) -> None:
        self.url = url
        self._base = _base(url)
        headers = {"accept-encoding": "identity"}  # what is read is what was sent, and as long as it says
        if api_key is not None:
            if not api_key or not api_key.isascii() or not api_key.isprintable() or " " in api_key:
                raise RequestError("api_key", "***", "printable ASCII characters without a space, one at least")
            headers["authorization"] = f"Bearer {api_key}"
        # Reading certificates takes a moment, which an app on this machine does without.
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
    async def answer(
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
        """Send a request and wait until its answer begins.

        Args:
            method, path: of the call.
            deadline: for the whole answer.
            body: JSON.
            headers: besides those of every call.
            params: of the URL.
            silence_s: for which nothing may come before the connection counts as dead.

        Raises:
            UnreachableError: also while the answer is read.
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
        with self._typed_errors(deadline):
            response = await deadline.wait(self._http.send(request, stream=True))
        try:
            yield Answer(self, response, deadline)
        finally:
            await response.aclose()

    async def json(
        self,
        method: str,
        path: str,
        *,
        deadline: Deadline,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        params: Mapping[str, str | int] | None = None,
    ) -> dict[str, Any]:
        """What a call answers, a JSON object.

        Raises:
            UnreachableError: see the class.
            Cosmos3Error: what a refusal means.
        """
        call = self.answer(method, path, deadline=deadline, body=body, headers=headers, params=params)
        async with call as answer:
            await answer.check((headers or {}).get("idempotency-key"))
            return await answer.json()

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    @contextmanager
    def _typed_errors(self, deadline: Deadline) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise UnreachableError(f"{self.url}: no complete answer within {deadline.limit_s:g} s") from None
        except httpx2.PoolTimeout:
            raise UnreachableError(f"{self.url}: all {_MAX_CONNECTIONS} connections of this client are busy") from None
        except httpx2.ReadTimeout:
            raise UnreachableError(f"{self.url}: nothing came for too long; the connection is dead") from None
        except (httpx2.HTTPError, OSError, ValueError) as error:  # a host's name may be no name at all
            if _is_refused(error):
                hint = "nothing listens there; `cosmos3 serve` starts an app"
                raise UnreachableError(f"{self.url}: {hint}") from None
            raise UnreachableError(f"{self.url}: {type(error).__name__}: {error}") from None


class Answer:
    """The answer to one call.

    Args:
        calls: whose.
        response: that has begun.
        deadline: for all of it.
    """

    def __init__(self, calls: HttpCalls, response: httpx2.Response, deadline: Deadline) -> None:
        self._calls, self._response, self._deadline = calls, response, deadline

    @property
    def status(self) -> int:
        """As HTTP has it."""
        return self._response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        """Of any case."""
        return self._response.headers

    @property
    def media_type(self) -> str:
        """Of the body, without its parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    async def check(self, idempotency_key: str | None = None) -> None:
        """Go on if the server said yes.

        Raises:
            Cosmos3Error: what its no means, see :func:`deployments.clients.errors.refusal`.
        """
        if not 200 <= self.status < 300:
            reason = self._response.reason_phrase
            raise refusal(self.status, reason, self.headers, await self.text(), idempotency_key)

    async def parts(self) -> AsyncGenerator[bytes, None]:
        """The body as it comes.

        Raises:
            UnreachableError: it broke off, or is not there in time.
        """
        parts, num_bytes = self._response.aiter_raw(), 0
        while True:
            with self._calls._typed_errors(self._deadline):
                try:
                    part = await self._deadline.wait(anext(parts))
                except StopAsyncIteration:
                    return
                except (httpx2.RemoteProtocolError, httpx2.ReadError):
                    announced = self.headers.get("content-length")
                    size = f"{num_bytes} bytes" if announced is None else f"{num_bytes} of {announced} bytes"
                    raise UnreachableError(f"{self._calls.url}: the answer broke off after {size}") from None
            num_bytes += len(part)
            yield part

    async def content(self, max_bytes: int) -> bytes:
        """The body, cut off at a length."""
        content = bytearray()
        async for part in self.parts():
            content += part
            if len(content) >= max_bytes:
                break
        return bytes(content[:max_bytes])

    async def text(self) -> str:
        """The body, cut off where it is longer than any message."""
        return (await self.content(_MAX_TEXT_BYTES)).decode("utf-8", "replace")

    async def json(self, max_bytes: int = _MAX_JSON_BYTES) -> dict[str, Any]:
        """The body as a JSON object.

        Raises:
            AnswerError: it is none, or larger than that.
        """
        try:
            answer = json.loads(await self.content(max_bytes))
            if not isinstance(answer, dict):
                raise TypeError
        except (ValueError, TypeError):
            raise self.foreign() from None
        return answer

    def foreign(self) -> AnswerError:
        """What to raise where the answer is not as this API's are."""
        return AnswerError(self.status, f"{self._calls.url} answers, but not as this API does; is it a cosmos3 app?")


def _base(url: str) -> str:
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


def _is_refused(error: BaseException) -> bool:
    """Whether somewhere in an error's causes a connection was refused."""
    todo, seen = [error], set()
    while todo:
        now = todo.pop()
        if isinstance(now, ConnectionRefusedError):
            return True
        if id(now) in seen:
            continue
        seen.add(id(now))
        todo += [cause for cause in (now.__cause__, now.__context__) if cause is not None]
        if isinstance(now, BaseExceptionGroup):
            todo += now.exceptions
    return False
