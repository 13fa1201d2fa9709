"""Files of other servers, fetched for requests that name them by URL: from listed hosts and public addresses only.

The name in a URL is looked up once, all its addresses are checked, and the connection goes to these addresses and no
others: what a second look-up would say does not matter. Each redirect is a new URL, checked as the first was. Nothing
is taken from the environment, proxies neither.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from ipaddress import ip_address
from urllib.parse import urljoin

import httpcore2

from cluster.errors import OverloadedError
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from deployments.api.public_address import IPAddress, is_public
from deployments.api.remote_url import HostRule, RemoteUrl, UnfitUrl, shown_url
from deployments.config import RemoteMediaConfig
from deployments.errors import ApiError

# Each has a file in memory.
_MAX_FETCHES = 4
# For one of several addresses that a name has.
_CONNECT_S = 5.0
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRY_S = 5.0
_MAX_SHOWN_HOSTS = 10
_MAX_SHOWN_CHARS = 200


def system_addresses(host: str, port: int) -> Sequence[str]:
    """Return all addresses that the system's resolver has for a name; blocks.

    Raises:
        OSError: there are none.
    """
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class RemoteMediaFetcher:
    """Fetcher of files from other servers.

    Args:
        spec: what may be fetched, how much, and how long it may take.
        resolve: name, port -> addresses; called in a thread.
        is_allowed_address: whether an address may be connected to.
        tls: whom to trust; the system's authorities if omitted.

    Raises:
        ConfigError: a host of ``spec`` is none.
    """

    def __init__(
        self,
        spec: RemoteMediaConfig,
        *,
        resolve: Callable[[str, int], Sequence[str]] = system_addresses,
        is_allowed_address: Callable[[IPAddress], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._spec = spec
        self._max_bytes = min(spec.max_bytes, LIMITS.max_media_bytes)  # what is larger is refused all the same
        self._rules = tuple(HostRule.parse(entry) for entry in spec.hosts)
        self._resolve = resolve
        self._is_allowed_address = is_allowed_address
        self._tls = ssl.create_default_context() if tls is None else tls
        self._places = asyncio.Semaphore(_MAX_FETCHES)
        # Threads of its own: a resolver that hangs cannot be stopped, and would take those that others need.
        self._resolvers = ThreadPoolExecutor(_MAX_FETCHES, thread_name_prefix="resolver")

    async def fetch(self, url: str, field: str) -> bytes:
        """Fetch the file at a URL.

        Args:
            url: as the client gave it.
            field: that it was given in, for messages.

        Raises:
            RequestError: it may not be fetched, or leads to what may not, or is too large.
            ApiError: the server cannot be reached, fails, or is too slow; 422, as it was the client who chose it.
            OverloadedError: too many files are being fetched.
        """
        if not self._spec.enabled:
            allowed = "a file part of a multipart form, a data URL (data:image/png;base64,...), or base64"
            raise RequestError(field, shown_url(url), allowed, "URLs are not fetched: send the file itself.")
        limit = asyncio.timeout(self._spec.timeout_s)
        has_place = False
        try:
            async with limit, self._places:
                has_place = True
                return await self._followed(url, field)
        except UnfitUrl as error:
            raise RequestError(field, shown_url(url), self._allowed, str(error)) from None
        except TimeoutError:
            if not limit.expired():
                raise
        if not has_place:
            raise OverloadedError("files fetched from other servers", _MAX_FETCHES, _RETRY_S)
        message = (
            f"{field}: {shown_url(url)} could not be fetched within {self._spec.timeout_s:g} s; send the file itself"
        )
        raise ApiError(422, "remote_timeout", message)

    @property
    def _allowed(self) -> str:
        hosts = ", ".join(self._spec.hosts[:_MAX_SHOWN_HOSTS]) + (", ..." * (len(self._spec.hosts) > _MAX_SHOWN_HOSTS))
        return f"a URL of {' or '.join(sorted(self._spec.schemes))} on {hosts}"

    async def _followed(self, url: str, field: str) -> bytes:
        """Fetch the file at a URL, or return where its server says it is."""
        try:
            here = self._checked(url)
            for _ in range(self._spec.max_redirects + 1):
                async with self._answer(here, await self._addresses(here)) as answer:
                    if answer.status not in _REDIRECTS:
                        return await self._body(answer, url, field)
                    location = _one_header(answer, b"location")
                here = self._redirected(here, url, location)
        except (_RemoteFault, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            raise _refusal("remote_unavailable", field, url, _in_words(error)) from None
        raise UnfitUrl(f"It redirects more than {self._spec.max_redirects} times.")

    def _checked(self, url: str) -> RemoteUrl:
        parsed = RemoteUrl.parse(url)
        if parsed.scheme not in self._spec.schemes:
            raise UnfitUrl(f"{parsed.scheme} is not allowed.")
        if not any(rule.covers(parsed) for rule in self._rules):
            raise UnfitUrl("Its host, or its port, is not among those that are allowed.")
        return parsed

    def _redirected(self, here: RemoteUrl, url: str, location: str) -> RemoteUrl:
        """Return where a redirect leads.

        Its target is not repeated in messages: it is the other server's business what it gives away, not ours.
        """
        try:
            there = self._checked(urljoin(f"{here.scheme}://{here.host_header}{here.target}", location))
        except (UnfitUrl, ValueError):
            raise UnfitUrl("It redirects to a URL that is not allowed.") from None
        if (here.scheme, there.scheme) == ("https", "http"):
            raise UnfitUrl("It redirects from https to http.")
        return there

    async def _addresses(self, url: RemoteUrl) -> list[IPAddress]:
        """Return the addresses to connect to, all of them allowed.

        Raises:
            UnfitUrl: one is not.
        """
        addresses = [url.address] if url.address is not None else await self._resolved(url)
        if not all(self._is_allowed_address(address) for address in addresses):
            raise UnfitUrl("Its host is not of the public internet.")
        return addresses

    async def _resolved(self, url: RemoteUrl) -> list[IPAddress]:
        loop = asyncio.get_running_loop()
        try:
            texts = await loop.run_in_executor(self._resolvers, self._resolve, url.host, url.port)
            addresses = [ip_address(text) for text in texts]
        except (OSError, ValueError):
            raise _RemoteFault("its host is not known") from None
        if not addresses:
            raise _RemoteFault("its host is not known")
        return list(dict.fromkeys(addresses))

    @asynccontextmanager
    async def _answer(self, url: RemoteUrl, addresses: Sequence[IPAddress]) -> AsyncIterator[httpcore2.Response]:
        """Return the answer to one request on a connection of its own."""
        target = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
        headers = [
            ("Host", url.host_header),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        async with (
            httpcore2.AsyncConnectionPool(
                ssl_context=self._tls, max_connections=1, network_backend=_Pinned(addresses)
            ) as connection,
            connection.stream("GET", target, headers=headers) as answer,
        ):
            yield answer

    async def _body(self, answer: httpcore2.Response, url: str, field: str) -> bytes:
        if answer.status != 200:
            raise _RemoteFault(f"its server answers with the status {answer.status}")
        if _header_values(answer, b"content-encoding") not in ([], [b"identity"]):
            raise _RemoteFault("its server sends it compressed, though asked not to")
        announced = _header_values(answer, b"content-length")
        self._refuse_too_large(int(announced[0]) if announced else 0, url, field)
        parts: list[bytes] = []
        num_bytes = 0
        async for part in answer.aiter_stream():
            num_bytes += len(part)
            self._refuse_too_large(num_bytes, url, field)
            parts.append(part)
        return b"".join(parts)

    def _refuse_too_large(self, num_bytes: int, url: str, field: str) -> None:
        if num_bytes > self._max_bytes:
            raise RequestError(
                field, shown_url(url), f"a file of at most {self._max_bytes} bytes", "Name a smaller file."
            )


class _RemoteFault(Exception):
    """A fault of the other server; the message has no addresses."""


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Network backend that connects to checked addresses whatever the host; TLS still verifies the host."""

    def __init__(self, addresses: Sequence[IPAddress]) -> None:
        self._addresses = addresses
        self._backend = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """Connect to the first address that accepts.

        Raises:
            ConnectError: none does.
        """
        for address in self._addresses:
            try:
                return await self._backend.connect_tcp(str(address), port, _CONNECT_S, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        raise httpcore2.ConnectError


def _header_values(answer: httpcore2.Response, name: bytes) -> list[bytes]:
    return [value.strip().lower() for key, value in answer.headers if key.lower() == name]


def _one_header(answer: httpcore2.Response, name: bytes) -> str:
    values = [value for key, value in answer.headers if key.lower() == name]
    if len(values) != 1:
        raise _RemoteFault(f"its server redirects with {len(values)} targets")
    try:
        return values[0].decode()
    except UnicodeDecodeError:
        raise UnfitUrl("It redirects to what is no URL.") from None


def _refusal(code: str, field: str, url: str, reason: str) -> ApiError:
    # 422 and not 502 or 504, which clients take for ours and try again by themselves.
    shown = shown_url(url)[:_MAX_SHOWN_CHARS]
    return ApiError(422, code, f"{field}: {shown} could not be fetched: {reason}; send the file itself")


def _in_words(error: Exception) -> str:
    """Return what went wrong, without addresses."""
    if isinstance(error, _RemoteFault):
        return str(error)
    if isinstance(error.__context__, ssl.SSLCertVerificationError):  # the cause httpcore2 hides
        return "its server's certificate is not valid for this name, or not trusted here"
    if isinstance(error, httpcore2.ConnectError | httpcore2.ConnectTimeout):
        return "its server takes no connection"
    return "its server's answer broke off, or is no HTTP"
