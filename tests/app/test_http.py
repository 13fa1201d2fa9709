"""HTTP against the whole app: errors have one shape and the library's wording, before any work is done."""

from __future__ import annotations

import base64
import io
import json
import select
import socket
import urllib.parse
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import PIL.Image
import pytest

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import RequestError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import find_offered_modes, resolve
from deployments.jobs.keys import KeyStore, NewKey
from deployments.launch.app_calls import save_video
from deployments.messages import Finished
from tests import mode_inputs
from tests.settling import eventually

Reference = Callable[[GenerationRequest], GenerationResult]

pytestmark = pytest.mark.timeout(600)

JSON = {"content-type": "application/json"}
FORM = {"content-type": "application/x-www-form-urlencoded"}
# App -> header with its key, if it needs one.
KEYS: dict[str, dict[str, str]] = {}
GOOD: dict[str, Any] = {"prompt": "a car", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}


def send(app: Any, data: Any, headers: dict[str, str], path: str = "/v1/videos/sync") -> tuple[int, Any, Any]:
    """(status, headers, body) of a POST; JSON bodies are read."""
    answer = httpx2.post(app.url + path, content=data, headers={**KEYS.get(app.name, {}), **headers}, timeout=100)
    is_json = "json" in answer.headers.get("content-type", "")
    return answer.status_code, answer.headers, answer.json() if is_json else answer.content


def send_json(app: Any, body: Any, path: str = "/v1/videos/sync") -> tuple[int, Any, Any]:
    return send(app, json.dumps(body).encode(), JSON, path)


def send_form(app: Any, fields: dict[str, Any], path: str = "/v1/videos/sync") -> tuple[int, Any, Any]:
    """A multipart form; bytes are sent as files."""
    boundary = "----boundary"
    data = b""
    for name, value in fields.items():
        file = '; filename="a"' if isinstance(value, bytes) else ""
        data += f'--{boundary}\r\ncontent-disposition: form-data; name="{name}"{file}\r\n\r\n'.encode()
        data += (value if isinstance(value, bytes) else str(value).encode()) + b"\r\n"
    headers = {"content-type": f"multipart/form-data; boundary={boundary}"}
    return send(app, data + f"--{boundary}--\r\n".encode(), headers, path)


@pytest.fixture(scope="module")
def small_app(start_app: Callable[..., Any], media: Path) -> Any:
    """An app with keys that accepts bodies of 1 MiB, and 1.5 MiB at once."""
    keys = KeyStore.open(f"sqlite:///{media}/limits.sqlite3")
    _, text = keys.create(NewKey(name="tests"))
    keys.close()
    KEYS["limits"] = {"authorization": f"Bearer {text}"}
    return start_app("limits", auth__enabled=True, http__max_body_bytes=2**20, http__max_bodies_bytes=3 * 2**19)


def head_of(app: Any) -> str:
    """Make the head of a POST by hand, without its length."""
    host, key = app.url.split("/")[2], KEYS[app.name]["authorization"]
    first = f"POST /v1/videos/sync HTTP/1.1\r\nhost: {host}\r\nauthorization: {key}\r\n"
    return f"{first}content-type: application/json\r\n"


@pytest.fixture(scope="module")
def png() -> bytes:
    """A picture of another aspect ratio than GOOD's."""
    return mode_inputs.png(np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8))


@pytest.fixture(scope="module")
def mp4() -> bytes:
    """Nine frames of noise."""
    return mode_inputs.mp4(np.random.default_rng(1).integers(0, 256, (9, 48, 64, 3), np.uint8))


def url_of(data: bytes) -> str:
    return mode_inputs.data_url(data, "application/octet-stream")


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
def test_http_errors_have_the_librarys_wording(bad: dict[str, Any], app: Any) -> None:
    body = {**GOOD, **bad}
    with pytest.raises(RequestError) as caught:
        resolve(GenerationRequest(**body), CheckpointLayout.open(app.config.checkpoint))
    status, _, answer = send_json(app, body)
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


def test_too_many_tokens_are_a_422(app: Any) -> None:
    status, _, answer = send_json(app, {**GOOD, "prompt": "\U0001f600" * 20_000})
    assert status == 422
    assert "at most 16384 tokens" in answer["error"]["message"]


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"promt": "a car"}, "promt", "Did you mean prompt?"),
        ({**GOOD, "num_frame": 5}, "num_frame", "Did you mean num_frames?"),
        ({**GOOD, "zzz": 5}, "zzz", "Fields are prompt"),
        ({}, "prompt", "at least one visible character"),
        ({**GOOD, "model": "other"}, "model", "one of ['nano', 'nvidia/nano', 'nvidia/Cosmos3-Nano', 'Cosmos3-Nano']"),
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
        (b"&".join(b"f%d=1" % i for i in range(129)), FORM, 400, "broken_form"),
        (b'{"prompt": "a", "a\\ud800": 1}', JSON, 422, "invalid_field"),
        (b'{"prompt": "a", "' + b"x" * 900_000 + b'": 1}', JSON, 422, "invalid_field"),
        (b"{" + b" " * 2_000_000 + b"}", JSON, 413, "body_too_large"),
    ],
)
def test_an_unreadable_body_is_refused(
    data: bytes, headers: dict[str, str], status: int, code: str, small_app: Any
) -> None:
    answer_status, _, answer = send(small_app, data, headers)
    assert (answer_status, answer["error"]["code"]) == (status, code)
    assert len(json.dumps(answer)) < 4000, "what was given is shown shortened"


def test_a_huge_body_is_refused_while_it_is_being_read(small_app: Any) -> None:
    """A gigabyte without Content-Length: the answer comes after a small part of it."""
    host, port = small_app.url.split("/")[2].split(":")
    chunk = b"100000\r\n" + b" " * 2**20 + b"\r\n"
    sent_mib = 0
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        connection.sendall(f"{head_of(small_app)}transfer-encoding: chunked\r\n\r\n".encode())
        while sent_mib < 1024 and not select.select([connection], [], [], 0)[0]:
            try:
                connection.sendall(chunk)
            except ConnectionError:
                break  # the server disconnects after its answer
            sent_mib += 1
        answer = b""
        while b"body_too_large" not in answer and (part := connection.recv(1 << 16)):
            answer += part
    assert b" 413 " in answer.splitlines()[0]
    assert b"body_too_large" in answer
    assert sent_mib < 256
    assert send_json(small_app, GOOD)[0] == 200


def test_bodies_together_are_bounded(small_app: Any) -> None:
    """A body that does not fit beside one that is being sent is refused unread."""
    host, port = small_app.url.split("/")[2].split(":")
    large = {**GOOD, "seed": -1, "extra_params": {}, "prompt": "a" + " " * 900_000}
    with socket.create_connection((host, int(port)), timeout=60) as slow:
        slow.sendall(f"{head_of(small_app)}content-length: 1000000\r\n\r\n".encode() + b" " * 900_000)
        assert eventually(lambda: send(small_app, json.dumps(large).encode(), JSON)[0] == 429)
        status, headers, answer = send(small_app, json.dumps(large).encode(), JSON)
        assert (status, answer["error"]["code"], headers["retry-after"]) == (429, "overloaded", "5")
        assert send_json(small_app, GOOD)[0] == 200, "small ones go through"
    # The client disconnects in the middle of its upload.
    assert eventually(lambda: send(small_app, json.dumps(large).encode(), JSON)[0] == 422)


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


def test_seconds_are_converted_to_frames(app: Any) -> None:
    status, headers, _ = send_json(
        app, {"prompt": "a", "size": "32x32", "seconds": 1, "fps": 8, "num_inference_steps": 1}
    )
    assert status == 200
    assert "num_frames=8 was rounded up to 9" in headers["x-notes"]


def test_a_request_id_must_be_a_word(app: Any) -> None:
    for refused in ("a" * 129, "two words"):
        status, _, answer = send(app, json.dumps(GOOD).encode(), {**JSON, "x-request-id": refused})
        assert status == 400, refused
        assert answer["error"]["code"] == "invalid_header"


def test_concurrent_requests_with_one_id_do_not_mix(
    app: Any, reference: Callable[[GenerationRequest], GenerationResult]
) -> None:
    """A proxy that retries, or a client that repeats ids, gets its own frames."""

    def ask(seed: int) -> tuple[int, str]:
        body = json.dumps({**GOOD, "num_frames": 17, "seed": seed}).encode()
        status, headers, _ = send(app, body, {**JSON, "x-request-id": "same"})
        return status, headers["x-frames-sha256"]

    expected = [reference(GenerationRequest(**{**GOOD, "num_frames": 17, "seed": seed})) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(ask, range(4))) == [(200, result.frames_sha256) for result in expected]


def get(app: Any, path: str) -> tuple[int, Any]:
    answer = httpx2.get(app.url + path, timeout=60)
    return answer.status_code, answer.json()


def test_health_ready_and_models_describe_the_app(app: Any) -> None:
    assert get(app, "/health") == (200, {"status": "ok"})
    assert get(app, "/ready") == (200, {"status": "ready"})
    status, models = get(app, "/v1/models")
    assert status == 200
    (model,) = models["data"]
    assert model["id"] == "nano"
    assert (model["family"], model["variant"]) == ("cosmos3", "nano")
    layout = CheckpointLayout.open(app.config.checkpoint)
    assert model["modes"] == list(find_offered_modes(layout))
    assert {"text_to_image", "image_to_video", "video_to_video", "policy"} <= set(model["modes"])
    assert "text_to_video_with_sound" in model["modes"]
    for path, status, code in (("/v1/nothing", 404, "no_such_route"), ("/v1/videos/sync", 404, "not_found")):
        answer_status, answer = get(app, path)
        assert (answer_status, answer["error"]["code"]) == (status, code)
    assert send(app, b"", JSON, "/v1/models")[0] == 405


def test_a_loopback_app_answers_only_to_loopback_names(app: Any) -> None:
    status, _, answer = send(app, b"{}", {**JSON, "host": "evil.example"})
    assert (status, answer["error"]["code"]) == (403, "wrong_host")
    port = app.url.split("/")[2].partition(":")[2]
    assert send(app, b"{}", {**JSON, "host": f"localhost:{port}"})[0] == 422


def test_with_auth_a_valid_key_is_required(small_app: Any) -> None:
    assert send(small_app, b"{}", {**JSON, "host": "any.example"})[0] == 422, "nothing is wrong but the body"
    for key, code in (("", "no_api_key"), ("Bearer c3_0", "wrong_api_key")):
        status, headers, answer = send(small_app, b"{}", {**JSON, "authorization": key})
        assert (status, answer["error"]["code"], headers["www-authenticate"]) == (401, code, "Bearer")
    assert get(small_app, "/v1/models")[0] == 401
    assert get(small_app, "/ready")[0] == 200


def test_the_openapi_document_has_the_fields(app: Any) -> None:
    _, document = get(app, "/openapi.json")
    assert "/v1/images/generations" in document["paths"]
    assert {"/v1/videos", "/v1/videos/sync", "/v1/videos/{video_id}/events"} <= set(document["paths"])


# Images, clips, sound and actions


def test_an_image_starts_a_clip_in_every_encoding(app: Any, png: bytes, reference: Reference) -> None:
    expected = reference(GenerationRequest(**GOOD, mode="image_to_video", image=png)).frames_sha256
    for send_it, fields in (
        (send_form, {"image": png}),
        (send_form, {"input_reference": png}),
        (send_form, {"image_reference": json.dumps({"image_url": url_of(png)})}),
        (send_json, {"image": url_of(png)}),
        (send_json, {"image_reference": {"image_url": url_of(png)}}),
        (send_json, {"extra_params": {"input_reference": url_of(png)}}),
    ):
        status, headers, body = send_it(app, {**GOOD, **fields})
        assert status == 200, body
        assert (headers["x-mode"], headers["x-frames-sha256"]) == ("image_to_video", expected), fields.keys()
        assert body[4:8] == b"ftyp"


def test_a_clip_is_continued(app: Any, mp4: bytes, reference: Reference) -> None:
    asked: dict[str, Any] = {**GOOD, "num_frames": 9, "condition_video_keep": "last"}
    request = GenerationRequest(**asked, mode="video_to_video", video=mp4, condition_frame_indexes_vision=(0,))
    expected = reference(request).frames_sha256
    for send_it, fields in (
        (send_form, {"video": mp4, "condition_frame_indexes_vision": "0"}),
        (send_form, {"input_reference": mp4, "condition_frame_indexes_vision": "[0]"}),
        (send_json, {"video_reference": [{"video_url": url_of(mp4)}], "condition_frame_indexes_vision": [0]}),
    ):
        status, headers, body = send_it(app, {**asked, **fields})
        assert status == 200, body
        assert (headers["x-mode"], headers["x-frames-sha256"]) == ("video_to_video", expected)


def test_sound_is_generated_on_request(app: Any, reference: Reference) -> None:
    for wanted in (False, True):
        result = reference(GenerationRequest(**GOOD, generate_sound=wanted))
        assert result.path is not None
        status, headers, body = send_form(app, {**GOOD, "generate_sound": str(wanted).lower()})
        assert (status, headers["x-mode"]) == (200, result.request.mode)
        assert body == result.path.read_bytes()
    status, headers, body = send_json(app, {**GOOD, "sound_gen": True, "output": "wav"})
    assert (status, headers["content-type"], body[:4]) == (200, "audio/wav", b"RIFF")


POLICY: dict[str, Any] = {
    "prompt": "pick it up",
    "mode": "policy",
    "domain_name": "bridge_orig_lerobot",
    "action_chunk_size": 4,
    "resolution_tier": 256,
    "num_inference_steps": 2,
}


@pytest.mark.parametrize("output", ["mp4", "actions"])
def test_generated_actions_are_json(output: str, app: Any, png: bytes, reference: Reference, tmp_path: Path) -> None:
    result = reference(GenerationRequest(**POLICY, output=output, image=png))
    assert result.actions is not None
    status, headers, body = send_form(app, {**POLICY, "output": output, "image": png})
    assert (status, headers["content-type"]) == (200, "application/json"), body
    assert (body["mode"], body["actions"]) == ("policy", result.actions.as_json())
    if result.path is None:
        assert body["video"] is None
    else:
        assert body["video"]["media_type"] == "video/mp4"
        assert base64.b64decode(body["video"]["b64_json"]) == result.path.read_bytes()
    saved = save_video(app.url, GenerationRequest(**POLICY, output=output, image=png), tmp_path / "a", timeout_s=100)
    assert saved.actions_path is not None
    assert json.loads(saved.actions_path.read_text()) == result.actions.as_json()
    assert (saved.path is None) == (result.path is None)


def test_given_actions_drive_the_clip(app: Any, png: bytes, reference: Reference) -> None:
    actions = np.linspace(-1, 1, 40).reshape(4, 10).round(3).tolist()
    asked = {**POLICY, "mode": "forward_dynamics"}
    expected = reference(GenerationRequest(**asked, actions=actions, image=png)).frames_sha256
    body = {**asked, "image": png, "action": json.dumps(actions)}
    body["action_mode"] = body.pop("mode")
    status, headers, answer = send_form(app, body)
    assert (status, headers["content-type"]) == (200, "video/mp4"), answer
    assert headers["x-frames-sha256"] == expected


def test_the_python_client_reads_local_files(app: Any, png: bytes, reference: Reference, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(png)
    asked = GenerationRequest(**GOOD, mode="image_to_video", image=path)
    expected = reference(GenerationRequest(**GOOD, mode="image_to_video", image=png)).frames_sha256
    assert app.client.generate(asked).info.frames_sha256 == expected
    with app.client.stream(asked) as events:
        path.unlink()
        assert [event.frames_sha256 for event in events if isinstance(event, Finished)] == [expected]
    for ask in (app.client.generate, app.client.stream):
        with pytest.raises(RequestError, match="image must be "):
            ask(asked)


def test_invalid_media_are_refused(app: Any, mp4: bytes, png: bytes) -> None:
    for send_it, fields, field, said in (
        (send_json, {"image": "http://127.0.0.1:9/a.png"}, "image", "URLs are not fetched"),
        (send_json, {"image_reference": {"file_id": "f"}}, "image_reference", "No files can be uploaded here"),
        (send_json, {"image": "/etc/passwd"}, "image", "a data URL"),
        (send_form, {"input_reference": b"hello"}, "input_reference", "a file of kind unknown"),
        (send_form, {"image": b"hello"}, "image", "PNG"),
        (send_form, {"image": mp4}, "image", "PNG"),
        (send_form, {"image": png[:60]}, "image", "damaged"),
        (send_form, {"image": png, "video": mp4}, "image, video", "one of the two"),
        (send_form, {"mode": "policy", "image": png}, "height", "resolution_tier decide"),
        (send_json, {"mode": "image_to_video"}, "image", "one image, which image_to_video needs"),
    ):
        status, _, answer = send_it(app, {**GOOD, **fields})
        assert status == 422, (fields.keys(), answer)
        assert answer["error"]["param"] == field
        assert said in answer["error"]["message"]


IMAGE: dict[str, Any] = {"prompt": "a cat", "size": "64x32", "num_inference_steps": 2, "seed": 5}
IMAGES = "/v1/images/generations"


def image_of(seed: int, **fields: Any) -> GenerationRequest:
    asked = {"prompt": "a cat", "width": 64, "height": 32, "num_inference_steps": 2, "num_frames": 1}
    return GenerationRequest(**{**asked, "mode": "text_to_image", "seed": seed, **fields})


def test_n_images_have_consecutive_seeds(app: Any, reference: Reference) -> None:
    expected = [reference(image_of(seed)) for seed in (5, 6)]
    status, _, body = send_json(app, {**IMAGE, "n": 2}, IMAGES)
    assert status == 200, body
    assert (body["output_format"], body["size"]) == ("png", "64x32")
    assert "denoise" in body["metrics"]["stage_durations"]
    for result, item in zip(expected, body["data"], strict=True):
        assert result.path is not None
        assert base64.b64decode(item["b64_json"]) == result.path.read_bytes()
        assert item["seed"] == result.request.seed
    assert expected[0].frames_sha256 != expected[1].frames_sha256
    status, headers, body = send_form(app, {**IMAGE, "n": 2, "response_format": "file"}, IMAGES)
    assert (status, headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(body)) as archive:
        assert [archive.read(name) for name in archive.namelist()] == [
            result.path.read_bytes() for result in expected if result.path
        ]


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_images_have_the_requested_format(kind: str, app: Any, reference: Reference) -> None:
    asked = {**IMAGE, "response_format": "file", "output_format": kind}
    status, headers, coarse = send_json(app, {**asked, "output_compression": 10}, IMAGES)
    assert (status, headers["content-type"]) == (200, f"image/{kind}"), coarse
    result = reference(image_of(5, output=kind, output_quality=10))
    assert result.path is not None
    assert coarse == result.path.read_bytes()
    with PIL.Image.open(io.BytesIO(coarse)) as image:
        assert image.size == (64, 32)
    fine = send_json(app, asked, IMAGES)[2]
    assert len(fine) > len(coarse)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"response_format": "url"}, "response_format"),
        ({"n": 11}, "n"),
        ({"size": "60x32"}, "size"),
        ({"prompt": ""}, "prompt"),
        ({"output_compression": 5}, "output_compression"),
    ],
)
def test_a_wrong_field_of_an_image_request_is_named(fields: dict[str, Any], field: str, app: Any) -> None:
    status, _, answer = send_json(app, {**IMAGE, **fields}, IMAGES)
    assert (status, answer["error"]["param"]) == (422, field)
