"""Named attacks in one place: paths, headers, bodies, keys, URLs of internal hosts."""

from __future__ import annotations

import asyncio
import base64
import json
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from deployments.api import body_reader
from deployments.api.remote_media import RemoteMediaFetcher
from deployments.api.remote_url import is_public
from deployments.config import RemoteMediaConfig
from deployments.jobs.keys import NewKey
from tests.api.fake_service import ID_ROUTES, UNKNOWN, Api, make_scope
from tests.mode_inputs import IMAGE, RED_PNG, png

MARK = "mark-of-a-client"
POSTS = ["/v1/videos", "/v1/videos/sync", "/v1/images/generations"]


class Opened:
    """Records the files and folders that this interpreter opens while enabled."""

    _EVENTS = (
        "open",
        "os.listdir",
        "os.scandir",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
    )

    def __init__(self) -> None:
        self.paths: list[str] | None = None
        sys.addaudithook(self._note)  # cannot be removed; has no effect while disabled

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.paths is not None and event in self._EVENTS:
            self.paths += [repr(argument) for argument in arguments]

    @contextmanager
    def record(self) -> Iterator[list[str]]:
        self.paths = paths = []
        try:
            yield paths
        finally:
            self.paths = None


OPENED = Opened()


def test_the_watch_on_files_sees_an_access(tmp_path: Path) -> None:
    with OPENED.record() as paths, pytest.raises(FileNotFoundError):
        (tmp_path / MARK).read_bytes()
    assert any(MARK in path for path in paths)


def raw(api: Api, method: str, path: str, headers: tuple[tuple[bytes, bytes], ...] = (), body: bytes = b"{}") -> Any:
    """GET a path unchanged, which clients would normalise; return (status, text)."""
    came: dict[str, Any] = {"status": 0, "body": b""}
    scope = make_scope(method, path, ((b"content-type", b"application/json"), *headers))

    async def receive() -> Any:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: Any) -> None:
        if message["type"] == "http.response.start":
            came["status"] = message["status"]
        came["body"] += message.get("body", b"")

    api.run(api.app(scope, receive, send))
    return came["status"], came["body"].decode()


# Path traversal


@pytest.mark.parametrize(
    "video_id",
    [
        f"../../{MARK}",
        f"..%2f..%2f{MARK}",
        f"..\\..\\{MARK}",
        f"/etc/{MARK}",
        f"{UNKNOWN}/../../{MARK}",
        f"{UNKNOWN}\x00{MARK}",
        f"{UNKNOWN}\n",
        f"{UNKNOWN} ",
        f"{UNKNOWN}.json",
        UNKNOWN.upper(),
        UNKNOWN.replace("0", "٠"),  # non-ASCII digits
        "..",
        ".",
        "*",
        "%",
        "' OR 1=1 --",
        MARK * 1000,
        f"\udcff{MARK}",
    ],
    ids=ascii,
)
def test_path_traversal_in_ids_opens_nothing(video_id: str, shared_api: Api) -> None:
    secret = shared_api.media.directory / "secret"
    secret.write_text("the secret")
    with OPENED.record() as paths:
        for method, rest in ID_ROUTES:
            status, text = raw(shared_api, method, f"/v1/videos/{video_id}{rest}", body=b'{"prompt": "a"}')
            assert status in (404, 405), (method, rest, text)
            assert "secret" not in text
            assert method == "HEAD" or json.loads(text)["error"]["code"] in ("not_found", "no_such_route")
    assert [path for path in paths if MARK in path] == []


def test_path_traversal_in_queries_opens_nothing(api: Api) -> None:
    video = api.create()
    api.complete(api.claim())
    with OPENED.record() as paths:
        for variant in (f"../{MARK}", f"/etc/{MARK}", "video%00", ".mp4", ""):
            error = api.expect_refusal("GET", f"/v1/videos/{video['id']}/content?variant={variant}", 422)
            assert error["param"] == "variant"
        assert api.expect_refusal("GET", f"/v1/videos?after=../{MARK}", 422)["param"] == "after"
    assert [path for path in paths if MARK in path] == []


def test_path_traversal_in_file_names_of_parts_opens_nothing(api: Api) -> None:
    names = [f"../../{MARK}.png", f"/etc/{MARK}", f"C:\\{MARK}", f"{MARK}\x00.png", "..", f'{MARK}"', MARK * 1000]
    with OPENED.record() as paths:
        for name in names:
            answer = api.post("/v1/videos", data={"prompt": "a"}, files={"image": (name, RED_PNG, "image/png")})
            assert answer.status_code in (200, 400), answer.text
            assert MARK not in answer.text
            assert answer.status_code == 400 or answer.json()["mode"] == "image_to_video"
    assert [path for path in paths if MARK in path] == []
    assert api.director.submitted


@pytest.mark.parametrize(
    "value",
    [
        f"/etc/{MARK}",
        f"../{MARK}",
        f"file:///etc/{MARK}",
        f"FILE:/etc/{MARK}",
        {"image_url": f"file:///etc/{MARK}"},
        [{"image_url": f"/etc/{MARK}"}],
        f'{{"image_url": "file:///etc/{MARK}"}}',
        {"image_url": {"url": f"/etc/{MARK}"}},
        {"path": f"/etc/{MARK}"},
        {"file_id": f"../{MARK}"},
        f"data:image/png,/etc/{MARK}",
        f"data:text/plain;base64,{base64.b64encode(f'/etc/{MARK}'.encode()).decode()}",
    ],
    ids=str,
)
@pytest.mark.parametrize("path", POSTS[:2])
def test_no_path_in_a_body_is_opened(value: Any, path: str, shared_api: Api) -> None:
    with OPENED.record() as paths:
        for field in ("image", "image_reference", "input_reference", "video", "video_reference"):
            answer = shared_api.post(path, json={"prompt": "a", field: value})
            assert answer.status_code == 422, answer.text
    assert [it for it in paths if MARK in it] == []
    assert shared_api.director.submitted == []


@pytest.mark.parametrize("field", ["model", "output", "mode", "domain_name", "service_class", "size", "output_format"])
@pytest.mark.parametrize("path", POSTS)
def test_no_name_in_a_body_is_opened(field: str, path: str, shared_api: Api) -> None:
    with OPENED.record() as paths:
        assert shared_api.post(path, json={"prompt": "a", field: f"../../{MARK}"}).status_code == 422
    assert [it for it in paths if MARK in it] == []


def test_names_stored_with_a_job_are_not_opened(api: Api) -> None:
    headers = {"x-request-id": f"../../{MARK}", "idempotency-key": f"/etc/{MARK}"}
    with OPENED.record() as paths:
        video = api.create({"prompt": f"../../{MARK}", "user": f"../{MARK}"}, headers=headers)
        api.complete(api.claim())
        answer = api.get(f"/v1/videos/{video['id']}/content", headers={"if-none-match": f"../{MARK}"})
        assert answer.content == b"finished"
        assert api.send("DELETE", f"/v1/videos/{video['id']}").status_code == 200
    assert [path for path in paths if MARK in path] == []


# Header injection


@pytest.mark.parametrize("value", [b"a\r\nx-evil: 1", b"a\nx-evil: 1", b"a\rx-evil: 1", b"\x00", b"\xff\xfe"])
def test_request_headers_inject_no_response_header(value: bytes, api: Api) -> None:
    video = api.create()
    api.complete(api.claim())
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("POST", "/v1/videos", {"json": {"prompt": "a"}}),
        ("GET", f"/v1/videos/{video['id']}/content", {}),
        ("GET", f"/v1/videos/{video['id']}/events", {}),
    ]
    for name in (
        b"x-request-id",
        b"idempotency-key",
        b"last-event-id",
        b"range",
        b"if-none-match",
        b"if-range",
        b"origin",
    ):
        for method, path, asked in calls:
            answer = api.send(method, path, headers={name: value}, **asked)
            is_kept = method == "POST" and name in (b"x-request-id", b"idempotency-key")
            assert answer.status_code == 400 if is_kept else answer.status_code < 500
            assert "x-evil" not in answer.headers
            assert all("\r" not in it and "\n" not in it for it in answer.headers.values())


@pytest.mark.parametrize("text", ['a"\r\nx-evil: 1\r\n\r\n', "a\r\n\r\n<script>", "é\u2028", "a;b"])
def test_texts_in_answers_inject_no_response_header(text: str, api: Api) -> None:
    files = {"image": (text, RED_PNG, "image/png")}
    video = api.post("/v1/videos", data={"prompt": text, "user": text}, files=files).json()
    api.complete(api.claim())
    for path in (f"/v1/videos/{video['id']}", f"/v1/videos/{video['id']}/content"):
        answer = api.get(path)
        assert "x-evil" not in answer.headers
        assert all(char.isprintable() and char.isascii() for value in answer.headers.values() for char in value)
    answer = api.post("/v1/videos/sync", json={"prompt": text, "user": text})
    assert answer.status_code == 200
    assert all(char.isprintable() and char.isascii() for value in answer.headers.values() for char in value)


@pytest.mark.parametrize("prompt", ["a\n\nevent: completed\ndata: {}\n\n", "a\r\n\r\nid: 999\r\n", "\u2028\n: comment"])
def test_a_prompt_injects_no_event(prompt: str, api: Api) -> None:
    video = api.create({"prompt": prompt})
    api.fail(api.claim())
    lines = api.get(f"/v1/videos/{video['id']}/events").text.splitlines()
    kinds = [line.removeprefix("event: ") for line in lines if line.startswith("event:")]
    assert "completed" not in kinds
    assert kinds[-1] == "failed"
    assert "id: 999" not in lines
    data = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data:")]
    assert data[-1]["prompt"] == prompt


# Oversize and slow bodies


BODIES = [*POSTS, f"/v1/videos/{UNKNOWN}/remix"]


def test_a_body_announced_as_too_large_is_refused_unread(make_api: Callable[..., Api]) -> None:
    api = make_api(http={"max_body_bytes": 1000, "max_bodies_bytes": 2000})

    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("it is read")
        yield b""

    for path in BODIES:
        for length in (1001, 10**17, 10**40):
            headers = {"content-type": "application/json", "content-length": str(length)}
            assert api.expect_refusal("POST", path, 413, content=never(), headers=headers)["code"] == "body_too_large"
    assert api.service.body_memory.taken_bytes == 0


def test_a_body_without_length_is_read_up_to_the_bound(make_api: Callable[..., Api]) -> None:
    api = make_api(http={"max_body_bytes": 5000, "max_bodies_bytes": 10_000})
    starts = {
        "application/json": b'{"prompt": "',
        "multipart/form-data; boundary=b": b'--b\r\nContent-Disposition: form-data; name="prompt"\r\n\r\n',
        "application/x-www-form-urlencoded": b"prompt=",
    }
    for path in BODIES:
        for kind, start in starts.items():
            num_read = 0

            async def endless(start: bytes = start) -> AsyncIterator[bytes]:
                nonlocal num_read
                yield start
                while True:
                    num_read += 1
                    yield b"x" * 1000

            error = api.expect_refusal("POST", path, 413, content=endless(), headers={"content-type": kind})
            assert error["code"] == "body_too_large"
            assert num_read < 10
    assert api.service.body_memory.taken_bytes == 0
    assert api.director.submitted == []


@pytest.mark.parametrize("limit", ["_MAX_LAG_S", "_UPLOAD_S"])
def test_a_slow_body_holds_its_place_for_a_bounded_time(
    limit: str, shared_api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(body_reader, limit, 0.1)

    async def dripping() -> AsyncIterator[bytes]:
        yield b'{"prompt": "'
        while True:
            await asyncio.sleep(100 if limit == "_MAX_LAG_S" else 0.01)
            yield b"x"

    for path in BODIES:
        error = shared_api.expect_refusal(
            "POST", path, 408, content=dripping(), headers={"content-type": "application/json"}
        )
        assert error["code"] == "body_too_slow"
    assert shared_api.service.body_memory.taken_bytes == 0


@pytest.mark.parametrize(
    ("kind", "body", "status"),
    [
        ("application/json", b"[" * 100_000, 400),
        ("application/json", b'{"a":' * 100_000, 400),
        ("application/json", b'{"prompt": "a", "prompt": "b"}', 400),
        ("application/json", b'{"seed": ' + b"9" * 100_000 + b"}", 400),
        ("application/json", b'{"guidance_scale": 1e999, "prompt": "a"}', 422),
        ("application/json", b'{"guidance_scale": NaN, "prompt": "a"}', 422),
        ("application/json", b"\x1f\x8b\x08\x00" + bytes(100), 400),
        ("application/json", b'{"prompt": "\\ud800"}', 422),
        ("application/json; charset=utf-16", '{"prompt": "a"}'.encode("utf-16"), 415),
        ("application/x-www-form-urlencoded", b"&".join(b"a%d=1" % i for i in range(10_000)), 400),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n", 400),
        ("multipart/form-data", b"--b--", 400),
        ("multipart/form-data; boundary=" + "b" * 10_000, b"--b--", 400),
        (
            "multipart/form-data; boundary=b",
            b"".join(b'--b\r\nContent-Disposition: form-data; name="a%d"\r\n\r\nx\r\n' % i for i in range(1000))
            + b"--b--",
            400,
        ),
        (
            "multipart/form-data; boundary=b",
            b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\nX: '
            + b"y" * 10**6
            + b"\r\n\r\nx\r\n--b--",
            400,
        ),
        ("application/xml", b"<!DOCTYPE a [<!ENTITY b SYSTEM 'file:///etc/passwd'>]><a>&b;</a>", 415),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("path", POSTS)
def test_body_bombs_are_refused(kind: str, body: bytes, status: int, path: str, shared_api: Api) -> None:
    answer = shared_api.post(path, content=body, headers={"content-type": kind})
    assert answer.status_code == status, answer.text[:300]
    assert len(answer.content) < 3000
    assert shared_api.service.body_memory.taken_bytes == 0
    assert shared_api.director.submitted == []


def test_an_image_bomb_is_refused_by_its_header(shared_api: Api) -> None:
    bomb = png(IMAGE[:1, :1])
    width = (2**31 - 1).to_bytes(4, "big")
    bomb = bomb[:16] + width + width + bomb[24:]
    for name in ("image", "image_reference", "input_reference"):
        answer = shared_api.post("/v1/videos", data={"prompt": "a"}, files={name: ("a.png", bomb, "image/png")})
        assert answer.status_code == 422, answer.text


# Key guessing


def key_text(api: Api, name: str = "a") -> str:
    return api.store.keys.create(NewKey(name=name))[1]


def test_refusals_of_keys_reveal_nothing(keyed_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unknown, wrong, malformed and revoked keys get the same answer after one lookup."""
    right, other = key_text(keyed_api), key_text(keyed_api, "b")
    revoked_key, revoked = keyed_api.store.keys.create(NewKey(name="c"))
    keyed_api.store.keys.revoke(revoked_key.key_id)
    num_looks, verify = 0, keyed_api.store.keys.verify

    def verify_counting(text: str) -> Any:
        nonlocal num_looks
        num_looks += 1
        return verify(text)

    monkeypatch.setattr(keyed_api.store.keys, "verify", verify_counting)
    start, _, secret = right.rpartition("_") if right.count("_") == 2 else (right[:19], "_", right[20:])
    guesses = [
        f"c3_{'0' * 16}_{secret}",
        f"{right[:20]}{'A' * 43}",
        f"{right[:20]}{other[20:]}",
        right[:-1],
        right + "A",
        right.swapcase(),
        right[3:],
        secret,
        start,
        "c3_",
        "sk-proj-1234",
        revoked,
        "%",
        "' OR 1=1 --".replace(" ", "+"),
        right[:-1] + ("A" if right[-1] != "A" else "B"),
    ]
    refusals = set()
    for guess in guesses:
        answer = keyed_api.get("/v1/videos", headers={"authorization": f"Bearer {guess}"})
        refusals.add((answer.status_code, answer.text, tuple(sorted(answer.headers.items()))))
    assert len(refusals) == 1
    assert num_looks == len(guesses)
    (status, text, headers) = refusals.pop()
    assert (status, json.loads(text)["error"]["code"]) == (401, "wrong_api_key")
    assert ("www-authenticate", "Bearer") in headers
    assert keyed_api.get("/v1/videos", headers={"authorization": f"Bearer {right}"}).status_code == 200


def test_a_wrong_key_is_refused_before_the_body_is_read(keyed_api: Api) -> None:
    async def never() -> AsyncIterator[bytes]:
        raise AssertionError("it is read")
        yield b""

    for path in POSTS:
        headers = {"authorization": "Bearer guess", "content-type": "application/json"}
        assert keyed_api.expect_refusal("POST", path, 401, content=never(), headers=headers)["code"] == "wrong_api_key"


def test_no_answer_or_log_contains_a_key(keyed_api: Api, caplog: pytest.LogCaptureFixture) -> None:
    text = key_text(keyed_api)
    caplog.set_level(0)
    headers = {"authorization": f"Bearer {text}"}
    answers = [
        keyed_api.post("/v1/videos", json={"prompt": "a"}, headers=headers),
        keyed_api.post("/v1/videos", json={"promt": "a"}, headers=headers),
        keyed_api.get("/v1/videos", headers=headers),
        keyed_api.get("/v1/videos", headers={"authorization": f"Bearer {text}x"}),
        keyed_api.get("/metrics", headers=headers),
    ]
    secret = text[20:]
    assert not any(secret in answer.text or secret in str(answer.headers) for answer in answers)
    assert secret not in caplog.text


# SSRF

URLS = [
    "http://127.0.0.1/",
    "http://localhost:8000/v1/videos",
    "http://169.254.169.254/latest/meta-data/",
    "http://[::1]:8265/api/jobs/",
    "http://2130706433/",
    "https://inside.example.com/secret",
    "https://files.example.com@127.0.0.1/",
    "https://files.example.com:6379/",
    "gopher://files.example.com/",
    "ftp://files.example.com/",
    "https://unlisted.example.net/",
]


@pytest.mark.parametrize("is_on", [False, True])
def test_urls_of_internal_hosts_are_never_fetched(is_on: bool, api: Api) -> None:
    """Remote media are off, or on with some hosts listed."""
    asked: list[str] = []

    def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["10.0.0.1", "8.8.8.8"]

    if is_on:
        spec = RemoteMediaConfig(enabled=True, hosts=("files.example.com", "inside.example.com"))
        api.service.fetch_file = RemoteMediaFetcher(spec, resolve=resolve, is_allowed_address=is_public).fetch
    for url in URLS:
        for path in POSTS[:2]:
            bodies: list[dict[str, Any]] = [
                {"json": {"prompt": "a", "image": url}},
                {"json": {"prompt": "a", "image_reference": {"image_url": url}}},
                {"json": {"prompt": "a", "input_reference": [{"image_url": {"url": url}}]}},
                {"files": {"prompt": (None, "a"), "video_reference": (None, url)}},
            ]
            for body in bodies:
                answer = api.post(path, **body)
                assert answer.status_code == 422, answer.text
                assert "10.0.0.1" not in answer.text
    assert api.director.submitted == []
    assert api.service.body_memory.taken_bytes == 0
    assert set(asked) == ({"inside.example.com"} if is_on else set()), "others are not even looked up"


def test_a_listed_url_is_read_like_an_upload(make_api: Callable[..., Api]) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(RED_PNG) + RED_PNG)
        writer.close()

    async def body() -> httpx2.Response:
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            port = server.sockets[0].getsockname()[1]
            spec = RemoteMediaConfig(enabled=True, hosts=(f"files.example.com:{port}",), schemes=("http",))
            fetcher = RemoteMediaFetcher(
                spec, resolve=lambda host, port: ["127.0.0.1"], is_allowed_address=lambda address: True
            )
            api.service.fetch_file = fetcher.fetch
            url = f"http://files.example.com:{port}/a.png"
            return await api.asend("POST", "/v1/videos", json={"prompt": "a", "image_reference": {"image_url": url}})

    api = make_api()
    answer = api.run(body())
    assert (answer.status_code, answer.json()["mode"]) == (200, "image_to_video")
    ((request, _),) = api.director.submitted
    assert request.image == RED_PNG
    assert api.service.body_memory.taken_bytes == 0
