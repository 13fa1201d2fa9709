"""Fields of JSON and form bodies: the request they become, and what is refused."""

from __future__ import annotations

import base64
import json
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest

from cosmos3_core.actions import action_rows
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import GenerationRequest
from deployments.api.bodies import BodyRules, NamedFields, ParsedBody, parse_body
from deployments.api.body_reader import FormText
from deployments.api.fields import BODIES, ImageBody, SyncBody
from tests.mode_inputs import data_url

RULES = BodyRules(("nano", "nvidia/Cosmos3-Nano"), ("standard",))

PNG = b"\x89PNG\r\n\x1a\n" + bytes(range(64))
MP4 = b"\0\0\0\x18ftypisom" + bytes(64)
WAV = b"RIFF\0\0\0\0WAVE"


def text_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def video(body: dict[str, Any]) -> ParsedBody[SyncBody]:
    return parse_body(NamedFields.of(body, SyncBody), RULES)


def images(body: dict[str, Any]) -> ParsedBody[ImageBody]:
    return parse_body(NamedFields.of(body, ImageBody), RULES)


def parse(body: dict[str, Any], *, as_form: bool = False) -> GenerationRequest:
    given = {name: FormText(value) for name, value in body.items()} if as_form else body
    (request,) = video(given).requests
    return request


def parse_error(body: dict[str, Any]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parse(body)
    assert len(str(caught.value)) < 3000, "what was given is shown shortened"
    return caught.value


def test_every_library_field_has_the_same_name_over_http() -> None:
    ours = {field.name for field in fields(GenerationRequest)}
    assert ours - set(SyncBody.model_fields) == {"noise", "append_metadata"}
    for model in BODIES.values():
        assert not set(model.aliases()) & {*model.model_fields, *model.no_effect, *model.not_offered}
        assert not set(model.no_effect) & {*model.model_fields, *model.not_offered}
        assert not set(model.not_offered) & set(model.model_fields)


FORM = {
    "prompt": "5",
    "mode": "video_to_video",
    "generate_sound": "true",
    "num_frames": "9",
    "width": "32",
    "height": "64",
    "fps": "12.5",
    "seed": "7",
    "guidance_scale": "1",
    "guidance_interval": "400,1000",
    "condition_frame_indexes_vision": "0,1",
    "condition_video_keep": "last",
    "use_system_prompt": "0",
    "actions": "[[1, 2], [3, 4.5]]",
    "domain_name": "av",
    "domain_id": "1",
    "action_chunk_size": "2",
    "raw_action_dim": "2",
    "resolution_tier": "256",
    "view_point": "ego_view",
    "output": "mp4",
    "output_quality": "50",
    "crf": "20.5",
    "lossless": "true",
    "negative_prompt": "",
    "model": "nano",
    "user": "me",
}
JSON = {
    **FORM,
    "generate_sound": True,
    "num_frames": 9,
    "width": 32,
    "height": 64,
    "fps": 12.5,
    "seed": 7,
    "guidance_scale": 1.0,
    "guidance_interval": [400.0, 1000.0],
    "condition_frame_indexes_vision": [0, 1],
    "use_system_prompt": False,
    "actions": [[1, 2], [3, 4.5]],
    "domain_id": 1,
    "action_chunk_size": 2,
    "raw_action_dim": 2,
    "resolution_tier": 256,
    "output_quality": 50,
    "crf": 20.5,
    "lossless": True,
}


def test_a_form_means_what_json_means() -> None:
    request = parse(JSON)
    assert parse(FORM, as_form=True) == request
    assert parse(FORM, as_form=True).actions == request.actions == [[1, 2], [3, 4.5]]
    expected = {name: value for name, value in JSON.items() if name not in ("model", "user")}
    assert request == GenerationRequest(**expected)
    assert type(parse(FORM, as_form=True).prompt) is str


@pytest.mark.parametrize("value", [[0], 0, "0", "[0]", FormText("0"), FormText(" [0] ")])
def test_latent_frames_are_read_in_every_notation(value: Any) -> None:
    given = parse({"condition_frame_indexes_vision": value}).condition_frame_indexes_vision
    assert given in ([0], 0)


def test_an_interval_as_text_is_read_in_json_too() -> None:
    assert parse({"guidance_interval": "400,1000"}).guidance_interval == [400.0, 1000.0]
    assert parse_error({"guidance_interval": "high"}).field == "guidance_interval"


def test_json_numbers_are_not_read_from_text() -> None:
    for body in ({"num_frames": "5"}, {"num_frames": FormText("many")}, {"use_system_prompt": FormText("perhaps")}):
        (name,) = body
        error = parse_error(body)
        assert (error.field, error.given) == (name, repr(str(body[name])))


def test_actions_of_an_answer_can_be_sent_again() -> None:
    answer = {"data": [[1.0, 2.0]], "shape": [1, 2], "dtype": "float32"}
    assert parse({"actions": answer}).actions == [[1.0, 2.0]]
    assert parse({"action": json.dumps(answer)}, as_form=True).actions == [[1.0, 2.0]]


def test_aliases_of_other_clients_are_read() -> None:
    body = {"action_mode": "policy", "action": [[1]], "action_fps": 5, "resolution": 480, "sound_gen": True}
    expected = GenerationRequest(mode="policy", fps=5, resolution_tier=480, generate_sound=True)
    assert parse(body) == expected
    assert parse({"image_size": 480}) == GenerationRequest(resolution_tier=480)
    assert parse({"resolution": 480, "image_size": 480, "resolution_tier": 480}).resolution_tier == 480
    assert parse_error({"resolution": 480, "image_size": 720}).field == "image_size"


@pytest.mark.parametrize("as_text", [False, True])
def test_extra_params_are_read_like_top_level_fields(as_text: bool) -> None:
    extra = {"action_mode": "policy", "domain_name": "av", "guidance_interval": "1,2", "seed": 3, "fps": None}
    body = {"prompt": "a", "seed": 3, "extra_params": json.dumps(extra) if as_text else extra}
    expected = GenerationRequest(prompt="a", mode="policy", domain_name="av", guidance_interval=[1.0, 2.0], seed=3)
    assert parse(body) == expected
    assert parse({**body, "image": data_url(PNG)}).image == PNG
    assert parse({"prompt": "a", "extra_params": {"image": data_url(PNG)}}).image == PNG


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"promt": "a"}, "promt", "Did you mean prompt?"),
        ({"actoin": [[1]]}, "actoin", "Did you mean action?"),
        ({"zzz": "x" * 10_000_000}, "zzz", "Fields are prompt"),
        ({"seed": 1, "extra_params": {"seed": 2}}, "seed", "equal to seed, which is given as well"),
        ({"extra_params": {"sed": 2}}, "sed", "Did you mean seed?"),
        ({"extra_params": "[1]"}, "extra_params", "a JSON object"),
        ({"extra_params": '{"seed": 1'}, "extra_params", "a JSON object"),
        ({"extra_params": '{"seed": 1, "seed": 1}'}, "extra_params", "a JSON object"),
        ({"extra_params": {"extra_params": {}}}, "extra_params", "without extra_params in it"),
        ({"generate_sound": True, "sound_gen": False}, "sound_gen", "equal to generate_sound"),
        ({"model": "other"}, "model", "nvidia/Cosmos3-Nano"),
        ({"size": "32"}, "size", "WIDTHxHEIGHT"),
        ({"size": "64x32", "width": 32, "height": 32}, "size", "the same as width=32"),
        ({"seconds": -1}, "seconds", "a number from"),
        ({"mode": "policy", "seconds": 2}, "seconds", "action_chunk_size decides"),
        ({"seed": b"a file"}, "seed", "a text"),
        ({"prompt": "x" * 90_000_000}, "prompt", "at most 50000 characters"),
        ({"actions": "x" * 60_000}, "actions", "at most 50000 characters"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_wrong_field_is_named(body: dict[str, Any], field: str, said: str) -> None:
    error = parse_error(body)
    assert error.field == field
    assert said in str(error)


def test_whole_numbers_of_json_may_have_a_point() -> None:
    given = parse(json.loads('{"num_frames": 13.0, "seed": 7.0, "resolution_tier": 480.0}'))
    assert given == GenerationRequest(num_frames=13, seed=7, resolution_tier=480)
    assert type(given.num_frames) is int
    assert "a whole number from" in str(parse_error({"num_frames": 13.5}))


def test_size_and_seconds_are_converted() -> None:
    assert parse({"size": "64x32"}) == GenerationRequest(width=64, height=32)
    assert parse({"seconds": 1.5, "fps": 8}) == GenerationRequest(num_frames=12, fps=8)
    assert parse({"seconds": 2}) == GenerationRequest(num_frames=48)
    assert parse({"seconds": 2, "num_frames": 5}) == GenerationRequest(num_frames=5)


@pytest.mark.parametrize("as_form", [False, True])
@pytest.mark.parametrize("more", [{}, {"output": "mp4"}, {"mode": "image_to_video"}, {"mode": "forward_dynamics"}])
def test_stream_is_accepted_for_growing_formats(as_form: bool, more: dict[str, Any]) -> None:
    for text, is_live in (("true", True), ("false", False)):
        body: dict[str, Any] = {"prompt": "a", "stream": FormText(text) if as_form else is_live, **more}
        job = video(body)
        assert job.fields.stream is is_live
        assert job.requests == (GenerationRequest(prompt="a", **more),), "the Director makes the same of it"
    assert not video({"prompt": "a", **more}).fields.stream


@pytest.mark.parametrize(
    "more",
    [
        {"output": "wav", "generate_sound": True},
        {"output": "png"},
        {"output": "actions"},
        {"num_frames": 1},
        {"mode": "text_to_image"},
        {"mode": "policy"},
        {"mode": "inverse_dynamics", "output": "mp4"},
    ],
    ids=str,
)
def test_stream_is_refused_for_formats_that_do_not_grow(more: dict[str, Any]) -> None:
    error = parse_error({"prompt": "a", "stream": True, **more})
    assert error.field == "stream"
    assert "an mp4 without generated actions" in str(error)
    parse({"prompt": "a", "stream": False, **more})


def test_stream_is_a_boolean() -> None:
    assert parse_error({"stream": "yes"}).field == "stream"
    assert parse_error({"stream": 1}).field == "stream"


def test_an_error_escapes_unprintable_text() -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    assert str(RequestError("seed", deep, "a number")) == "seed must be a number (got a list nested too deep to print)"


# Media


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image", PNG),
        ("image", data_url(PNG)),
        ("image", data_url(PNG, "application/octet-stream")),
        ("image", data_url(PNG).replace("data", "DATA").replace("base64", "BASE64")),
        ("image", text_of(PNG)),
        ("image", FormText(text_of(PNG)[:40] + "\r\n" + text_of(PNG)[40:])),
        ("input_reference", PNG),
        ("input_reference", text_of(PNG)),
        ("input_reference", {"image_url": data_url(PNG)}),
        ("image_reference", {"image_url": data_url(PNG)}),
        ("image_reference", {"image_url": {"url": data_url(PNG)}}),
        ("image_reference", [{"image_url": data_url(PNG)}]),
        ("image_reference", [data_url(PNG)]),
        ("image_reference", data_url(PNG)),
        ("image_reference", FormText(json.dumps({"image_url": data_url(PNG)}))),
        ("image_reference", json.dumps([{"image_url": data_url(PNG)}])),
        ("image_reference", text_of(PNG)),
        ("video", MP4),
        ("video", data_url(MP4, "video/mp4")),
        ("input_reference", data_url(MP4, "image/png")),  # the content decides
        ("video_reference", {"video_url": data_url(MP4)}),
    ],
    ids=lambda value: str(value)[:40],
)
def test_media_are_read_from_every_encoding(name: str, value: Any) -> None:
    request = parse({name: value})
    is_video = value == MP4 or text_of(MP4) in str(value)
    assert (request.image, request.video) == ((None, MP4) if is_video else (PNG, None))
    assert request == GenerationRequest()


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"image": "https://example.com/a.png"}, "image", "URLs are not fetched: send the file itself."),
        ({"image": "HTTP://169.254.169.254/latest"}, "image", "URLs are not fetched"),
        ({"image": "file:///etc/passwd"}, "image", "URLs are not fetched"),
        ({"image": "/etc/passwd"}, "image", "a data URL"),
        ({"image_reference": {"image_url": "http://localhost:1/a"}}, "image_reference", "URLs are not fetched"),
        ({"image_reference": {"file_id": "f-1"}}, "image_reference", "No files can be uploaded here"),
        (
            {"image_reference": {"video_url": data_url(MP4)}},
            "image_reference",
            "an object of image_url and nothing else",
        ),
        ({"image": {"video_url": data_url(MP4)}}, "image", "an object of image_url"),
        ({"image_reference": {}}, "image_reference", "an object of image_url"),
        ({"image_reference": {"image_url": data_url(PNG), "detail": "low"}}, "image_reference", "nothing else"),
        ({"image_reference": [data_url(PNG)] * 2}, "image_reference", "a list of one"),
        ({"image_reference": []}, "image_reference", "a list of one"),
        ({"image_reference": {"image_url": 5}}, "image_reference", "a data URL"),
        ({"image_reference": '{"image_url": '}, "image_reference", "a data URL"),
        ({"image": 5}, "image", "a data URL"),
        ({"image": ""}, "image", "empty"),
        ({"image": b""}, "image", "empty"),
        ({"image": "data:image/png;base64,"}, "image", "empty"),
        ({"image": "data:image/png,abcd"}, "image", "a data URL with base64"),
        ({"image": "data:image/png;base64"}, "image", "a data URL with base64"),
        ({"image": text_of(PNG)[:-3]}, "image", "is it cut off?"),
        ({"image": "äöü" * 30}, "image", "is it cut off?"),
        ({"image": "data:image/png;base64," + "!" * 1_000_000}, "image", "is it cut off?"),
        ({"image": bytes(LIMITS.max_media_bytes + 1)}, "image", f"at most {LIMITS.max_media_bytes} bytes"),
        ({"image": "A" * (LIMITS.max_media_bytes * 4 // 3 + 8)}, "image", "Send a smaller file"),
        ({"input_reference": WAV}, "input_reference", "a file of kind WAV"),
        ({"input_reference": b"hello"}, "input_reference", "PNG, JPEG"),
        ({"image": PNG, "image_reference": data_url(PNG)}, "image_reference", "nothing beside image"),
        ({"image": PNG, "input_reference": PNG}, "input_reference", "nothing beside image"),
        ({"video": MP4, "input_reference": MP4}, "input_reference", "nothing beside video"),
        ({"image": PNG, "extra_params": {"image": data_url(PNG)}}, "image", "equal to image"),
        ({"input_references": [data_url(PNG)] * 2}, "input_references", "Not offered: several references."),
        ({"input_referenc": data_url(PNG)}, "input_referenc", "Did you mean input_reference?"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_invalid_media_are_refused(body: dict[str, Any], field: str, said: str) -> None:
    error = parse_error(body)
    assert error.field == field
    assert said in str(error)


def test_an_image_beside_a_clip_is_left_to_the_library() -> None:
    request = parse({"input_reference": MP4, "image": PNG})
    assert (request.image, request.video) == (PNG, MP4)


# Images


def test_n_images_have_consecutive_seeds() -> None:
    job = images({"prompt": "a cat"})
    first = GenerationRequest(prompt="a cat", mode="text_to_image", output="png")
    assert (job.requests, job.fields.response_format) == ((first,), "b64_json")
    body = {
        "prompt": "a cat",
        "n": "3",
        "size": "64x32",
        "seed": "5",
        "response_format": "file",
        "output_format": "webp",
        "output_compression": "80",
        "num_inference_steps": "2",
        "guidance_scale": "3",
        "extra_params": '{"guidance_interval": [400, 1000], "use_system_prompt": true}',
    }
    job = images({name: FormText(value) for name, value in body.items()})
    first = replace(
        first,
        width=64,
        height=32,
        seed=5,
        output="webp",
        output_quality=80,
        num_inference_steps=2,
        guidance_scale=3.0,
        guidance_interval=[400, 1000],
        use_system_prompt=True,
    )
    assert job.requests == (first, replace(first, seed=6), replace(first, seed=7))
    assert job.fields.response_format == "file"
    assert images({"prompt": "a", "size": "auto"}).requests[0].width is None


@pytest.mark.parametrize(
    ("body", "field", "said"),
    [
        ({"n": 0}, "n", "1 to 10"),
        ({"n": 11}, "n", "1 to 10"),
        ({"n": True}, "n", "1 to 10"),
        ({"n": "two"}, "n", "1 to 10"),
        ({"response_format": "url"}, "response_format", "Images are in the answer itself"),
        ({"response_format": "png"}, "response_format", "one of"),
        ({"output_format": "mp4"}, "output_format", "png"),
        ({"output_compression": 80}, "output_compression", "left out for png"),
        ({"output_format": "jpeg", "output_compression": 101}, "output_compression", "0 to 100"),
        ({"seed": 2**63 - 1, "n": 2}, "seed", "a whole number from 0"),
        ({"size": "big"}, "size", "WIDTHxHEIGHT"),
        ({"image": data_url(PNG)}, "image", "left out: unknown field"),
        ({"quality": "high"}, "quality", "left out: unknown field"),
        ({"width": 64}, "width", "Give size, WIDTHxHEIGHT"),
        ({"model": "dall-e-3"}, "model", "'nano'"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_wrong_field_of_an_image_request_is_named(body: dict[str, Any], field: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        images({"prompt": "a", **body})
    assert caught.value.field == field
    assert said in str(caught.value)


def test_actions_of_a_form_are_accepted_by_the_library() -> None:
    """Rows have the library's shape in every encoding."""
    assert np.array(parse({"actions": "[[1, 2]]"}, as_form=True).actions).shape == (1, 2)


def test_actions_are_read_from_a_file_part() -> None:
    request = parse({"actions": json.dumps({"data": [[1.0, 2.0]]}).encode()})
    assert request.actions == [[1.0, 2.0]]
    with pytest.raises(RequestError, match="actions"):
        action_rows("actions", parse({"actions": b"\x00\xff"}).actions, None)
