"""The HTTP transport alone: keys, headers, sizes, silence, proxies."""

from __future__ import annotations

import asyncio
import json
import pickle
import tracemalloc
from collections.abc import AsyncIterator, Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import httpx2
import pytest

from cluster.errors import DeadlineExceeded, OverloadedError
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments.client import AsyncCosmos3Client, Connecting, Cosmos3Client
from deployments.clients import http_transport
from deployments.clients.errors import AnswerError, AuthError, NotFound, UnreachableError, read_failure, read_refusal
from tests.clients.app_double import STORY, VIDEO, WAIT, App, Body, iterate_parts
from tests.clients.conftest import QUICK, connect_to

REQUEST = GenerationRequest(prompt="A red car.")


def connect_to_server(answer: Callable[[httpx2.Request], Any], timeout_s: float = 30.0) -> Cosmos3Client:
    """Make a client of a server that gives one kind of answer."""

    async def handle(request: httpx2.Request) -> httpx2.Response:
        response = answer(request)
        return await response if asyncio.iscoroutine(response) else response

    connecting = Connecting(transport=httpx2.MockTransport(handle))
    return Cosmos3Client.over_http("http://app.test", timeout_s=timeout_s, connecting=connecting, patience=QUICK)


def body(text: bytes) -> Body:
    return Body(iterate_parts(text))


def test_the_key_is_sent_and_never_shown(app: App) -> None:
    app.api_key = "sk-right"
    for key in (None, "sk-wrong"):
        with Cosmos3Client(connect_to(app, "http", api_key=key)) as client, pytest.raises(AuthError) as caught:
            client.create(REQUEST)
        assert (caught.value.status, caught.value.code) == (401, "invalid_api_key")
        assert "sk-" not in str(caught.value)
    with Cosmos3Client(connect_to(app, "http", api_key="sk-right")) as client:
        assert client.create(REQUEST).status == "queued"
    assert app.calls == 1


@pytest.mark.parametrize("key", ["", "a b", "a\r\nx-evil: 1", "schlüssel", "a\x00"])
def test_a_key_that_no_header_can_hold_is_refused(key: str) -> None:
    with pytest.raises(RequestError, match=r"api_key must be .*got '\*\*\*'"):
        AsyncCosmos3Client.over_http("http://app.test", key)


@pytest.mark.parametrize("value", ["", "a\r\nx-evil: 1", "ä", "x" * 257])
def test_an_id_or_key_that_no_header_can_hold_is_refused(value: str, app: App) -> None:
    with Cosmos3Client(connect_to(app, "http")) as client:
        for name in ("request_id", "idempotency_key"):
            with pytest.raises(RequestError, match=f"{name} must be 1 to 256 printable ASCII characters"):
                client.create(REQUEST, **{name: value})
    assert app.calls == 0


@pytest.mark.parametrize(
    "url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://[::1", "http://u:p@a"]
)
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(RequestError, match="url must be "):
        Cosmos3Client.over_http(url)


def test_waiting_for_an_answer_times_out() -> None:
    async def never(request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(1000)
        raise AssertionError

    async def trickle() -> AsyncIterator[bytes]:
        while True:
            yield b" "
            await asyncio.sleep(0.01)

    for answer in (never, lambda request: httpx2.Response(200, stream=Body(trickle()))):
        with (
            connect_to_server(answer, timeout_s=0.2) as client,
            pytest.raises(UnreachableError, match="no complete answer within"),
        ):
            client.retrieve("video_gen_1")
    slow = connect_to_server(lambda request: httpx2.Response(200, stream=Body(trickle())))
    with slow as client, pytest.raises(UnreachableError, match="no complete answer within 0.2 s"):
        list(client.content("video_gen_1", timeout_s=0.2))


def test_long_error_messages_are_truncated() -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(2000):
            yield b"x" * 50_000

    with connect_to_server(lambda request: httpx2.Response(500, stream=Body(endless()))) as client:
        tracemalloc.start()
        with pytest.raises(AnswerError) as caught:
            client.models()
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert len(str(caught.value)) < 70_000
    assert peak_bytes < 5_000_000


@pytest.mark.parametrize(
    ("status", "text", "kind", "said"),
    [
        (404, b"Path '/v1' not found.\nmore", NotFound, "HTTP 404 Not Found: Path '/v1' not found."),
        (410, b'{"error": {"message": "gone", "code": "expired"}}', NotFound, "gone"),
        (403, b"{}", AuthError, "HTTP 403 Forbidden: {}"),
        (429, b"Request dropped", OverloadedError, "HTTP 429 Too Many Requests: Request dropped"),
        (200, b"<html>", AnswerError, "is it a cosmos3 app?"),
        (200, b"[]", AnswerError, "is it a cosmos3 app?"),
        (200, b'{"id": "a", "object": "video"}', AnswerError, "status: Field required"),
        (200, b'{"id": "a", "object": "video", "status": "asleep"}', AnswerError, "status: Input should"),
        (302, b"", AnswerError, "HTTP 302 Found"),
        (422, b'{"error": {"message": "no", "param": 3}}', AnswerError, "no"),
    ],
)
def test_answers_of_other_servers_are_typed_errors(status: int, text: bytes, kind: type[Exception], said: str) -> None:
    headers = {"location": "http://elsewhere.test/"}
    server = connect_to_server(lambda request: httpx2.Response(status, headers=headers, stream=body(text)))
    with server as client, pytest.raises(kind, match=said.replace("?", r"\?")) as caught:
        client.retrieve("a")
    if isinstance(caught.value, OverloadedError):
        assert caught.value.retry_after_s == 5.0


def test_retry_after_is_a_number_or_unknown() -> None:
    for text, retry_after_s in (("12", 12.0), ("0.5", 0.5), ("Wed, 21 Oct 2015 07:28:00 GMT", 5.0), ("nan", 5.0)):
        headers = {"retry-after": text}
        full = connect_to_server(lambda request, it=headers: httpx2.Response(429, headers=it, stream=body(b"")))
        with full as client, pytest.raises(OverloadedError) as caught:
            client.retrieve("a")
        assert caught.value.retry_after_s == retry_after_s


@pytest.mark.parametrize(
    "code",
    [
        *("overloaded", "shutting_down", "deadline_exceeded", "stage_failed", "out_of_memory", "content_blocked"),
        *("media_not_ready", "cancelled", "unknown"),
    ],
)
@pytest.mark.parametrize("status", [401, 404, 429, 500, 503, 504])
def test_an_error_of_the_server_survives_pickling(status: int, code: str) -> None:
    text = json.dumps({"error": {"message": "the server's words", "code": code}})
    refusal = read_refusal(status, "reason", {"retry-after": "7"}, text, None)
    for error in (refusal, read_failure("video_gen_1", code, "the server's words")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again), vars(again)) == (type(error), str(error), vars(error))


def test_an_html_page_is_not_a_stream_of_events() -> None:
    page = connect_to_server(
        lambda request: httpx2.Response(200, headers={"content-type": "text/html"}, stream=body(b""))
    )
    with page as client, pytest.raises(AnswerError, match="is it a cosmos3 app?"):
        list(client.events("a"))


def test_a_silent_connection_counts_as_broken(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server sends keepalives; without one, the connection is dead."""
    monkeypatch.setattr(http_transport, "_SILENCE_S", 0.2)
    event = b'id: 1\nevent: started\ndata: {"attempt": 1}\n\n'
    job = {**VIDEO, "id": "a", "status": "completed", "prompt": "a", "created_at": 1, "service_class": "standard"}
    last = f"id: 2\nevent: completed\ndata: {json.dumps(job)}\n\n".encode()
    asked: list[str | None] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked.append(self.headers["last-event-id"])
            self.send_response(200)
            self.send_header("content-type", "text/event-stream")
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            text = event if len(asked) == 1 else last
            self.wfile.write(b"%x\r\n%b\r\n" % (len(text), text))
            self.wfile.flush()
            self.rfile.read(1)  # until the client disconnects

        def log_message(self, *_: Any) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    # Proxies in the environment are ignored.
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Cosmos3Client.over_http(f"http://127.0.0.1:{server.server_port}", patience=QUICK) as client:
        assert [event.kind for event in client.events("a")] == ["started", "completed"]
    assert asked == [None, "1"]
    server.shutdown()
    server.server_close()


def test_a_failed_cancellation_is_logged(app: App, caplog: pytest.LogCaptureFixture) -> None:
    app.story = [("step", {"step": 1, "num_steps": 2, "sigma": 0.5}), ("wait", {})]
    with Cosmos3Client(connect_to(app, "http")) as client:
        stream = client.stream(REQUEST)
        next(stream)
        app.next_errors = [OverloadedError("calls", 1, 3.0)]
        stream.close()
    assert f"{stream.video_id} could not be stopped: calls: all 1 places are taken" in caplog.text


@pytest.mark.parametrize("call", ["stream", "generate"])
@pytest.mark.parametrize("how", ["cancelled", "too late"])
def test_interrupting_a_submission_cancels_its_video(how: str, call: str, app: App) -> None:
    """The app creates the video, and does not know that its caller has left."""
    app.story = [*STORY[:2], WAIT, *STORY[2:]]
    app.delay_s = 0.2

    async def leave() -> None:
        async with connect_to(app, "http") as client:
            limit_s = 0.05 if how == "too late" else 60.0
            making = asyncio.create_task(getattr(client, call)(REQUEST, timeout_s=limit_s))
            if how == "too late":
                with pytest.raises(DeadlineExceeded, match="not done within 0 s; it was in the stage 'submit'"):
                    await making
            else:
                while not app.num_requests:
                    await asyncio.sleep(0.002)
                making.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await making
        assert app.stopped == list(app.videos)

    asyncio.run(leave())
    assert len(app.stopped) == 1


@pytest.mark.parametrize("refused", [False, True])
def test_interrupting_a_refused_submission_cancels_nothing(
    refused: bool, app: App, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http_transport, "STOP_S", 10.0 if refused else 0.05)
    app.delay_s = 0.2 if refused else 1000.0
    app.next_errors = [OverloadedError("jobs", 1, 5.0)]

    async def leave() -> None:
        async with connect_to(app, "http") as client:
            with pytest.raises(DeadlineExceeded):
                await client.generate(REQUEST, timeout_s=0.05)
        await asyncio.sleep(0)

    asyncio.run(leave())
    assert (app.submitted, app.stopped, caplog.records) == ([], [], [])


def test_many_followers_share_one_client(app: App) -> None:
    """Each has its own connection; none waits for another."""

    async def follow() -> list[int]:
        async with connect_to(app, "http") as client:
            videos = [await client.create(REQUEST) for _ in range(50)]

            async def num_events(video_id: str) -> int:
                return len([event async for event in client.events(video_id)])

            return await asyncio.gather(*(num_events(video.id) for video in videos))

    assert asyncio.run(follow()) == [8] * 50
