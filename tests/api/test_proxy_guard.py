"""The bounds of Serve's proxies on heads, and their answers in JSON: uvicorn with the guard, raw sockets."""

from __future__ import annotations

import asyncio
import json
import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import pytest
import uvicorn
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from deployments.api import proxy_guard
from deployments.api.proxy_guard import MAX_HEAD_BYTES, MAX_HEADERS, ProxyGuard
from tests.settling import eventually

_WAIT_S = 20.0
_left: list[str] = []
"""Types of the messages that ended the requests for the path /wait."""


async def _serve(scope: Scope, receive: Receive, send: Send) -> None:
    """Stand for Serve's proxy and the app behind it."""
    headers = dict(scope["headers"])
    body = b""
    more = True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    request_id = headers.get(b"x-request-id", b"1").decode()  # as Serve does
    path = scope["path"]
    if path == "/wait":  # as long as the client is there
        message = await receive()
        _left.append(message["type"])
        return
    if path == "/slow":
        await asyncio.sleep(0.3)
    if path == "/raise":
        raise RuntimeError("a path of the server: /srv")
    serves_own = {
        "/lost": PlainTextResponse("ActorDiedError: 10.0.0.7", 500, {"x-request-id": request_id}),
        "/full": PlainTextResponse("Request dropped due to backpressure", 429, {"retry-after": "7"}),
        "/late": PlainTextResponse("Request timed out", 408),
        "/missing": PlainTextResponse("Path '/missing' not found.", 404),
        "/-/healthz": PlainTextResponse("not yet", 503),
        "/-/routes": PlainTextResponse("{}", 200),
        "/own": PlainTextResponse("own text", 500, {"x-content-type-options": "nosniff"}),
    }
    answer: Response = serves_own.get(path, PlainTextResponse(f"{len(headers)} headers, {len(body)} bytes"))
    await answer(scope, receive, send)


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        guard = ProxyGuard(_serve)  # makes uvicorn start the bounded protocol, as in Serve's proxy
        server = uvicorn.Server(uvicorn.Config(guard, lifespan="off", log_config=None, access_log=False))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            assert eventually(lambda: server.started)
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            thread.join()


class Client:
    """One connection that sends bytes as they are."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=_WAIT_S)
        self._file = self._socket.makefile("rb")

    def send(self, data: bytes) -> None:
        self._socket.sendall(data)

    def read(self) -> tuple[int, dict[str, str], bytes]:
        """Read one answer: status, headers, body."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(": ")
            headers[name.lower()] = value
        return status, headers, self._file.read(int(headers["content-length"]))

    def read_error(self) -> tuple[int, str]:
        """Read an error: its status and code."""
        status, headers, body = self.read()
        assert headers["content-type"] == "application/json"
        error: dict[str, Any] = json.loads(body)["error"]
        assert set(error) == {"message", "type", "code", "param"}
        return status, error["code"]

    def close_half(self) -> None:
        self._socket.shutdown(socket.SHUT_WR)

    def is_closed(self) -> bool:
        return self._file.read(1) == b""

    def close(self) -> None:
        self._file.close()
        self._socket.close()


@pytest.fixture
def client(port: int) -> Iterator[Client]:
    with closing(Client(port)) as connection:
        yield connection


def _head(*lines: bytes, path: bytes = b"/") -> bytes:
    return b"GET %s HTTP/1.1\r\nhost: a\r\n" % path + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


def test_a_head_without_end_is_refused_before_it_has_come(client: Client) -> None:
    """The server stops reading: most of it is never sent."""
    client.send(b"GET / HTTP/1.1\r\nhost: a\r\nx-large: ")
    num_sent = 0
    with pytest.raises(OSError):  # noqa: PT011 - a reset, or a broken pipe
        while num_sent < 64 << 20:
            client.send(b"a" * 65536)
            num_sent += 65536
    assert num_sent < 64 << 20


@pytest.mark.parametrize(
    "lines",
    [
        (b"x-large: " + b"a" * (MAX_HEAD_BYTES - 10),),
        tuple(b"x-%d: a" % number for number in range(MAX_HEADERS)),
        tuple(b"x-%d: " % number + b"a" * 1000 for number in range(MAX_HEADERS - 2)),
    ],
    ids=["one long header", "many headers", "many long headers"],
)
def test_a_head_that_comes_in_one_piece_has_the_same_bounds(client: Client, lines: tuple[bytes, ...]) -> None:
    client.send(_head(*lines))
    assert client.read_error() == (431, "head_too_large")
    assert client.is_closed()


def test_the_largest_allowed_head_is_served(client: Client) -> None:
    lines = [b"x-%d: a" % number for number in range(MAX_HEADERS - 2)]
    lines.append(b"x-large: " + b"a" * (MAX_HEAD_BYTES - 2000))
    client.send(_head(*lines))
    assert client.read()[2] == b"%d headers, 0 bytes" % MAX_HEADERS


def test_a_long_request_line_is_refused(client: Client) -> None:
    client.send(_head(path=b"/" + b"a" * MAX_HEAD_BYTES))
    assert client.read_error() == (431, "head_too_large")


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\nhost: a\r\n"], ids=["nothing", "a part"])
def test_a_head_that_never_ends_is_given_up(port: int, start: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_guard, "HEAD_S", 0.3)
    with closing(Client(port)) as client:
        client.send(start)
        assert client.read_error() == (408, "head_too_slow")
        assert client.is_closed()


def test_a_head_that_drips_is_given_up(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new byte does not start the time anew."""
    monkeypatch.setattr(proxy_guard, "HEAD_S", 0.5)
    with closing(Client(port)) as client, pytest.raises(OSError):  # noqa: PT011 - a reset, or a broken pipe
        client.send(b"GET / HTTP/1.1\r\nx-long: ")
        deadline_s = time.monotonic() + _WAIT_S
        while time.monotonic() < deadline_s:
            client.send(b"a")
            time.sleep(0.05)


def test_the_time_of_a_head_is_not_that_of_a_body_or_a_pause(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy_guard, "HEAD_S", 0.3)
    with closing(Client(port)) as client:
        for _ in range(2):
            client.send(b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 4\r\n\r\nab")
            time.sleep(0.6)
            client.send(b"cd")
            assert client.read()[2] == b"2 headers, 4 bytes"
            time.sleep(0.6)


def test_requests_of_one_connection_may_follow_each_other_at_once(client: Client) -> None:
    client.send(_head() + _head(b"x-a: b"))
    assert client.read()[2] == b"1 headers, 0 bytes"
    assert client.read()[2] == b"2 headers, 0 bytes"


def test_a_client_that_sends_no_more_gets_its_answer(client: Client) -> None:
    client.send(_head(path=b"/slow"))
    client.close_half()
    assert client.read()[2] == b"1 headers, 0 bytes"
    assert client.is_closed()


def test_a_half_closed_connection_stops_its_work_soon(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client may have left: both look the same."""
    monkeypatch.setattr(proxy_guard, "_HALF_CLOSED_S", 0.3)
    _left.clear()
    with closing(Client(port)) as client:
        client.send(_head(path=b"/wait"))
        time.sleep(0.1)
        client.close_half()
        assert client.is_closed()
    assert eventually(lambda: _left == ["http.disconnect"])


@pytest.mark.parametrize(
    "sent", [b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\n\r\n", _head(b"x\xe9: a"), _head(b"no colon")]
)
def test_what_is_not_http_is_refused_in_json(client: Client, sent: bytes) -> None:
    client.send(sent)
    assert client.read_error() == (400, "broken_request")
    assert client.is_closed()


def test_a_broken_body_closes_the_connection(client: Client) -> None:
    client.send(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nnonsense\r\n")
    assert client.read_error() == (400, "broken_request")
    assert client.is_closed()


def test_bytes_that_serve_cannot_decode_are_the_callers_fault(client: Client) -> None:
    client.send(_head(b"x-request-id: \xe9"))
    assert client.read_error() == (400, "invalid_header")


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/lost", (503, "unavailable")),
        ("/raise", (503, "unavailable")),
        ("/full", (429, "overloaded")),
        ("/late", (408, "deadline_exceeded")),
        ("/missing", (404, "no_such_route")),
        ("/-/routes", (404, "no_such_route")),
    ],
)
def test_serves_own_errors_are_answered_in_json(client: Client, path: str, expected: tuple[int, str]) -> None:
    client.send(_head(path=path.encode()))
    assert client.read_error() == expected


def test_an_answer_for_a_lost_process_keeps_its_request_id(client: Client) -> None:
    client.send(_head(b"x-request-id: mine", path=b"/lost"))
    status, headers, body = client.read()
    assert (status, headers["x-request-id"], headers["retry-after"]) == (503, "mine", "5")
    assert b"10.0.0.7" not in body


def test_a_full_apps_answer_keeps_its_time(client: Client) -> None:
    client.send(_head(path=b"/full"))
    status, headers, _ = client.read()
    assert (status, headers["retry-after"]) == (429, "7")


@pytest.mark.parametrize(("path", "expected"), [("/-/healthz", (503, b"not yet")), ("/own", (500, b"own text"))])
def test_probes_and_the_apps_own_answers_pass(client: Client, path: str, expected: tuple[int, bytes]) -> None:
    client.send(_head(path=path.encode()))
    status, _, body = client.read()
    assert (status, body) == expected


@pytest.mark.parametrize("framing", [b"content-length: 10000000", b"transfer-encoding: chunked"])
@pytest.mark.parametrize("method", [b"GET", b"DELETE"])
def test_a_large_body_that_nobody_reads_is_refused(client: Client, method: bytes, framing: bytes) -> None:
    """It would lie in the replica for as long as a video that it follows."""
    client.send(method + b" / HTTP/1.1\r\nhost: a\r\n" + framing + b"\r\n\r\n")
    assert client.read_error() == (413, "body_too_large")
    assert client.is_closed()


@pytest.mark.parametrize(("method", "num_bytes"), [(b"GET", 65536), (b"POST", 65537)])
def test_other_bodies_pass(client: Client, method: bytes, num_bytes: int) -> None:
    client.send(b"%s / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % (method, num_bytes) + bytes(num_bytes))
    status, _, body = client.read()
    assert (status, body) == (200, b"2 headers, %d bytes" % num_bytes)


def test_a_body_comes_no_faster_than_its_replica_fetches_it() -> None:
    async def run() -> None:
        async def receive() -> Message:
            return {"type": "http.request", "body": b"a", "more_body": True}

        window, queue = proxy_guard._BodyWindow(receive), []
        with pytest.raises(TimeoutError):
            for _ in range(1000):
                queue.append(await asyncio.wait_for(window(), 0.05))
        assert len(queue) == proxy_guard._MAX_WAITING_PARTS
        assert pickle.loads(pickle.dumps(queue[0])) == await receive()
        assert type(pickle.loads(pickle.dumps(queue[0]))) is dict
        queue.clear()
        queue.append(await asyncio.wait_for(window(), 10.0))

    asyncio.run(run())
