"""The HTTP side: what is wrong is said in one shape, with the library's own words, before anything is done about it."""

from __future__ import annotations

import json
import select
import socket
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import RequestError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest, resolve

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
GOOD: dict[str, Any] = {"prompt": "a car", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}


def send(app: Any, data: Any, headers: dict[str, str], path: str = "/v1/videos/sync") -> tuple[int, Any, Any]:
    """(status, headers, body) of a POST; JSON bodies are read."""
    request = urllib.request.Request(app.url + path, data, headers)
    try:
        answer = urllib.request.urlopen(request, timeout=100)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        body = answer.read()
    is_json = "json" in answer.headers.get("content-type", "")
    return answer.status, answer.headers, json.loads(body) if is_json else body


def send_json(app: Any, body: Any) -> tuple[int, Any, Any]:
    return send(app, json.dumps(body).encode(), JSON)


def send_form(app: Any, fields: dict[str, str]) -> tuple[int, Any, Any]:
    boundary = "----boundary"
    parts = [f'--{boundary}\r\ncontent-disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()]
    data = ("".join(parts) + f"--{boundary}--\r\n").encode()
    return send(app, data, {"content-type": f"multipart/form-data; boundary={boundary}"})


BAD_VALUES: list[dict[str, Any]] = [
    {"prompt": ""},
    {"prompt": " \n\t"},
    {"prompt": 5},
    {"prompt": "x" * 200_000},
    {"negative_prompt": "x" * 200_000},
    {"height": 100},
    {"width": 8},
    {"width": -64},
    {"height": 64.5},
    {"height": 16_000, "width": 16_000, "num_frames": 189},
    {"num_frames": 0},
    {"num_frames": -3},
    {"num_frames": 10**9},
    {"num_frames": 2.5},
    {"num_frames": True},
    {"num_frames": "many"},
    {"num_inference_steps": 0},
    {"num_inference_steps": 10**6},
    {"guidance_scale": float("nan")},
    {"guidance_scale": float("inf")},
    {"guidance_scale": -1.0},
    {"guidance_scale": "six"},
    {"fps": 0},
    {"flow_shift": 0.0},
    {"seed": -1},
    {"seed": 2**64},
    {"schedule": "cosine"},
    {"compat": "vllm"},
    {"negative_metadata": "some"},
    {"use_system_prompt": "perhaps"},
]


@pytest.mark.parametrize("bad", BAD_VALUES, ids=lambda bad: str(bad)[:40])
def test_a_bad_value_says_what_it_says_in_python(bad: dict[str, Any], app: Any) -> None:
    body = {**GOOD, **bad}
    with pytest.raises(RequestError) as caught:
        resolve(GenerationRequest(**body), CheckpointLayout.open(app.config.checkpoint))
    status, headers, answer = send_json(app, body)
    assert status == 422
    error = answer["error"]
    assert error["message"] == str(caught.value)
    assert (error["param"], error["given"], error["allowed"]) == (
        caught.value.field,
        caught.value.given,
        caught.value.allowed,
    )
    assert error["code"] == "invalid_field"
    assert error["type"] == "invalid_request_error"
    assert headers["x-request-id"]


def test_too_many_tokens_are_found_by_the_tokenizer_and_told_as_422(app: Any) -> None:
    status, _, answer = send_json(app, {**GOOD, "prompt": "\U0001f600" * 20_000})
    assert status == 422
    assert "at most 16384 tokens" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"promt": "a car"}, "promt", "Did you mean prompt?"),
        ({**GOOD, "num_frame": 5}, "num_frame", "Did you mean num_frames?"),
        ({**GOOD, "zzz": 5}, "zzz", "known are prompt"),
        ({}, "prompt", "required"),
        ({**GOOD, "model": "other"}, "model", "the one that is served"),
        ({**GOOD, "size": "32"}, "size", "WIDTHxHEIGHT"),
        ({**GOOD, "size": "64x32"}, "size", "the same as width=32"),
        ({"prompt": "a", "width": 64}, "height", "together"),
        ({"prompt": "a", "seconds": -1}, "seconds", "a number from"),
    ],
)
def test_a_wrong_field_is_named(body: dict[str, Any], field: str, said: str, app: Any) -> None:
    status, _, answer = send_json(app, body)
    assert status == 422
    assert answer["error"]["param"] == field
    assert said in answer["error"]["message"]


@pytest.mark.parametrize(
    ("data", "headers", "status", "code"),
    [
        (b'{"prompt": ', JSON, 400, "broken_json"),
        (b"[1, 2]", JSON, 400, "broken_json"),
        (b"\xff\xfe", JSON, 400, "broken_json"),
        (b"[" * 100_000, JSON, 400, "broken_json"),
        (b"prompt", {"content-type": "text/plain"}, 415, "wrong_content_type"),
        (b"--x\r\nbroken", {"content-type": "multipart/form-data; boundary=y"}, 400, "broken_form"),
        (b"--x", {"content-type": "multipart/form-data"}, 400, "broken_form"),
        (b"&".join(b"f%d=1" % i for i in range(65)), FORM, 400, "broken_form"),
        (b'{"prompt": "a", "a\\ud800": 1}', JSON, 422, "invalid_field"),
        (b'{"prompt": "a", "' + b"x" * 900_000 + b'": 1}', JSON, 422, "invalid_field"),
        (b"{" + b" " * 2_000_000 + b"}", JSON, 413, "body_too_large"),
    ],
)
def test_a_body_that_cannot_be_read(data: bytes, headers: dict[str, str], status: int, code: str, app: Any) -> None:
    answer_status, _, answer = send(app, data, headers)
    assert (answer_status, answer["error"]["code"]) == (status, code)
    assert len(json.dumps(answer)) < 4000, "what was given is shown shortened"


def test_a_huge_body_is_refused_while_it_is_being_read(app: Any) -> None:
    """A gigabyte without an announced length: the answer comes after a small part of it."""
    host, port = app.url.split("/")[2].split(":")
    head = f"POST /{app.name}/v1/videos/sync HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    sent_mib = 0
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head}transfer-encoding: chunked\r\n\r\n".encode())
        while sent_mib < 1024 and not select.select([connection], [], [], 0)[0]:
            try:
                connection.sendall(chunk)
            except ConnectionError:
                break  # the server has hung up after its answer
            sent_mib += 1
        answer = b""
        while b"body_too_large" not in answer and (part := connection.recv(1 << 16)):
            answer += part
    assert b" 413 " in answer.splitlines()[0]
    assert b"body_too_large" in answer
    assert sent_mib < 256
    assert send_json(app, GOOD)[0] == 200


def test_forms_and_json_mean_the_same(app: Any, reference: Callable[[GenerationRequest], GenerationResult]) -> None:
    expected = reference(GenerationRequest(**GOOD, seed=7, guidance_scale=3.0)).frames_sha256
    fields = {"prompt": "a car", "num_frames": "5", "size": "32x32", "num_inference_steps": "2", "seed": "7"}
    status, headers, body = send_form(app, {**fields, "guidance_scale": "3.0", "user": "me"})
    assert status == 200
    assert body[4:8] == b"ftyp"
    assert headers["x-frames-sha256"] == expected
    data = urllib.parse.urlencode({**fields, "guidance_scale": "3"}).encode()
    status, headers, _ = send(app, data, {"content-type": "application/x-www-form-urlencoded"})
    assert (status, headers["x-frames-sha256"]) == (200, expected)


def test_seconds_make_frames(app: Any) -> None:
    status, headers, _ = send_json(
        app, {"prompt": "a", "size": "32x32", "seconds": 1, "fps": 8, "num_inference_steps": 1}
    )
    assert status == 200
    assert "num_frames=8 was rounded up to 9" in headers["x-notes"]


def test_the_request_id_goes_through(app: Any) -> None:
    headers = {**JSON, "x-request-id": "mine"}
    _, answer_headers, _ = send(app, json.dumps(GOOD).encode(), headers)
    assert answer_headers["x-request-id"] == "mine"
    for refused in ("a" * 129, "two words"):
        status, _, answer = send(app, json.dumps(GOOD).encode(), {**JSON, "x-request-id": refused})
        assert status == 400, refused
        assert answer["error"]["code"] == "invalid_header"


def test_requests_of_one_id_at_once_do_not_mix(
    app: Any, reference: Callable[[GenerationRequest], GenerationResult]
) -> None:
    """A proxy that asks again, or a client that is careless with ids, gets its own frames all the same."""

    def ask(seed: int) -> tuple[int, str]:
        body = json.dumps({**GOOD, "num_frames": 17, "seed": seed}).encode()
        status, headers, _ = send(app, body, {**JSON, "x-request-id": "same"})
        return status, headers["x-frames-sha256"]

    expected = [reference(GenerationRequest(**{**GOOD, "num_frames": 17, "seed": seed})) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [(200, result.frames_sha256) for result in expected]


def get(app: Any, path: str) -> tuple[int, Any]:
    try:
        with urllib.request.urlopen(app.url + path, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


def test_health_ready_and_models(app: Any) -> None:
    assert get(app, "/health") == (200, {"status": "ok"})
    assert get(app, "/ready") == (200, {"status": "ready"})
    status, models = get(app, "/v1/models")
    assert status == 200
    (model,) = models["data"]
    assert model["id"] == "nano"
    assert model["family"] == "nano"
    assert model["modes"] == ["text_to_image", "text_to_video"]
    for path, status in (("/v1/nothing", 404), ("/v1/videos/sync", 405)):
        answer_status, answer = get(app, path)
        assert (answer_status, answer["error"]["code"]) == (status, "no_such_route")


def test_the_openapi_document_has_the_fields(app: Any) -> None:
    _, document = get(app, "/openapi.json")
    content = document["paths"]["/v1/videos/sync"]["post"]["requestBody"]["content"]
    assert set(content) == {"application/json", "multipart/form-data"}
    assert {"prompt", "num_frames", "size", "seed"} <= set(content["application/json"]["schema"]["properties"])
