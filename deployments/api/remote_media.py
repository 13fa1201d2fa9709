"""Files of other servers, fetched for requests that name them by URL: from listed hosts and public addresses only.

The name in a URL is resolved once, all its addresses are checked, and the connection goes to them alone: a later
answer of the resolver does not matter. Each redirect is checked as a new URL. Nothing is taken from the environment,
not even proxies.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from ipaddress import ip_address
from typing import Any
from urllib.parse import urljoin

import httpcore2

from cluster.errors import OverloadedError
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from deployments.api.body_reader import Reservation
from deployments.api.field_types import find_urls, refuse_too_large
from deployments.api.remote_url import HostRule, IPAddress, RemoteUrl, UrlRefused, is_public, redact_url
from deployments.config import RemoteMediaConfig
from deployments.errors import ApiError
from deployments.threads import run_in_thread

# Each has a file in memory.
_MAX_FETCHES = 4
# For one of several addresses that a name has.
_CONNECT_S = 5.0
_REDIRECTS = (301, 302, 303, 307, 308)
_RETRY_S = 5.0
_MAX_SHOWN_HOSTS = 10
_MAX_SHOWN_CHARS = 200


FetchFile = Callable[[str, str], Awaitable[bytes]]
"""URL, the field that has it -> the file, as :meth:`RemoteMediaFetcher.fetch` fetches it."""


async def fetch_remote(values: dict[str, Any], fetch: FetchFile, reserved: Reservation) -> dict[str, Any]:
    """Return a body's fields with fetched files in place of URLs; the body's memory grows by the files.

    While a file is on its way, room for the largest allowed one is reserved. Raises OverloadedError without room, and
    as :meth:`RemoteMediaFetcher.fetch`.
    """
    fetched = dict(values)
    for name, url in (await run_in_thread(find_urls, values)).items():
        num_bytes = reserved.num_bytes
        reserved.grow_to(num_bytes + LIMITS.max_media_bytes)
        data = await fetch(url, name)
        refuse_too_large(name, len(data))
        reserved.shrink_to(num_bytes + len(data))
        fetched[name] = data
    return fetched


def resolve_with_system(host: str, port: int) -> Sequence[str]:
    """Return the addresses that the system's resolver has for a name; block, and raise OSError if there are none."""
    return [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class RemoteMediaFetcher:
    """Fetcher of files from other servers; raises ConfigError if an entry of ``config.hosts`` is no host.

    ``resolve`` (name, port -> addresses) runs in a thread; ``tls`` defaults to the system's trusted authorities.
    """

    def __init__(
        self,
        config: RemoteMediaConfig,
        *,
        resolve: Callable[[str, int], Sequence[str]] = resolve_with_system,
        is_allowed_address: Callable[[IPAddress], bool] = is_public,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._config = config
        self._max_bytes = min(config.max_bytes, LIMITS.max_media_bytes)  # larger files are refused later anyway
        self._rules = tuple(HostRule.parse(entry) for entry in config.hosts)
        self._resolve, self._is_allowed_address = resolve, is_allowed_address
        self._tls = ssl.create_default_context() if tls is None else tls
        self._places = asyncio.Semaphore(_MAX_FETCHES)
        # Threads of its own: a resolver that hangs cannot be stopped, and would take those that others need.
        self._resolvers = ThreadPoolExecutor(_MAX_FETCHES, thread_name_prefix="resolver")

    async def fetch(self, url: str, field: str) -> bytes:
        """Fetch the file at a URL that a client gave in a field.

        Raises:
            RequestError: the URL, or one that it redirects to, may not be fetched, or the file is too large.
            ApiError: the server cannot be reached, fails, or is too slow; 422, as the client chose it.
            OverloadedError: too many files are being fetched.
        """
        limit = asyncio.timeout(self._config.timeout_s)
        has_place = False
        try:
            async with limit, self._places:
                has_place = True
                return await self._follow(url)
        except UrlRefused as error:
            raise RequestError(field, redact_url(url), error.allowed or self._allowed, str(error)) from None
        except (_RemoteFault, httpcore2.NetworkError, httpcore2.ProtocolError, httpcore2.TimeoutException) as error:
            code, fault, shown = "remote_unavailable", f": {_describe(error)}", redact_url(url)[:_MAX_SHOWN_CHARS]
        except TimeoutError:
            if not limit.expired():
                raise
            if not has_place:
                raise OverloadedError("files fetched from other servers", _MAX_FETCHES, _RETRY_S) from None
            code, fault, shown = "remote_timeout", f" within {self._config.timeout_s:g} s", redact_url(url)
        # 422, not 502 or 504: clients take those for our failure, and retry.
        raise ApiError(422, code, f"{field}: {shown} could not be fetched{fault}; send the file itself")

    @property
    def _allowed(self) -> str:
        hosts = self._config.hosts
        shown = ", ".join(hosts[:_MAX_SHOWN_HOSTS]) + (", ..." if len(hosts) > _MAX_SHOWN_HOSTS else "")
        return f"a URL of {' or '.join(sorted(self._config.schemes))} on {shown}"

    async def _follow(self, url: str) -> bytes:
        """Fetch the file at a URL, or where its server redirects to."""
        here = self._check_url(url)
        for _ in range(self._config.max_redirects + 1):
            async with self._get(here, await self._find_addresses(here)) as answer:
                if answer.status not in _REDIRECTS:
                    return await self._read_body(answer)
                locations = _header_values(answer, b"location")
            here = self._redirect(here, locations)
        raise UrlRefused(f"It redirects more than {self._config.max_redirects} times.")

    def _check_url(self, url: str) -> RemoteUrl:
        parsed = RemoteUrl.parse(url)
        if parsed.scheme not in self._config.schemes:
            raise UrlRefused(f"{parsed.scheme} is not allowed.")
        if not any(rule.covers(parsed) for rule in self._rules):
            raise UrlRefused("Its host, or its port, is not among those that are allowed.")
        return parsed

    def _redirect(self, here: RemoteUrl, locations: Sequence[bytes]) -> RemoteUrl:
        """Return the target of a redirect. Messages do not repeat it: only the other server may reveal it."""
        if len(locations) != 1:
            raise _RemoteFault(f"its server redirects with {len(locations)} targets")
        try:
            location = locations[0].decode()
        except UnicodeDecodeError:
            raise UrlRefused("It redirects to what is no URL.") from None
        try:
            there = self._check_url(urljoin(f"{here.scheme}://{here.host_header}{here.target}", location))
        except (UrlRefused, ValueError):
            raise UrlRefused("It redirects to a URL that is not allowed.") from None
        if (here.scheme, there.scheme) == ("https", "http"):
            raise UrlRefused("It redirects from https to http.")
        return there

    async def _find_addresses(self, url: RemoteUrl) -> list[IPAddress]:
        """Return the addresses to connect to, all of them allowed."""
        addresses = [url.address] if url.address is not None else await self._look_up(url)
        if not all(self._is_allowed_address(address) for address in addresses):
            raise UrlRefused("Its host is not of the public internet.")
        return addresses

    async def _look_up(self, url: RemoteUrl) -> list[IPAddress]:
        loop = asyncio.get_running_loop()
        try:
            texts = await loop.run_in_executor(self._resolvers, self._resolve, url.host, url.port)
            addresses = [ip_address(text) for text in dict.fromkeys(texts)]
        except (OSError, ValueError):
            addresses = []
        if not addresses:
            raise _RemoteFault("its host is not known")
        return addresses

    @asynccontextmanager
    async def _get(self, url: RemoteUrl, addresses: Sequence[IPAddress]) -> AsyncIterator[httpcore2.Response]:
        """Send one request on a connection of its own."""
        target = httpcore2.URL(scheme=url.scheme, host=url.host, port=url.port, target=url.target)
        headers = [
            ("Host", url.host_header),
            ("Accept", "*/*"),
            ("Accept-Encoding", "identity"),
            ("Connection", "close"),
        ]
        backend = _PinnedBackend(addresses)
        async with (
            httpcore2.AsyncConnectionPool(
                ssl_context=self._tls, max_connections=1, network_backend=backend
            ) as connection,
            connection.stream("GET", target, headers=headers) as answer,
        ):
            yield answer

    async def _read_body(self, answer: httpcore2.Response) -> bytes:
        if answer.status != 200:
            raise _RemoteFault(f"its server answers with the status {answer.status}")
        if [it.lower() for it in _header_values(answer, b"content-encoding")] not in ([], [b"identity"]):
            raise _RemoteFault("its server sends it compressed, though asked not to")
        announced = _header_values(answer, b"content-length")
        self._refuse_too_large(int(announced[0]) if announced else 0)
        data = bytearray()
        async for part in answer.aiter_stream():
            self._refuse_too_large(len(data) + len(part))
            data += part
        return bytes(data)

    def _refuse_too_large(self, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise UrlRefused("Name a smaller file.", f"a file of at most {self._max_bytes} bytes")


class _RemoteFault(Exception):
    """A fault of the other server; the message has no addresses."""


class _PinnedBackend(httpcore2.AsyncNetworkBackend):
    """Network backend that connects to checked addresses, not to the host; TLS still verifies the host."""

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
        """Connect to the first address that accepts; raise ConnectError if none does."""
        for address in self._addresses:
            try:
                return await self._backend.connect_tcp(str(address), port, _CONNECT_S, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        raise httpcore2.ConnectError


def _header_values(answer: httpcore2.Response, name: bytes) -> list[bytes]:
    return [value.strip() for key, value in answer.headers if key.lower() == name]


def _describe(error: Exception) -> str:
    """Describe a fault without addresses."""
    if isinstance(error, _RemoteFault):
        return str(error)
    if isinstance(error.__context__, ssl.SSLCertVerificationError):  # the cause httpcore2 hides
        return "its server's certificate is not valid for this name, or not trusted here"
    if isinstance(error, httpcore2.ConnectError | httpcore2.ConnectTimeout):
        return "its server takes no connection"
    return "its server's answer broke off, or is no HTTP"
