"""The command line's HTTP client against servers that answer well, badly, slowly, partly or never."""

from __future__ import annotations

import base64
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cosmos3_core.actions import GeneratedActions
from cosmos3_core.errors import RequestError
from cosmos3_core.media.image import write_image
from cosmos3_core.media.source import read_image
from cosmos3_core.request import GenerationRequest
from deployments.api.bodies import BodyRules, NamedFields, ParsedBody, parse_body
from deployments.api.fields import SyncBody
from deployments.clients.errors import AnswerError, AuthError, UnreachableError
from deployments.clients.http_transport import make_body
from deployments.launch.app_calls import get, save_video

REQUEST = GenerationRequest(prompt="A red car.", num_frames=9, seed=7)
HEADERS = {
    "content-type": "video/mp4",
    "x-video-id": "video_gen_1",
    "x-seed": "7",
    "x-negative-prompt": "built-in",
    "x-notes": '["a note"]',
    "x-warnings": '["user"]',
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
    """Start a server that gives one kind of answer; return its URL."""
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


def parse(body: dict[str, Any]) -> ParsedBody[SyncBody]:
    return parse_body(NamedFields.of(body, SyncBody), BodyRules(("nano", "nvidia/Cosmos3-Nano"), ("standard",)))


def test_a_file_is_saved_with_the_servers_headers(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    bodies: list[tuple[str, dict[str, Any]]] = []

    def send(handler: BaseHTTPRequestHandler, received: bytes) -> None:
        bodies.append((handler.path, json.loads(received)))
        answer(200, HEADERS, b"x" * 3_000_000)(handler, received)

    saved = save_video(f"{serve(send)}/prefix/", REQUEST, tmp_path / "a.b", timeout_s=60)
    assert bodies == [("/prefix/v1/videos/sync", {"prompt": "A red car.", "num_frames": 9, "seed": 7})]
    assert (saved.path, saved.num_bytes) == (tmp_path / "a.b.mp4", 3_000_000)
    assert saved.path.read_bytes() == b"x" * 3_000_000
    assert (saved.seed, saved.negative_origin, saved.notes) == (7, "built-in", ("a note",))
    assert (saved.video_id, saved.warnings) == ("video_gen_1", ("user",))
    assert saved.stage_seconds == {"denoise": 1.5, "total": 2.0}


@pytest.mark.parametrize(
    ("media_type", "suffix"),
    [("image/jpeg", ".jpg"), ("image/webp", ".webp"), ("audio/wav", ".wav"), ("video/mp4", ".mp4")],
)
def test_the_suffix_follows_the_content_type(
    media_type: str, suffix: str, serve: Callable[[Answer], str], tmp_path: Path
) -> None:
    url = serve(answer(200, {**HEADERS, "content-type": media_type}, b"data"))
    for name in ("a", "a.mp4", f"a{suffix}"):
        saved = save_video(url, REQUEST, tmp_path / name, timeout_s=60)
        assert (saved.path, saved.actions_path) == (tmp_path / f"a{suffix}", None)


ACTIONS = GeneratedActions(np.array([[0.1, 2.0], [3.0, -4.0]], np.float32), "av", 1, False)


@pytest.mark.parametrize("has_file", [True, False])
def test_generated_actions_are_saved(has_file: bool, serve: Callable[[Answer], str], tmp_path: Path) -> None:
    video = {"media_type": "video/mp4", "b64_json": base64.b64encode(b"x" * 200_000).decode()} if has_file else None
    body = json.dumps({"actions": ACTIONS.as_json(), "video": video}).encode()
    saved = save_video(
        serve(answer(200, {**HEADERS, "content-type": "application/json"}, body)),
        REQUEST,
        tmp_path / "a",
        timeout_s=60,
    )
    assert saved.actions_path == tmp_path / "a.actions.json"
    assert json.loads(saved.actions_path.read_text()) == ACTIONS.as_json()
    assert (saved.path, saved.num_bytes) == ((tmp_path / "a.mp4", 200_000) if has_file else (None, 0))
    if saved.path is not None:
        assert saved.path.read_bytes() == b"x" * 200_000
    assert (saved.seed, saved.notes) == (7, ("a note",))


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
        (answer(200, {**HEADERS, "content-type": "application/zip"}, b"PK"), AnswerError, "is it a cosmos3 app?"),
        (answer(200, {**HEADERS, "content-type": "application/json"}, b"[]"), AnswerError, "is it a cosmos3 app?"),
        (answer(200, {**HEADERS, "content-type": "application/json"}, b"{"), AnswerError, "is it a cosmos3 app?"),
        (answer(200, HEADERS, b"half", announced=8), UnreachableError, "broke off after 4 of 8 bytes"),
        (answer(200, {**HEADERS, "x-seed": "one"}, b"mp4"), AnswerError, "is it a cosmos3 app?"),
        (answer(401, {}, b""), AuthError, "and none was given: see --api-key-file and "),
        (answer(302, {"location": "http://127.0.0.1:9/"}, b""), AnswerError, "HTTP 302 Found"),
        (answer(500, {}, b"x" * 20_000_000), AnswerError, "HTTP 500 Internal Server Error: x"),
        (lambda handler, received: None, UnreachableError, "Server disconnected without sending a response"),
        (lambda handler, received: handler.wfile.write(b"SSH-2.0\r\n"), UnreachableError, "RemoteProtocolError"),
    ],
    ids=[
        "422",
        "404",
        "odd body",
        "page",
        "foreign file",
        "zip",
        "list",
        "broken",
        "half a file",
        "odd header",
        "wrong key",
        "elsewhere",
        "huge",
        "no answer",
        "no HTTP",
    ],
)
def test_bad_answers_are_typed_and_leave_no_file(
    send: Answer, error: type[Exception], said: str, serve: Callable[[Answer], str], tmp_path: Path
) -> None:
    with pytest.raises(error, match=said.replace("?", r"\?").replace("[", r"\[")):
        save_video(serve(send), REQUEST, tmp_path / "a", timeout_s=60)
    assert list(tmp_path.iterdir()) == []


def test_the_deadline_covers_headers_and_body(serve: Callable[[Answer], str], tmp_path: Path) -> None:
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
def test_an_invalid_url_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="must be an address such as"):
        save_video(url, REQUEST, tmp_path / "a", timeout_s=1)


def test_a_closed_port_is_a_typed_error() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        with pytest.raises(UnreachableError, match="nothing listens there"):
            get(url, "/ready", timeout_s=10)


def test_an_unwritable_file_is_reported(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    url = serve(answer(200, HEADERS, b"mp4"))
    with pytest.raises(RequestError, match="at most 200 bytes"):
        save_video(url, REQUEST, tmp_path / ("a" * 250), timeout_s=60)
    with pytest.raises(RequestError, match="existing directory"):
        save_video("http://127.0.0.1:9", REQUEST, tmp_path / "no" / "a", timeout_s=60)


def test_small_answers_are_returned_with_their_status(serve: Callable[[Answer], str]) -> None:
    assert get(serve(answer(503, {}, b"not yet")), "/ready", timeout_s=60) == (503, "not yet")


def test_requests_that_cannot_be_sent_are_refused() -> None:
    assert make_body(GenerationRequest(prompt="a", negative_prompt="")) == {"prompt": "a", "negative_prompt": ""}
    with pytest.raises(RequestError, match="noise must be nothing where a service makes it .got "):
        make_body(GenerationRequest(prompt="a", noise={}))
    with pytest.raises(RequestError, match="append_metadata must be the default over HTTP .got False"):
        make_body(GenerationRequest(prompt="a", append_metadata=False))


def test_media_are_sent_as_data_urls_and_read_back_equal(tmp_path: Path) -> None:
    """The server reads what the client sends."""
    frame = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    file = tmp_path / "a.png"
    write_image(file, frame, "png")
    for image in (file, str(file), file.read_bytes(), frame, PIL.Image.fromarray(frame)):
        body = json.loads(json.dumps(make_body(GenerationRequest(prompt="a", image=image))))
        assert set(body) == {"prompt", "image"}
        sent = parse(body).requests[0].image
        assert isinstance(sent, bytes)
        assert np.array_equal(read_image("image", sent), frame)
    request = GenerationRequest(
        mode="forward_dynamics",
        video=b"a clip",
        actions=ACTIONS.values,
        guidance_interval=(1, 2),
        condition_frame_indexes_vision=range(2),
    )
    received = parse(json.loads(json.dumps(make_body(request)))).requests[0]
    assert received.video == b"a clip"
    assert np.array_equal(np.array(received.actions, np.float32), ACTIONS.values)
    assert (received.guidance_interval, received.condition_frame_indexes_vision) == ([1, 2], [0, 1])
    assert received.mode == "forward_dynamics"


def test_unsendable_media_are_refused_before_a_request_is_sent(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="video must be a file over HTTP .got 'frames'.*Write them to one"):
        make_body(GenerationRequest(prompt="a", video=np.zeros((2, 4, 4, 3), np.uint8)))
    with pytest.raises(RequestError, match="image must be "):
        save_video("http://127.0.0.1:9", GenerationRequest(image=tmp_path / "none.png"), tmp_path / "a", timeout_s=5)
    with pytest.raises(RequestError, match="actions must be "):
        make_body(GenerationRequest(actions="up"))


def test_a_refusal_during_the_upload_is_read(serve: Callable[[Answer], str], tmp_path: Path) -> None:
    """The server answers and disconnects with most of the body unread."""
    said = b'{"error": {"message": "too large"}}'
    listener = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            connection.sendall(b"HTTP/1.1 413 No\r\ncontent-length: %d\r\n\r\n" % len(said) + said)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1 << 20):  # a server that closes gracefully
                pass

    with listener:
        thread = threading.Thread(target=refuse)
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(AnswerError, match="too large"):
            save_video(url, GenerationRequest(prompt="a", video=bytes(8_000_000)), tmp_path / "a", timeout_s=60)
        thread.join(60)
