"""The request set of vLLM-Omni's Cosmos3 recipes, as its users send it, against a running app: forms, aliases,
``extra_params``, polling. Of every mode the result is the core's own.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import pytest

from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from tests import mode_inputs
from tests.mode_inputs import ACTIONS

pytestmark = pytest.mark.timeout(600)

Reference = Callable[[GenerationRequest], GenerationResult]
DEADLINE_S = 300.0
FORM = {
    "prompt": "A red car.",
    "negative_prompt": "blurry",
    "size": "64x32",
    "num_frames": "9",
    "fps": "24",
    "num_inference_steps": "2",
    "guidance_scale": "6.0",
    "flow_shift": "10.0",
    "seed": "42",
    "max_sequence_length": "4096",
    "extra_params": json.dumps({"use_resolution_template": False, "use_duration_template": False}),
}
WITHOUT_EFFECT = ("max_sequence_length", "use_resolution_template", "use_duration_template")
MEANT: dict[str, Any] = {
    "prompt": "A red car.",
    "negative_prompt": "blurry",
    "width": 64,
    "height": 32,
    "num_frames": 9,
    "fps": 24.0,
    "num_inference_steps": 2,
    "guidance_scale": 6.0,
    "flow_shift": 10.0,
    "seed": 42,
}
ARM = {"domain_name": "bridge_orig_lerobot", "raw_action_dim": 10, "action_chunk_size": 4, "image_size": 256}
ARM_MEANT: dict[str, Any] = {
    "domain_name": "bridge_orig_lerobot",
    "raw_action_dim": 10,
    "action_chunk_size": 4,
    "resolution_tier": 256,
    "num_inference_steps": 2,
}


@pytest.fixture(scope="module")
def png() -> bytes:
    return mode_inputs.png()


@pytest.fixture(scope="module")
def mp4() -> bytes:
    return mode_inputs.mp4()


@pytest.fixture
def http(app: Any) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=app.url, timeout=DEADLINE_S) as client:
        yield client


def create_and_poll(http: httpx2.Client, form: dict[str, str], files: dict[str, Any] | None = None) -> dict[str, Any]:
    """Create and poll, as vLLM-Omni's recipes do."""
    # A part without a file name makes it a multipart form.
    answer = http.post("/v1/videos", data=form, files=files or {"user": (None, "me")})
    assert answer.status_code == 200, answer.text
    job: dict[str, Any] = answer.json()
    assert (job["object"], job["status"]) == ("video", "queued")
    deadline_s = time.monotonic() + DEADLINE_S
    while job["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
        job = http.get(f"/v1/videos/{job['id']}").json()
    assert job["status"] == "completed", job["error"]
    return job


def file_of(http: httpx2.Client, job: dict[str, Any]) -> bytes:
    answer = http.get(f"/v1/videos/{job['id']}/content")
    assert answer.status_code == 200
    return answer.content


@pytest.mark.parametrize("mode", ["t2v", "i2v", "v2v", "t2vs"])
def test_videos(mode: str, http: httpx2.Client, reference: Reference, png: bytes, mp4: bytes) -> None:
    form, files, meant = dict(FORM), None, dict(MEANT)
    if mode == "i2v":
        files = {"input_reference": ("a.png", png, "image/png")}
        meant["image"] = png
    if mode == "v2v":
        files = {"input_reference": ("a.mp4", mp4, "video/mp4")}
        form["extra_params"] = json.dumps({"condition_frame_indexes_vision": "0,1", "condition_video_keep": "first"})
        form |= {"num_frames": "13"}
        meant |= {"video": mp4, "num_frames": 13, "condition_frame_indexes_vision": (0, 1)}
    if mode == "t2vs":
        form |= {"generate_sound": "true", "sound_duration": "0.375"}
        meant["generate_sound"] = True
    job = create_and_poll(http, form, files)
    expected = reference(GenerationRequest(**meant))
    assert expected.path is not None
    assert job["frames_sha256"] == expected.frames_sha256
    assert file_of(http, job) == expected.path.read_bytes()
    warned = " ".join(job["warnings"])
    for name in WITHOUT_EFFECT if mode != "v2v" else WITHOUT_EFFECT[:1]:
        assert name in warned
    assert (job["size"], job["fps"], job["num_frames"]) == ("64x32", 24.0, meant["num_frames"])
    assert (job["media_type"], job["file_name"]) == ("video/mp4", f"{job['id']}.mp4")
    assert job["stage_durations"]["total"] == job["inference_time_s"] > 0


def test_sync_sends_the_headers_of_vllm_omni(http: httpx2.Client, reference: Reference) -> None:
    answer = http.post("/v1/videos/sync", data=FORM)
    assert answer.status_code == 200, answer.text
    expected = reference(GenerationRequest(**MEANT))
    assert expected.path is not None
    assert answer.content == expected.path.read_bytes()
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.headers["x-model"] == "nano"
    assert float(answer.headers["x-inference-time-s"]) > 0
    assert set(json.loads(answer.headers["x-stage-durations"])) >= {"denoise", "total"}


@pytest.mark.parametrize("mode", ["policy", "forward_dynamics", "inverse_dynamics"])
def test_actions(mode: str, http: httpx2.Client, reference: Reference, png: bytes, mp4: bytes) -> None:
    """The request has no num_frames, which fails in vLLM-Omni. The actions are at the top of the job's object."""
    extra: dict[str, Any] = {**ARM, "action_mode": mode}
    meant: dict[str, Any] = {**ARM_MEANT, "mode": mode, "prompt": "Pick up the cup."}
    given = [[*row, 0.5] for row in ACTIONS[:4]]
    if mode == "forward_dynamics":
        extra["action"] = given
        meant["actions"] = given
    if mode == "inverse_dynamics":
        files = {"input_reference": ("a.mp4", mp4, "video/mp4")}
        meant["video"] = mp4
    else:
        files = {"input_reference": ("a.png", png, "image/png")}
        meant["image"] = png
    form = {"prompt": "Pick up the cup.", "num_inference_steps": "2", "extra_params": json.dumps(extra)}
    job = create_and_poll(http, form, files)
    expected = reference(GenerationRequest(**meant))
    if mode == "forward_dynamics":
        assert job["action"] is None
    else:
        assert expected.actions is not None
        actions = expected.actions.as_json()
        assert {name: job["action"][name] for name in actions} == json.loads(json.dumps(actions))
        assert job["action"]["action_mode"] == mode
        assert job["action"]["shape"] == [4, 10]
        assert http.get(f"/v1/videos/{job['id']}/content?variant=action").json() == job["action"]
    if expected.path is not None:
        assert file_of(http, job) == expected.path.read_bytes()


def test_images(http: httpx2.Client, reference: Reference) -> None:
    body = {"prompt": "A red car.", "size": "64x32", "n": 1, "num_inference_steps": 2, "seed": 7, "layers": 4}
    answer = http.post("/v1/images/generations", json={**body, "extra_params": {"guidance_interval": [400, 1000]}})
    assert answer.status_code == 200, answer.text
    (image,) = answer.json()["data"]
    request = GenerationRequest(
        prompt="A red car.",
        mode="text_to_image",
        width=64,
        height=32,
        num_inference_steps=2,
        seed=7,
        guidance_interval=(400.0, 1000.0),
    )
    expected = reference(request)
    assert expected.path is not None
    assert base64.b64decode(image["b64_json"]) == expected.path.read_bytes()


def test_a_default_length_and_features_that_are_not_offered(http: httpx2.Client) -> None:
    """An omitted length is the documented one; features not offered are refused with a reason; no path is opened."""
    job = http.post("/v1/videos", json={"prompt": "a", "size": "64x32"}).json()
    try:
        assert (job["num_frames"], job["num_steps"], job["seconds"]) == (189, 35, "7.875")
    finally:
        assert http.delete(f"/v1/videos/{job['id']}").json()["deleted"] is True
    for transfer in ({"edge": True}, {"control_path": "/etc/passwd"}, {"lora": {"path": "/etc/passwd"}}):
        answer = http.post("/v1/videos", json={"prompt": "a", "extra_params": transfer})
        assert (answer.status_code, answer.json()["error"]["code"]) == (422, "not_offered")


def test_a_failed_job_is_answered_with_its_object(http: httpx2.Client) -> None:
    """vLLM-Omni answers with the failure's status."""
    job = http.post("/v1/videos", json={"prompt": "\U0001f600" * 20_000, "size": "64x32", "num_frames": 5}).json()
    deadline_s = time.monotonic() + DEADLINE_S
    while (answer := http.get(f"/v1/videos/{job['id']}")).json()["status"] in ("queued", "in_progress"):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert answer.status_code == 200
    assert answer.json()["status"] == "failed"
    assert answer.json()["error"]["code"] == "invalid_field"
    assert "at most 16384 tokens" in answer.json()["error"]["message"]
    assert http.get(f"/v1/videos/{job['id']}/content").status_code == 410


def test_files_come_in_ranges_and_by_etag(http: httpx2.Client) -> None:
    job = create_and_poll(http, FORM)
    whole = http.get(f"/v1/videos/{job['id']}/content")
    part = http.get(f"/v1/videos/{job['id']}/content", headers={"range": "bytes=10-19"})
    assert (part.status_code, part.content) == (206, whole.content[10:20])
    known = http.get(f"/v1/videos/{job['id']}/content", headers={"if-none-match": whole.headers["etag"]})
    assert known.status_code == 304
