"""Fields over HTTP: effective, ignored, not offered or unknown; and bodies as vLLM-Omni's users send them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import RayTaskError

from cosmos3_core.conditioning.modes import MODES
from cosmos3_core.errors import CapabilityError
from deployments import api
from deployments.api.bodies import NamedFields
from deployments.api.body_reader import MAX_FIELDS
from deployments.api.fields import BODIES, Endpoint
from deployments.api.fields_page import fields_page
from tests.api.fake_service import Api
from tests.mode_inputs import RED_PNG, data_url

PNG_URL = data_url(RED_PNG)
ACTION: dict[str, Any] = {"action_mode": "policy", "domain_name": "bridge_orig_lerobot"}


def test_the_fields_page_lists_every_field_once() -> None:
    _, *tables = fields_page().split("\n## ")
    names = ("Effective", "Without effect", "Not offered")
    for table, name in zip(tables, names, strict=True):
        assert table.startswith(name)
    for endpoint, model in BODIES.items():
        kinds = ({*model.model_fields, *model.aliases()}, model.no_effect, model.not_offered)
        for table, fields in zip(tables, kinds, strict=True):
            rows = [line.split("|")[1:-1] for line in table.splitlines() if line.startswith("| `")]
            column = list(Endpoint).index(endpoint) - len(Endpoint)
            here = [it.strip("` ") for row in rows if row[column] == " yes " for it in row[0].split(",")]
            assert sorted(here) == sorted(fields), (endpoint, table[:20])


VLLM_OMNIS = """
    prompt model input_reference input_references image_reference video_reference audio_reference control_reference
    control_type seconds size width height num_frames fps aspect_ratio short_edge num_inference_steps guidance_scale
    guidance_scale_2 true_cfg_scale flow_shift boundary_ratio seed negative_prompt user generate_sound sound_duration
    num_outputs_per_prompt quality lora extra_params return_stage_metrics enable_frame_interpolation
    frame_interpolation_exp source_video source_audio video_noise_mask max_sequence_length
    video_codec_options use_duration_template use_resolution_template negative_metadata_mode use_system_prompt
    condition_frame_indexes_vision condition_video_keep sound_gen audio_duration guidance_interval guardrails modalities
    edge blur depth seg wsm control_guidance control_guidance_interval num_video_frames_per_chunk num_conditional_frames
    num_first_chunk_conditional_frames max_frames share_vision_temporal_positions emphasize_control_in_prompt
    show_control_condition show_input resolution image_size domain_id domain_name raw_action_dim action action_mode
    action_chunk_size action_fps action_path view_point robot_obs observation
""".split()
VLLM_OMNIS_OF_IMAGES = """
    prompt model n size response_format negative_prompt system_prompt use_system_prompt num_inference_steps
    guidance_scale true_cfg_scale flow_shift seed generator_device lora extra_params vae_use_slicing vae_use_tiling
    output_format output_compression return_stage_metrics layers bot_task guidance_interval user
""".split()


def test_no_field_of_vllm_omnis_is_unknown() -> None:
    for endpoint in Endpoint:
        for name in VLLM_OMNIS_OF_IMAGES if endpoint is Endpoint.IMAGES else VLLM_OMNIS:
            NamedFields.of({name: None}, BODIES[endpoint])


@pytest.mark.parametrize("endpoint", Endpoint)
def test_a_field_that_is_not_offered_is_refused_with_a_reason(endpoint: Endpoint, shared_api: Api) -> None:
    refused = BODIES[endpoint].not_offered
    assert "lora" in refused
    for name, reason in refused.items():
        written = name.replace("*", "video")
        for body in ({written: "a"}, {"extra_params": {written: {"path": "/etc/passwd"}}}):
            error = shared_api.expect_refusal("POST", endpoint, 422, json={"prompt": "a", **body})
            assert (error["code"], error["param"]) == ("not_offered", written)
            assert f"Not offered: {reason}." in error["message"]


@pytest.mark.parametrize("endpoint", Endpoint)
def test_ignored_fields_are_named_in_warnings(endpoint: Endpoint, api: Api) -> None:
    ignored = [name.replace("*", "exp") for name in BODIES[endpoint].no_effect]
    assert {"user", "max_sequence_length", "true_cfg_scale"} <= set(ignored)
    values: list[Any] = [4, "a", 0.5, True, [1], {"b": [None]}]
    beside = {name: values[index % len(values)] for index, name in enumerate(ignored)}
    beside |= {"stream": True} if "stream" in ignored else {}
    beside |= {"previews": 3} if "previews" in ignored else {}
    answer = api.post(
        endpoint, json={"prompt": "a", **beside, "extra_params": {"max_sequence_length": 4096, "user": None}}
    )
    assert answer.status_code == 200, answer.text
    lines = answer.json()["warnings"] if endpoint is Endpoint.VIDEOS else json.loads(answer.headers["x-warnings"])
    assert [line.split()[0] for line in lines] == [*ignored, "extra_params.max_sequence_length"]
    assert [line for line in lines if not re.match(r"\S+ is without effect: .", line)] == []
    (request, asked), *_ = api.director.submitted
    assert asked.warnings == tuple(lines)
    assert (asked.previews, request.prompt) == (0, "a")


@pytest.mark.parametrize("value", ["x" * 50_001, [1] * 10_000, {str(i): "" for i in range(10_000)}, [["x" * 60_000]]])
def test_ignored_fields_are_bounded_in_size(value: Any, shared_api: Api) -> None:
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "user": value})
    assert error["param"] == "user"
    assert "at most 50000 characters" in error["message"]
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "stream": value})
    assert "at most 50000 characters" in error["message"]
    files = {"prompt": (None, "a"), "user": ("a", b"a")}
    assert shared_api.expect_refusal("POST", "/v1/videos", 422, files=files)["given"] == "'a file'"
    assert len(json.dumps(error)) < 1000


@pytest.mark.parametrize("value", ["0.5", True, {"a": 1}])
def test_an_unknown_field_names_the_nearest_one(value: Any, shared_api: Api) -> None:
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "guidance_scal": value})
    assert (error["code"], error["param"]) == ("invalid_field", "guidance_scal")
    assert "Did you mean guidance_scale?" in error["message"]


def test_quality_settings_are_read_and_bounded(api: Api) -> None:
    assert api.create({"prompt": "a", "quality": "lossless"})["quality"] == "lossless"
    assert api.create({"prompt": "a", "lossless": True})["quality"] == "lossless"
    assert api.create({"prompt": "a", "quality": "high"})["quality"] == "high"
    assert api.create({"prompt": "a"})["quality"] == "high"
    assert [request.lossless for request, _ in api.director.submitted] == [True, True, False, False]
    assert api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "quality": "best"})["param"] == "quality"
    error = api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "quality": "high", "lossless": True})
    assert "Give one of both." in error["message"]


def test_service_class_must_be_known(api: Api) -> None:
    assert api.create({"prompt": "a"})["service_class"] == "standard"
    assert api.create({"prompt": "a", "service_class": "batch"})["service_class"] == "batch"
    assert api.create({"prompt": "a", "extra_params": {"priority": "interactive"}})["service_class"] == "interactive"
    error = api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "priority": "urgent"})
    assert (error["param"], "standard" in error["allowed"]) == ("priority", True)


def test_previews_are_a_bounded_number(api: Api) -> None:
    api.create({"prompt": "a", "previews": 32})
    assert api.director.submitted[0][1].previews == 32
    for wrong in (33, -1, "some", True):
        assert (
            api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "previews": wrong})["param"]
            == "previews"
        )


@pytest.mark.parametrize("path", Endpoint)
def test_only_the_operator_can_disable_guardrails(path: str, make_api: Any) -> None:
    strict, lax = make_api(), make_api(may_disable_guardrails=True)
    for body in ({"guardrails": False}, {"extra_params": {"guardrails": False}}):
        error = strict.expect_refusal("POST", path, 422, json={"prompt": "a", **body})
        assert "does not let clients turn them off" in error["message"]
        assert lax.post(path, json={"prompt": "a", **body}).status_code == 200
    assert strict.post(path, json={"prompt": "a", "guardrails": True}).status_code == 200
    assert [asked.skip_guardrails for _, asked in strict.director.submitted] == [False]
    assert [asked.skip_guardrails for _, asked in lax.director.submitted] == [True, True]
    assert strict.expect_refusal("POST", path, 422, json={"prompt": "a", "guardrails": "no"})["param"] == "guardrails"
    without = make_api(has_guardrails=False, may_disable_guardrails=True)
    error = without.expect_refusal("POST", path, 422, json={"prompt": "a", "guardrails": True})
    assert "has not configured any" in error["message"], "who asks for them must not believe that there are some"
    assert without.post(path, json={"prompt": "a", "guardrails": False}).status_code == 200


# What vLLM-Omni 0.30 gets wrong, or its users send (the request set of its recipes)


def test_without_num_frames_a_clip_has_the_documented_length(api: Api) -> None:
    """One frame in vLLM-Omni."""
    for body in ({}, {"image": PNG_URL}):
        video = api.create({"prompt": "a", **body})
        assert (video["num_frames"], video["size"], video["fps"], video["num_steps"]) == (189, "1280x720", 24.0, 35)
        assert video["seconds"] == "7.875"


def test_without_a_length_actions_have_the_presets_length(api: Api) -> None:
    """An error in vLLM-Omni."""
    video = api.create({"prompt": "go", "extra_params": ACTION, "image_reference": {"image_url": PNG_URL}})
    assert (video["mode"], video["num_frames"], video["num_steps"], video["fps"]) == ("policy", 17, 30, 5.0)


@pytest.mark.parametrize(
    "extra",
    [
        {"edge": True},
        {"edge": {"preset_edge_threshold": "low"}},
        {"depth": {"control_path": "/data/depth.mp4"}},
        {"wsm": "/etc/passwd"},
        {"control_guidance": 1.5},
    ],
)
def test_transfer_is_not_offered(extra: dict[str, Any], shared_api: Api) -> None:
    """A 500 in vLLM-Omni, or a file of the server is opened."""
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "extra_params": extra})
    assert error["code"] == "not_offered"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"extra_params": {**ACTION, "domain_name": "unknown_robot"}, "image": PNG_URL}, "domain_name"),
        ({"extra_params": {"action_mode": "policy"}, "image": PNG_URL}, "domain_name"),
        ({"extra_params": {**ACTION, "resolution": 640}, "image": PNG_URL}, "resolution"),
        ({"image": PNG_URL, "mode": "text_to_video"}, "image"),
        ({"num_inference_steps": 5000}, "num_inference_steps"),
        ({"guidance_scale": 50}, "guidance_scale"),
        ({"size": "0x0"}, "size"),
        ({"size": "100x100"}, "size"),
        ({"width": 2**62, "height": 2**62}, "height"),
        ({"num_frames": 2**62}, "num_frames"),
        ({"generate_sound": True, "output": "png"}, "output"),
        ({"model": "sora-2"}, "model"),
    ],
    ids=str,
)
def test_a_wrong_value_is_a_422_that_names_the_field(body: dict[str, Any], param: str, shared_api: Api) -> None:
    """A 500 or exhausted memory in vLLM-Omni."""
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", **body})
    assert error["param"] == param


@pytest.mark.parametrize(
    ("body", "param", "given"),
    [
        ({"extra_params": {**ACTION, "resolution": 640}, "image": PNG_URL}, "resolution", "640"),
        ({"extra_params": {**ACTION, "image_size": 640, "resolution": 640}, "image": PNG_URL}, "resolution_tier", ""),
        ({"resolution_tier": 640, "resolution": 640, "image": PNG_URL, **ACTION}, "resolution_tier", "640"),
        ({"seconds": "4", "mode": "text_to_image"}, "seconds", "4"),
        ({"seconds": 4, "num_frames": 97, "mode": "text_to_image"}, "num_frames", "97"),
        ({"size": "100x100"}, "size", "'100x100'"),
        ({"size": "100x100", "height": 100, "width": 100}, "height", "100"),
        ({"input_reference": PNG_URL, "mode": "text_to_video"}, "input_reference", ""),
        ({"action_fps": 0}, "action_fps", "0"),
        ({"action_fps": 0, "seconds": 4}, "action_fps", "0"),
        ({"action_mode": "dance"}, "action_mode", "'dance'"),
        ({"quality": "lossless", "crf": 20}, "crf", "20"),
    ],
    ids=str,
)
@pytest.mark.parametrize("path", [Endpoint.VIDEOS, Endpoint.SYNC])
def test_an_error_names_the_field_as_the_client_spelled_it(
    path: str, body: dict[str, Any], param: str, given: str, shared_api: Api
) -> None:
    error = shared_api.expect_refusal("POST", path, 422, json={"prompt": "a", **body})
    assert error["param"] == param
    assert error["given"].startswith(given)
    assert error["message"].startswith(f"{param} must be {error['allowed']} (got {error['given']})")


def test_an_error_of_a_converted_value_says_what_it_became(shared_api: Api) -> None:
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "size": "100x100"})
    assert "what makes height a multiple of 16" in error["allowed"]
    assert "It makes height=100." in error["hint"]


def test_an_error_from_another_process_names_the_clients_field(api: Api) -> None:
    cause = CapabilityError("output_quality", 7, "nothing", "Not now.")
    api.director.error = RayTaskError("submit", "a traceback", cause).as_instanceof_cause()
    body = {"prompt": "a", "output_format": "jpeg", "output_compression": 7}
    error = api.expect_refusal("POST", Endpoint.IMAGES, 422, json=body)
    assert (error["code"], error["param"], error["hint"]) == ("not_offered", "output_compression", "Not now.")


REQUESTS: list[tuple[dict[str, Any], str, dict[str, Any]]] = [
    (
        {"prompt": "a", "size": "1280x720", "num_frames": "189", "fps": "24", "num_inference_steps": "35"},
        "text_to_video",
        {"num_frames": 189},
    ),
    (
        {"prompt": "a", "negative_prompt": "b", "guidance_scale": "6.0", "flow_shift": "10.0", "seed": "17"},
        "text_to_video",
        {"seed": 17},
    ),
    ({"prompt": "a", "seconds": "4", "size": "832x480"}, "text_to_video", {"num_frames": 97, "size": "832x480"}),
    ({"prompt": "a", "generate_sound": "true", "sound_duration": "7.875"}, "text_to_video_with_sound", {}),
    ({"prompt": "a", "input_reference": "PNG", "max_sequence_length": "4096"}, "image_to_video", {}),
    ({"prompt": "a", "image_reference": json.dumps({"image_url": PNG_URL})}, "image_to_video", {}),
    (
        {"prompt": "a", "input_reference": "PNG", "extra_params": json.dumps({"sound_gen": True})},
        "image_to_video_with_sound",
        {},
    ),
    (
        {
            "prompt": json.dumps({"subject": "a cat"}),
            "extra_params": json.dumps({"use_duration_template": True, "negative_metadata_mode": "inverse"}),
        },
        "text_to_video",
        {},
    ),
    (
        {
            "prompt": "",
            "input_reference": "PNG",
            "num_frames": "3",
            "extra_params": json.dumps(
                {"action_mode": "forward_dynamics", "domain_name": "av", "action": [[0.0] * 9] * 2, "action_fps": 10}
            ),
        },
        "forward_dynamics",
        {"fps": 10.0},
    ),
    (
        {
            "prompt": "go",
            "input_reference": "PNG",
            "extra_params": json.dumps({**ACTION, "raw_action_dim": 10, "image_size": 256, "action_chunk_size": 16}),
        },
        "policy",
        {"num_frames": 17},
    ),
    ({"prompt": "a", "aspect_ratio": "16:9", "lossless": "false", "return_stage_metrics": "true"}, "text_to_video", {}),
]


@pytest.mark.parametrize(("form", "mode", "expected"), REQUESTS, ids=lambda value: str(value)[:40])
def test_vllm_omni_forms_are_accepted(form: dict[str, Any], mode: str, expected: dict[str, Any], api: Api) -> None:
    files = {
        name: ("a.png", RED_PNG, "image/png") if value == "PNG" else (None, value.encode())
        for name, value in form.items()
    }
    answer = api.post("/v1/videos", files=files)
    assert answer.status_code == 200, answer.text
    video = answer.json()
    assert video["mode"] == mode
    assert {name: video[name] for name in expected} == expected


def test_bracketed_form_fields_of_openais_client_become_objects(api: Api) -> None:
    form = {
        "prompt": "a",
        "input_reference[image_url]": PNG_URL,
        "extra_params[num_frames]": "5",
        "extra_params[condition_video_keep]": "first",
        "extra_params[guidance_interval][]": ["400", "1000"],
    }
    answer = api.post("/v1/videos", files=[(name, (None, text)) for name, text in pairs(form)])
    assert answer.status_code == 422, "the clip's field is for clips"
    del form["extra_params[condition_video_keep]"]
    for asked in ({"files": [(name, (None, text)) for name, text in pairs(form)]}, {"data": form}):
        answer = api.post("/v1/videos", **asked)
        assert answer.status_code == 200, answer.text
        request, _ = api.director.submitted.pop()
        assert (request.num_frames, request.guidance_interval) == (5, [400.0, 1000.0])
        assert isinstance(request.image, bytes)
    for several in (["400", "1000"], ["400,1000"], "[400, 1000]"):
        api.post("/v1/videos", data={"prompt": "a", "guidance_interval": several})
        assert api.director.submitted.pop()[0].guidance_interval == [400.0, 1000.0]
    twice = [*pairs(form), ("extra_params[num_frames]", "5")]
    error = api.expect_refusal("POST", "/v1/videos", 400, files=[(name, (None, text)) for name, text in twice])
    assert error["code"] == "broken_form"
    mixed = [*pairs(form), ("input_reference", PNG_URL)]
    assert api.expect_refusal("POST", "/v1/videos", 400, files=[(name, (None, text)) for name, text in mixed])


def pairs(form: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, it) for name, value in form.items() for it in (value if isinstance(value, list) else [value])]


@pytest.mark.parametrize("name", ["input_references", "input_references[]"])
def test_only_one_input_reference_is_accepted(name: str, api: Api) -> None:
    file = (None, PNG_URL)
    answer = api.post("/v1/videos", files=[("prompt", (None, "a")), (name, file)])
    assert answer.json()["mode"] == "image_to_video"
    error = api.expect_refusal("POST", "/v1/videos", 422, files=[("prompt", (None, "a")), (name, file), (name, file)])
    assert (error["code"], error["param"]) == ("not_offered", "input_references")
    assert api.director.submitted.pop()[0].image == RED_PNG
    assert api.create({"prompt": "a", "input_references": [{"image_url": PNG_URL}]})["mode"] == "image_to_video"


@pytest.mark.parametrize("fetches", [False, True])
@pytest.mark.parametrize("name", ["input_references", "input_references[]", "image[]", "input_reference"])
def test_an_input_reference_may_be_a_file_part(name: str, fetches: bool, make_api: Any) -> None:
    api = make_api(fetch_file=Nothing().fetch if fetches else None)
    file = ("a.png", RED_PNG, "image/png")
    answer = api.post("/v1/videos", files=[("prompt", (None, "a")), (name, file)])
    assert answer.status_code == 200, answer.text
    assert api.director.submitted.pop()[0].image == RED_PNG
    if name.startswith("input_references"):
        error = api.expect_refusal(
            "POST", "/v1/videos", 422, files=[("prompt", (None, "a")), (name, file), (name, file)]
        )
        assert (error["code"], error["param"]) == ("not_offered", "input_references")


class Nothing:
    """Remote media without any file."""

    async def fetch(self, url: str, field: str) -> bytes:
        raise AssertionError(url)


@pytest.mark.parametrize("value", [480, "480"])
@pytest.mark.parametrize("name", ["resolution", "image_size", "resolution_tier"])
def test_resolution_tier_may_be_text(name: str, value: Any, api: Api) -> None:
    body = {"prompt": "go", "image": PNG_URL, "extra_params": {**ACTION, name: value}}
    assert api.create(body)["mode"] == "policy"
    assert api.director.submitted[0][0].resolution_tier == 480
    for wrong in ("640", "480p", ""):
        body["extra_params"][name] = wrong
        assert api.expect_refusal("POST", "/v1/videos", 422, json=body)["param"] == name


# Bounds


def test_names_of_ignored_fields_are_truncated(shared_api: Api) -> None:
    written = "frame_interpolation_" + "x" * 65
    error = shared_api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", written: 1})
    assert "left out: unknown field" in error["message"]
    NamedFields.of({written[:-1]: 1}, BODIES[Endpoint.VIDEOS])


def many_ignored(count: int) -> dict[str, int]:
    return {f"frame_interpolation_{index:064d}": 1 for index in range(count)}


def test_a_body_of_too_many_fields_is_refused(api: Api) -> None:
    model = BODIES[Endpoint.VIDEOS]
    names = (*model.model_fields, *model.aliases(), *model.no_effect, *model.not_offered)
    all_of_them = {name: None for name in names if "*" not in name}
    assert len(all_of_them) <= MAX_FIELDS, "whoever sends every field that there is may do so"
    api.create({**all_of_them, "prompt": "a"})
    for path in (*Endpoint, f"/v1/videos/{api.create()['id']}/remix"):
        error = api.expect_refusal("POST", path, 400, json={"prompt": "a", **many_ignored(MAX_FIELDS)})
        assert error["code"] == "broken_json"
        assert f"at most {MAX_FIELDS} fields (got {MAX_FIELDS + 1})" in error["message"]
    for extra in (many_ignored(MAX_FIELDS + 1), json.dumps(many_ignored(MAX_FIELDS + 1))):
        error = api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "extra_params": extra})
        assert (error["param"], f"at most {MAX_FIELDS} of them" in error["message"]) == ("extra_params", True)


def test_warnings_fit_into_a_header(api: Api) -> None:
    body = {"prompt": "a", **many_ignored(MAX_FIELDS - 2), "extra_params": many_ignored(MAX_FIELDS)}
    headers = {"idempotency-key": "once"}
    answer = api.post("/v1/videos/sync", json=body, headers=headers)
    assert answer.status_code == 200, answer.text
    assert len(answer.headers["x-warnings"]) < 7000
    lines = json.loads(answer.headers["x-warnings"])
    job = api.store.get(answer.headers["x-video-id"])
    assert job is not None
    assert len(job.warnings) == 2 * MAX_FIELDS - 1
    assert lines[:-1] == list(job.warnings[: len(lines) - 1])
    assert lines[-1] == f"and {len(job.warnings) - len(lines) + 1} more, which the job's warnings name"
    assert lines[0].startswith("Idempotency-Key ")


# Depth


def nest(depth: int, *, is_list: bool = True) -> str:
    return "[" * depth + "]" * depth if is_list else '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize("name", ["seed", "actions", "extra_params", "image", "user", "lora", "zzz", "prompt"])
@pytest.mark.parametrize("is_list", [False, True])
def test_json_nested_too_deeply_is_refused(name: str, is_list: bool, api: Api) -> None:
    """It is refused by the reader, before other code recurses over it."""
    headers = {"content-type": "application/json"}
    for depth in (50, 98, 101, *range(900, 1001, 10), 100_000):
        body = f'{{"prompt": "a", "{name}": {nest(depth, is_list=is_list)}}}'
        if name == "prompt":
            body = f'{{"prompt": {nest(depth, is_list=is_list)}}}'
        answer = api.post("/v1/videos", content=body.encode(), headers=headers)
        assert answer.status_code == (400 if depth > 98 else 200 if name == "user" else 422), (depth, answer.text)
        assert depth <= 98 or "the 100 levels that are allowed" in answer.text


@pytest.mark.parametrize(
    "name", ["seed", "actions", "extra_params", "image", "user", "lora", "zzz", "guidance_interval"]
)
def test_json_in_a_text_field_nested_too_deeply_is_refused(name: str, api: Api) -> None:
    for depth in (50, 101, 950, 960, 970, 980, 990, 20_000):
        for is_list in (False, True):
            answer = api.post("/v1/videos", data={"prompt": "a", name: nest(depth, is_list=is_list)})
            is_ignored = name == "user" and len(nest(depth, is_list=is_list)) < 50_000
            assert answer.status_code == (200 if is_ignored else 422), (depth, answer.text)
            if is_ignored:
                api.send("DELETE", f"/v1/videos/{answer.json()['id']}")


def test_every_mode_has_a_request_in_this_file() -> None:
    tested = {mode for _, mode, _ in REQUESTS}
    clips = {"video_to_video", "video_to_video_with_sound", "inverse_dynamics"}  # clips are probed in a child process
    assert tested | clips | {"text_to_image", "text_to_video"} == set(MODES)


def test_fields_md_is_up_to_date() -> None:
    """Update it: python -m deployments.api.fields_page > deployments/api/FIELDS.md."""
    assert (Path(api.__file__).parent / "FIELDS.md").read_text("utf-8") == fields_page()
