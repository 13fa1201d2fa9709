"""The HTTP client against servers that answer well, badly, slowly, in part, or not at all."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.request import GenerationRequest
from deployments.http_client import AnswerError, UnreachableError, body_of, get, save_video

REQUEST = GenerationRequest(prompt="A red car.", num_frames=9, seed=7)
HEADERS = {
    "content-type": "video/mp4",
    "x-seed": "7",
    "x-negative-prompt": "built-in",
    "x-notes": '["a note"]',
    "x-stage-durations": '{"denoise": 1.5, "total": 2.0}',
}
Answer = Callable[[BaseHTTPRequestHandler, bytes], None]


def answer(status: int, headers: dict[str, str], body: bytes, *, announced: int | None = None) -> Answer:
    def send(handler: BaseHTTPRequestHandler, received: bytes) -> None:
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.send_header("content-length", str(len(body) if announced is None else announced))
        handler.end_headers()
        handler.wfile.write(body)

    return send


@pytest.fixture
def serve() -> Iterator[Callable[[Answer], str]]:
    """Starts a server that gives one kind of answer; returns its URL."""
    servers: list[ThreadingHTTPServer] = []

    def start(send: Answer) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                send(self, self.rfile.read(int(self.headers["content-length"])))

            def do_GET(self) -> None:
                send(self, b"")

            def log_message(self, *_: Any) -> None: ...

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_file_is_saved_with_what_the_server_said(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = []

    def send(handler: BaseHTTPRequestHandler, received: bytes) -> None:
        bodies.append((handler.path, json.loads(received)))
        answer(200, HEADERS, b"x" * 3_000_000)(handler, received)

    saved = save_video(f"{serve(send)}/prefix/", REQUEST, tmp_path / "a.b", timeout_s=60)
    assert bodies == [("/prefix/v1/videos/sync", {"prompt": "A red car.", "num_frames": 9, "seed": 7})]
    assert (saved.path, saved.num_bytes) == (tmp_path / "a.b.mp4", 3_000_000)
    assert saved.path.read_bytes() == b"x" * 3_000_000
    assert (saved.seed, saved.negative_origin, saved.notes) == (7, "built-in", ("a note",))
    assert saved.stage_seconds == {"denoise": 1.5, "total": 2.0}


def test_an_image_is_a_png(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    url = serve(answer(200, {**HEADERS, "content-type": "image/png"}, b"png"))
    assert save_video(url, REQUEST, tmp_path / "a", timeout_s=60).path == tmp_path / "a.png"


@pytest.mark.parametrize(
    ("send", "error", "said"),
    [
        (answer(422, {}, b'{"error": {"message": "height=100: no"}}'), AnswerError, "height=100: no"),
        (answer(404, {}, b"Path '/v1' not found.\nmore"), AnswerError, "HTTP 404 Not Found: Path '/v1' not found."),
        (answer(503, {}, b'["odd"]'), AnswerError, 'HTTP 503 Service Unavailable: ["odd"]'),
        (answer(200, {"content-type": "text/html"}, b"<html>"), AnswerError, "is it a cosmos3 app?"),
        (answer(200, {"content-type": "video/mp4"}, b"mp4"), AnswerError, "is it a cosmos3 app?"),
        (answer(200, HEADERS, b"half", announced=8), UnreachableError, "broke off after 4 of 8 bytes"),
        (lambda handler, received: None, UnreachableError, "RemoteDisconnected"),
        (lambda handler, received: handler.wfile.write(b"SSH-2.0\r\n"), UnreachableError, "BadStatusLine"),
    ],
    ids=["422", "404", "odd body", "page", "foreign file", "half a file", "no answer", "no HTTP"],
)
def test_bad_answers_are_typed_and_leave_no_file(
    send: Answer, error: type[Exception], said: str, serve: Callable[[Answer], str], tmp_path: Path
) -> None:
    with pytest.raises(error, match=said.replace("?", r"\?").replace("[", r"\[")):
        save_video(serve(send), REQUEST, tmp_path / "a", timeout_s=60)
    assert list(tmp_path.iterdir()) == []


def test_the_deadline_holds_before_the_answer_and_inside_it(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    done = threading.Event()

    def trickle(handler: BaseHTTPRequestHandler, received: bytes) -> None:
        answer(200, HEADERS, b"x", announced=1000)(handler, received)
        while not done.wait(0.05):
            handler.wfile.write(b"x")

    for send in (lambda handler, received: done.wait(60), trickle):
        start_s = time.monotonic()
        with pytest.raises(UnreachableError, match="no complete answer within 0.5 s"):
            save_video(serve(send), REQUEST, tmp_path / "a", timeout_s=0.5)
        assert 0.4 < time.monotonic() - start_s < 10
    done.set()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://a", "http://", "http://a:port", "http://[::1", ""])
def test_what_is_no_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="allowed is an address such as"):
        save_video(url, REQUEST, tmp_path / "a", timeout_s=1)


def test_nobody_listens() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="nothing listens there"):
            get(url, "/ready", timeout_s=10)


def test_a_file_that_cannot_be_written_is_said_so(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    url = serve(answer(200, HEADERS, b"mp4"))
    with pytest.raises(MediaError, match="cannot be written: .*File name too long"):
        save_video(url, REQUEST, tmp_path / ("a" * 250), timeout_s=60)
    with pytest.raises(RequestError, match="existing directory"):
        save_video("http://127.0.0.1:9", REQUEST, tmp_path / "no" / "a", timeout_s=60)


def test_small_answers_come_with_their_status(serve: Callable[[Answer], str]) -> None:
    assert get(serve(answer(503, {}, b"not yet")), "/ready", timeout_s=60) == (503, "not yet")


def test_what_does_not_travel_is_refused() -> None:
    assert body_of(GenerationRequest(prompt="a", negative_prompt="")) == {"prompt": "a", "negative_prompt": ""}
    with pytest.raises(RequestError, match="append_metadata=False: allowed is the default over HTTP"):
        body_of(GenerationRequest(prompt="a", append_metadata=False))
