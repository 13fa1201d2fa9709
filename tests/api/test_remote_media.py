"""Files of other servers: what is fetched and what never is. Servers run on loopback, behind a scripted resolver."""

from __future__ import annotations

import asyncio
import re
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from ipaddress import IPv4Address, ip_address
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import OverloadedError
from cosmos3_core.errors import RequestError
from deployments.api import remote_media
from deployments.api.remote_media import RemoteMediaFetcher
from deployments.api.remote_url import HostRule, RemoteUrl, UrlRefused, is_public
from deployments.config import ConfigError, RemoteMediaConfig
from deployments.errors import ApiError
from tests.settling import run

HOST, OTHER = "media.example.com", "other.example.org"
LOOPBACK = "127.0.0.1"
# A self-signed test certificate for HOST, valid until 2120.
CERTIFICATE = Path(__file__).parent / "media.example.com.pem"
TRUSTS_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reading the system's authorities is slow


def answer(body: bytes, *headers: str, status: str = "200 OK") -> bytes:
    lines = [f"HTTP/1.1 {status}", *headers]
    if not any(line.lower().startswith(("content-length", "transfer-encoding")) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", f"Location: {location}", status=status)


@dataclass
class Server:
    """A loopback server that answers by path and records requests."""

    answers: dict[str, bytes | Callable[[asyncio.StreamWriter], Awaitable[None]]]
    port: int = 0
    requests: list[str] = field(default_factory=list)

    @asynccontextmanager
    async def serve(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[None]:
        server = await asyncio.start_server(self._handle, LOOPBACK, 0, ssl=tls)
        self.port = server.sockets[0].getsockname()[1]
        # Redirects name the port, known only here.
        for path, given in self.answers.items():
            if isinstance(given, bytes):
                self.answers[path] = given.replace(b"PORT", str(self.port).encode())
        try:
            yield
        finally:
            server.close()  # as a context manager it waits for clients too, from Python 3.12 on

    async def _handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.requests.append(head)
            given = self.answers[head.split()[1]]
            if isinstance(given, bytes):
                writer.write(given)
                await writer.drain()
            else:
                await given(writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client has disconnected
        finally:
            writer.close()


@dataclass
class Resolver:
    """A resolver that gives scripted answers and repeats the last one."""

    answers: dict[str, list[list[str]]] = field(default_factory=lambda: {HOST: [[LOOPBACK]], OTHER: [[LOOPBACK]]})
    asked: list[str] = field(default_factory=list)

    def __call__(self, host: str, port: int) -> list[str]:
        self.asked.append(host)
        given = self.answers.get(host)
        if given is None:
            raise OSError("no such name, says 10.1.2.3")
        return given.pop(0) if len(given) > 1 else given[0]


def loopback_or_public(address: Any) -> bool:
    return address == IPv4Address(LOOPBACK) or is_public(address)


def fetch(
    answers: dict[str, Any],
    url: str,
    *,
    resolver: Resolver | None = None,
    hosts: tuple[str, ...] = (f"{HOST}:PORT", f"{OTHER}:PORT"),
    allowed: Callable[[Any], bool] = loopback_or_public,
    server: Server | None = None,
    **spec: Any,
) -> bytes:
    """Fetch from a server on the loopback; PORT in ``url``, ``hosts`` and redirects is its port."""
    server = server or Server(answers)

    async def body() -> bytes:
        async with server.serve():
            given = {
                "enabled": True,
                "hosts": tuple(host.replace("PORT", str(server.port)) for host in hosts),
                "schemes": ("http", "https"),
                **spec,
            }
            media = RemoteMediaFetcher(
                RemoteMediaConfig(**given),
                resolve=resolver or Resolver(),
                is_allowed_address=allowed,
                tls=TRUSTS_NOBODY,
            )
            return await media.fetch(url.replace("PORT", str(server.port)), "image_reference")

    result = run(body())
    assert isinstance(result, bytes)
    return result


def test_a_file_is_fetched_with_its_url_s_host_name() -> None:
    server = Server({"/a%20b.png?token=1": answer(b"pixels")})
    assert fetch({}, f"http://{HOST}:PORT/a%20b.png?token=1#part", server=server) == b"pixels"
    (request,) = server.requests
    headers = dict(line.split(": ") for line in request.strip().splitlines()[1:])
    assert headers == {
        "Host": f"{HOST}:{server.port}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }


def test_proxies_in_the_environment_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    assert fetch({"/": answer(b"direct")}, f"http://{HOST}:PORT") == b"direct"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed_and_each_host_is_resolved(status: int) -> None:
    resolver = Resolver()
    answers = {
        "/": redirect("/next?x=1", f"{status} Moved"),
        "/next?x=1": redirect(f"//{OTHER}:PORT/last"),
        "/last": answer(b"found"),
    }
    server = Server(answers)
    assert fetch({}, f"http://{HOST}:PORT/", server=server, resolver=resolver) == b"found"
    assert resolver.asked == [HOST, HOST, OTHER]
    assert f"Host: {OTHER}:{server.port}" in server.requests[-1]


def test_a_name_is_resolved_once() -> None:
    """DNS rebinding: public when it is checked, private when it is connected to."""
    resolver = Resolver({HOST: [[LOOPBACK], ["10.0.0.1"]]})
    assert fetch({"/": answer(b"here")}, f"http://{HOST}:PORT/", resolver=resolver) == b"here"
    assert resolver.asked == [HOST]


def test_the_connection_goes_to_the_checked_address() -> None:
    # The system would resolve "localhost" itself; the scripted resolver gives another address.
    resolver = Resolver({"localhost": [["198.51.100.1"]]})
    server = Server({"/": answer(b"here")})
    with pytest.raises(RequestError):
        fetch({}, "http://localhost:PORT/", resolver=resolver, hosts=("localhost:PORT",), server=server)
    assert server.requests == []


def test_the_next_address_is_tried_if_one_refuses() -> None:
    resolver = Resolver({HOST: [["127.0.0.2", LOOPBACK]]})
    answers = {"/": answer(b"here")}
    assert fetch(answers, f"http://{HOST}:PORT/", resolver=resolver, allowed=lambda address: True) == b"here"


PRIVATE = [
    *("10.0.0.1", "172.16.5.5", "192.168.1.1", "127.0.0.53", "169.254.169.254", "100.64.0.1", "100.100.100.200"),
    *("0.0.0.0", "224.0.0.1", "240.0.0.1", "255.255.255.255", "168.63.129.16", "192.0.0.192", "198.18.0.1"),
    *("192.0.2.1", "192.88.99.1", "198.51.100.1", "203.0.113.1"),
    *("::", "::1", "fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "fd20:ce::254", "ff02::1", "ff0e::1"),
    *("::ffff:10.0.0.1", "::ffff:169.254.169.254", "2002:a00:1::", "2002:7f00:1::1", "64:ff9b::10.0.0.1"),
    *("64:ff9b::a9fe:a9fe", "64:ff9b:1::1", "2001:db8::1", "2001::1", "3fff::1", "::127.0.0.1", "100::1", "5f00::1"),
]
PUBLIC = [
    *("8.8.8.8", "1.1.1.1", "172.32.0.1", "100.128.0.1", "192.0.1.1", "198.20.0.1", "223.255.255.254"),
    *("2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8", "2002:808:808::1"),
]


@pytest.mark.parametrize("text", PRIVATE)
def test_private_addresses_are_not_public(text: str) -> None:
    assert not is_public(ip_address(text))


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses_are_public(text: str) -> None:
    assert is_public(ip_address(text))


@pytest.mark.parametrize(
    "addresses", [["10.0.0.1"], [LOOPBACK], ["8.8.8.8", "10.0.0.1"], ["8.8.8.8", "::ffff:10.0.0.1"], ["fd00:ec2::254"]]
)
def test_a_name_with_one_private_address_is_refused(addresses: list[str]) -> None:
    server = Server({"/": answer(b"secret")})
    with pytest.raises(RequestError) as caught:
        fetch({}, f"http://{HOST}:PORT/", resolver=Resolver({HOST: [addresses]}), allowed=is_public, server=server)
    assert server.requests == []
    assert not any(address in str(caught.value) for address in addresses), "nobody learns what a name stands for"
    assert caught.value.field == "image_reference"


@pytest.mark.parametrize(
    "location",
    [
        "http://10.0.0.1/",
        "http://169.254.169.254/latest/meta-data/",
        "http://inside.example.com:PORT/",
        f"http://user:secret@{HOST}:PORT/",
        f"http://{HOST}/",
        f"http://{HOST}:PORT/\\@evil",
        "file:///etc/passwd",
        "gopher://media.example.com/",
        "http://[::1]/",
        "http://[",
        "http://unlisted.example.net/secret",
    ],
)
def test_a_redirect_to_an_unlisted_url_is_refused(location: str) -> None:
    server = Server({"/": redirect(location)})
    with pytest.raises(RequestError) as caught:
        fetch({}, f"http://{HOST}:PORT/", server=server)
    assert len(server.requests) == 1
    assert "It redirects to" in caught.value.hint or "public" in caught.value.hint
    assert "10.0.0.1" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_redirect_to_a_listed_host_with_a_private_address_is_refused() -> None:
    server = Server({"/": redirect(f"http://{OTHER}:PORT/secret"), "/secret": answer(b"secret")})
    resolver = Resolver({HOST: [[LOOPBACK]], OTHER: [["127.0.0.2"]]})
    with pytest.raises(RequestError, match="public internet"):
        fetch({}, f"http://{HOST}:PORT/", server=server, resolver=resolver)
    assert len(server.requests) == 1


def test_redirects_are_bounded() -> None:
    server = Server({"/": redirect("/")})
    with pytest.raises(RequestError, match="redirects more than 3 times"):
        fetch({}, f"http://{HOST}:PORT/", server=server, max_redirects=3)
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("https://user:secret@media.example.com/", "user name"),
        ("https://user@media.example.com/", "user name"),
        ("https://media.example.com@other.example.net/", "user name"),
        ("ftp://media.example.com/", "no URL of http"),
        ("file:///etc/passwd", "no URL of http"),
        ("file://media.example.com/etc/passwd", "no URL of http"),
        ("http:media.example.com", "no URL of http"),
        ("//media.example.com/", "no URL of http"),
        ("media.example.com", "no URL of http"),
        ("", "no URL of http"),
        ("http://media.example.com/", "http is not allowed"),
        ("https://", "no URL"),
        ("https:///etc/passwd", "no URL"),
        ("https://media.example.com:99999/", "no URL"),
        ("https://media.example.com:4 43/", "spaces"),
        ("https://media.example.com:8443/", "or its port"),
        ("https://media.example.com:80/", "or its port"),
        ("https://other.example.net/", "not among"),
        ("https://example.com/", "not among"),
        ("https://media.example.com.evil.net/", "not among"),
        ("https://evilmedia.example.com/", "not among"),
        ("https://below.example.org.evil.net/", "not among"),
        ("https://example.org/", "not among"),
        ("https://evilexample.org/", "not among"),
        ("https://127.0.0.1/", "not among"),
        ("https://2130706433/", "number"),
        ("https://0x7f000001/", "number"),
        ("https://0x7f.1/", "number"),
        ("https://0177.0.0.1/", "number"),
        ("https://127.1/", "number"),
        ("https://127.0.0.1.5/", "number"),
        ("https://127。0。0。1/", "not among"),
        ("https://①②⑦.0.0.1/", "not among"),
        ("https://[::1]/", "not among"),
        ("https://[::ffff:127.0.0.1]/", "not among"),
        ("https://[fe80::1%25eth0]/", "no address"),
        ("https://[::1/", "no URL"),
        ("https://media.example.com\\@evil.net/", "backslash"),
        ("https://media.example.com/\r\nX-Evil: 1", "line ends"),
        ("https://media.example.com/\x00", "control"),
        ("https://media.example.com/\u2028", "line ends"),
        ("https://media..example.com/", "no name"),
        ("https://-media.example.com/", "no name"),
        ("https://%6dedia.example.com/", "no name"),
        ("https://xn--\u2603.example.com/", "no name"),
        (f"https://media.example.com/{'a' * 5000}", "longer than"),
        (f"https://{'a.' * 200}com/", "no name"),
    ],
)
def test_invalid_urls_are_refused_before_a_name_is_resolved(url: str, reason: str) -> None:
    resolver = Resolver()
    spec = RemoteMediaConfig(enabled=True, hosts=("media.example.com", "*.example.org"))
    with pytest.raises(RequestError) as caught:
        run(RemoteMediaFetcher(spec, resolve=resolver, tls=TRUSTS_NOBODY).fetch(url, "image_reference"))
    assert reason in caught.value.hint
    assert caught.value.allowed == "a URL of https on media.example.com, *.example.org"
    assert "secret" not in str(caught.value)
    assert resolver.asked == []


@pytest.mark.parametrize(
    ("entry", "url", "is_covered"),
    [
        ("media.example.com", "https://MEDIA.Example.com./a", True),
        ("MEDIA.example.com.", "https://media.example.com/a", True),
        ("media.example.com", "http://media.example.com:80/a", True),
        ("media.example.com", "https://media.example.com:443/a", True),
        ("media.example.com", "https://media.example.com:/a", True),
        ("media.example.com:8443", "https://media.example.com:8443/a", True),
        ("media.example.com:8443", "https://media.example.com/a", False),
        ("*.example.com", "https://a.b.example.com/", True),
        ("*.example.com", "https://example.com/", False),
        ("*.example.com:81", "http://a.example.com:81/", True),
        ("*.example.com:81", "http://a.example.com/", False),
        ("bücher.example.com", "https://xn--bcher-kva.example.com/", True),
        ("xn--bcher-kva.example.com", "https://BÜCHER.example.com/", True),
        ("93.184.216.34", "https://93.184.216.34/", True),
        ("93.184.216.34:81", "https://93.184.216.34:81/", True),
        ("*.34", "https://93.184.216.34/", None),
        ("*.216.34", "https://93.184.216.34/", None),
        ("2606:4700::1111", "https://[2606:4700:0::1111]/", True),
        ("[2606:4700::1111]:81", "https://[2606:4700::1111]:81/", True),
        ("*", "https://a.example.com/", None),
        ("*.*.example.com", "https://a.example.com/", None),
        ("https://example.com", "https://example.com/", None),
        ("example.com/path", "https://example.com/", None),
        ("user@example.com", "https://example.com/", None),
        ("example.com:port", "https://example.com/", None),
        ("", "https://example.com/", None),
    ],
)
def test_hosts_are_compared_in_canonical_form(entry: str, url: str, is_covered: bool | None) -> None:
    """``None``: the entry itself is refused when the app starts."""
    if is_covered is None:
        with pytest.raises(ConfigError, match=re.escape(repr(entry))):
            HostRule.parse(entry)
    else:
        assert HostRule.parse(entry).covers(RemoteUrl.parse(url)) == is_covered


def test_a_listed_address_must_be_public_too() -> None:
    server = Server({"/": answer(b"secret")})
    with pytest.raises(RequestError, match="public internet"):
        fetch({}, f"http://{LOOPBACK}:PORT/", hosts=(f"{LOOPBACK}:PORT",), allowed=is_public, server=server)
    assert server.requests == []
    resolver = Resolver()
    answers = {"/": answer(b"by address")}
    assert fetch(answers, f"http://{LOOPBACK}:PORT/", hosts=(f"{LOOPBACK}:PORT",), resolver=resolver) == b"by address"
    assert resolver.asked == [], "an address is not looked up"


def test_a_non_ascii_path_is_percent_encoded() -> None:
    url = RemoteUrl.parse("https://media.example.com/ä/%C3%A4?ö=1&b=a%26")
    assert url.target == "/%C3%A4/%C3%A4?%C3%B6=1&b=a%26"
    with pytest.raises(UrlRefused):
        RemoteUrl.parse("https://media.example.com/a b")


async def drip(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"", "Content-Length: 1000000"))
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def drip_headers(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.01)


async def silence(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(100)


async def endless_informing(writer: asyncio.StreamWriter) -> None:
    while True:
        writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.001)


async def slow_redirects(writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(0.1)
    writer.write(redirect("/"))
    await writer.drain()


@pytest.mark.parametrize("slow", [drip, drip_headers, silence, endless_informing, slow_redirects])
def test_one_deadline_covers_the_whole_fetch(slow: Any) -> None:
    start_s = time.monotonic()
    with pytest.raises(ApiError) as caught:
        fetch({"/": slow}, f"http://{HOST}:PORT/", timeout_s=0.3, max_redirects=1000)
    assert (caught.value.status, caught.value.code) == (422, "remote_timeout")
    assert "0.3 s" in str(caught.value)
    assert time.monotonic() - start_s < 30


def test_a_resolver_that_hangs_meets_the_deadline() -> None:
    def hanging(host: str, port: int) -> list[str]:
        time.sleep(0.5)
        return [LOOPBACK]

    with pytest.raises(ApiError, match="0.05 s"):
        fetch({}, f"http://{HOST}:PORT/", resolver=hanging, timeout_s=0.05)  # type: ignore[arg-type]


async def huge_chunks(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"", "Transfer-Encoding: chunked"))
    while True:
        writer.write(b"1000\r\n" + bytes(4096) + b"\r\n")
        await writer.drain()


async def endless(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.0 200 OK\r\n\r\n")
    while True:
        writer.write(bytes(4096))
        await writer.drain()


@pytest.mark.parametrize("given", [huge_chunks, endless, answer(b"", "Content-Length: 50001"), answer(bytes(50_001))])
def test_a_file_that_is_too_large_is_refused_early(given: Any) -> None:
    with pytest.raises(RequestError, match="at most 50000 bytes"):
        fetch({"/": given}, f"http://{HOST}:PORT/", max_bytes=50_000)


@pytest.mark.parametrize(
    "given",
    [
        answer(bytes(50_000)),
        b"HTTP/1.0 200 OK\r\n\r\n" + bytes(50_000),
        answer(b"C350\r\n" + bytes(50_000) + b"\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
        answer(bytes(50_000), "Content-Encoding: identity"),
    ],
)
def test_a_file_of_the_largest_size_is_read_in_every_framing(given: bytes) -> None:
    assert fetch({"/": given}, f"http://{HOST}:PORT/", max_bytes=50_000) == bytes(50_000)


async def header_bomb(writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n")
    while True:
        writer.write(b"X-Header: " + b"x" * 4000 + b"\r\n")
        await writer.drain()


async def chunk_bomb(writer: asyncio.StreamWriter) -> None:
    writer.write(answer(b"", "Transfer-Encoding: chunked") + b"1;")
    while True:
        writer.write(b"x" * 4000)
        await writer.drain()


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (answer(b"no", status="404 Not Found"), "status 404"),
        (answer(b"no", status="500 Oh"), "status 500"),
        (answer(b"part", "Content-Range: bytes 0-3/9", status="206 Partial Content"), "status 206"),
        (answer(b"", status="304 Not Modified"), "status 304"),
        (answer(b"", status="300 Choices"), "status 300"),
        (answer(b"\x1f\x8b", "Content-Encoding: gzip"), "compressed"),
        (answer(b"", "Content-Encoding: identity, gzip"), "compressed"),
        (answer(b"", status="302 Found"), "0 targets"),
        (answer(b"", "Location: /a", "Location: /b", status="302 Found"), "2 targets"),
        (answer(b"cut", "Content-Length: 10"), "broke off"),
        (answer(b"5\r\ncut", "Transfer-Encoding: chunked"), "broke off"),
        (answer(b"x", "Content-Length: -1"), "no HTTP"),
        (answer(b"x", "Content-Length: 1", "Content-Length: 2"), "no HTTP"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", "no HTTP"),
        (b"", "broke off"),
        (header_bomb, "no HTTP"),
        (chunk_bomb, "no HTTP"),
    ],
)
def test_a_servers_failure_is_reported_without_the_urls_secrets(given: Any, reason: str) -> None:
    with pytest.raises(ApiError) as caught:
        fetch({"/a?token=secret": given}, f"http://{HOST}:PORT/a?token=secret")
    assert (caught.value.status, caught.value.code) == (422, "remote_unavailable")
    assert reason in str(caught.value)
    assert f"image_reference: http://{HOST}" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert LOOPBACK not in str(caught.value)


def test_unknown_names_and_closed_ports_are_reported() -> None:
    with pytest.raises(ApiError, match="host is not known") as caught:
        fetch({}, f"http://{HOST}:PORT/", resolver=Resolver({}))
    assert "10.1.2.3" not in str(caught.value)
    with pytest.raises(ApiError, match="host is not known"):
        fetch({}, f"http://{HOST}:PORT/", resolver=Resolver({HOST: [[]]}))
    with pytest.raises(ApiError, match="takes no connection") as caught:
        fetch({}, f"http://{HOST}:PORT/", resolver=Resolver({HOST: [["127.0.0.2"]]}), allowed=lambda address: True)
    assert "127.0.0.2" not in str(caught.value)


def fetch_by_tls(host: str, trusted: bool) -> bytes:
    async def body() -> bytes:
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(CERTIFICATE)
        names: list[str | None] = []
        served.sni_callback = lambda socket, name, context: names.append(name)
        server = Server({"/": answer(b"by tls"), "/down": redirect(f"http://{HOST}:PORT/")})
        async with server.serve(served):
            spec = RemoteMediaConfig(enabled=True, hosts=(f"{HOST}:{server.port}", f"{OTHER}:{server.port}"))
            tls = ssl.create_default_context(cafile=str(CERTIFICATE)) if trusted else None
            media = RemoteMediaFetcher(spec, resolve=Resolver(), is_allowed_address=loopback_or_public, tls=tls)
            try:
                return await media.fetch(f"https://{host}:{server.port}/", "video_reference")
            finally:
                assert names == [host], "the name of the URL, though the connection is made by address"

    result = run(body())
    assert isinstance(result, bytes)
    return result


def test_tls_checks_the_urls_host_name() -> None:
    assert fetch_by_tls(HOST, trusted=True) == b"by tls"


@pytest.mark.parametrize(("host", "trusted"), [(OTHER, True), (HOST, False)])
def test_a_certificate_for_another_name_or_by_an_unknown_authority_is_refused(host: str, trusted: bool) -> None:
    with pytest.raises(ApiError, match="certificate") as caught:
        fetch_by_tls(host, trusted)
    assert caught.value.code == "remote_unavailable"


def test_a_redirect_from_https_to_http_is_refused() -> None:
    async def body() -> None:
        served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        served.load_cert_chain(CERTIFICATE)
        server = Server({"/": redirect(f"http://{OTHER}/")})
        async with server.serve(served):
            spec = RemoteMediaConfig(enabled=True, hosts=(f"{HOST}:{server.port}", OTHER), schemes=("http", "https"))
            tls = ssl.create_default_context(cafile=str(CERTIFICATE))
            resolver = Resolver()
            media = RemoteMediaFetcher(spec, resolve=resolver, is_allowed_address=loopback_or_public, tls=tls)
            with pytest.raises(RequestError, match="from https to http"):
                await media.fetch(f"https://{HOST}:{server.port}/", "video_reference")
            assert resolver.asked == [HOST]

    run(body())


def test_concurrent_fetches_are_bounded_and_waiting_counts_towards_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def body() -> None:
        server = Server({"/slow": silence, "/": answer(b"x")})
        async with server.serve():
            spec = RemoteMediaConfig(enabled=True, hosts=(f"{HOST}:{server.port}",), schemes=("http",), timeout_s=0.5)
            media = RemoteMediaFetcher(spec, resolve=Resolver(), is_allowed_address=loopback_or_public)
            url = f"http://{HOST}:{server.port}"
            first = [asyncio.create_task(media.fetch(f"{url}/slow", "image")) for _ in range(2)]
            await asyncio.sleep(0.1)
            assert len(server.requests) == 2
            waiting = [asyncio.create_task(media.fetch(f"{url}/slow", "image")) for _ in range(2)]
            late = asyncio.create_task(media.fetch(f"{url}/slow", "image"))
            await asyncio.sleep(0)
            first[0].cancel()
            first[1].cancel()
            results = await asyncio.gather(*waiting, late, return_exceptions=True)
            assert [type(result) for result in results] == [ApiError, ApiError, OverloadedError]
            assert await media.fetch(url, "image") == b"x", "places of those who left are free"

    monkeypatch.setattr(remote_media, "_MAX_FETCHES", 2)
    run(body())
