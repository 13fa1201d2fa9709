"""Which mode a request is, which fields it may bring, what the checkpoint can do: before anything is loaded or read."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.modes import MODES, ActionRole
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.request import FIELDS, GenerationRequest, ResolvedRequest
from cosmos3_core.resolve import find_offered_modes, resolve
from tests.mode_inputs import ACTIONS, CLIP, IMAGE, MINIMAL, moving_clip

SMALL = {"num_frames": 9, "height": 32, "width": 48}


@pytest.fixture(scope="module")
def nano(tiny_nano: Path) -> CheckpointLayout:
    return CheckpointLayout.open(tiny_nano)


@pytest.fixture(scope="module")
def edge(tiny_edge: Path) -> CheckpointLayout:
    return CheckpointLayout.open(tiny_edge)


def resolve_fields(layout: CheckpointLayout, **given: Any) -> ResolvedRequest:
    return resolve(GenerationRequest(**given), layout)


def refuse(layout: CheckpointLayout, kind: type[RequestError] = RequestError, **given: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        resolve(GenerationRequest(**given), layout)
    assert type(caught.value) is kind
    assert len(str(caught.value)) < 900
    return caught.value


# --- which mode ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, "text_to_video"),
        ({"num_frames": 1}, "text_to_image"),
        ({"num_frames": 2}, "text_to_video"),
        ({"image": IMAGE}, "image_to_video"),
        ({"video": CLIP}, "video_to_video"),
        ({"generate_sound": True}, "text_to_video_with_sound"),
        ({"image": IMAGE, "generate_sound": True}, "image_to_video_with_sound"),
        ({"video": CLIP, "generate_sound": True}, "video_to_video_with_sound"),
        ({"mode": "text_to_image"}, "text_to_image"),
        ({"mode": "text_to_video", "generate_sound": True}, "text_to_video_with_sound"),
        ({"mode": "text_to_video_with_sound"}, "text_to_video_with_sound"),
        ({"mode": "text_to_video_with_sound", "generate_sound": True}, "text_to_video_with_sound"),
        ({"mode": "image_to_video", "image": IMAGE}, "image_to_video"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value,
)
def test_the_fields_tell_the_mode(given: dict[str, Any], mode: str, nano: CheckpointLayout) -> None:
    assert resolve_fields(nano, prompt="a car", **given).mode == mode


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_can_be_named(mode: str, nano: CheckpointLayout) -> None:
    assert resolve_fields(nano, **{**MINIMAL[mode], "mode": mode}).mode == mode


@pytest.mark.parametrize("mode", ["t2v", "", "Policy", 5, ["policy"], True])
def test_an_unknown_mode_lists_the_known_ones(mode: Any, nano: CheckpointLayout) -> None:
    error = refuse(nano, prompt="a car", mode=mode)
    assert error.field == "mode"
    assert all(name in error.allowed for name in MODES)


def test_an_image_and_a_video_are_one_too_many(nano: CheckpointLayout) -> None:
    error = refuse(nano, prompt="a car", image=IMAGE, video=CLIP)
    assert (error.field, error.given) == ("image, video", "'both'")
    for mode in ("policy", "forward_dynamics"):
        error = refuse(nano, **{**MINIMAL[mode], "video": CLIP})
        assert (error.field, error.given) == ("image, video", "'both'")
    assert refuse(nano, prompt="a car", image=IMAGE, video=CLIP, mode="video_to_video").field == "image"


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.media])
def test_the_media_of_a_mode_is_needed(mode: str, nano: CheckpointLayout) -> None:
    given = {name: value for name, value in MINIMAL[mode].items() if name not in ("image", "video")}
    error = refuse(nano, **{**given, "mode": mode})
    assert error.field == MODES[mode].media[0]
    assert mode in error.allowed


@pytest.mark.parametrize(("mode", "num_frames"), [("text_to_image", 5), ("text_to_video", 1), ("image_to_video", 1)])
def test_one_frame_is_an_image_and_nothing_else(mode: str, num_frames: int, nano: CheckpointLayout) -> None:
    error = refuse(nano, **MINIMAL[mode] | {"mode": mode}, num_frames=num_frames)
    assert error.field == "num_frames"
    assert error.allowed == ("1 for an image" if mode == "text_to_image" else f"2 or more for {mode}")


@pytest.mark.parametrize("given", [{"num_frames": 1}, {"mode": "text_to_image"}, {"mode": "policy", "image": IMAGE}])
def test_sound_goes_with_clips_only(given: dict[str, Any], nano: CheckpointLayout) -> None:
    error = refuse(nano, prompt="a car", generate_sound=True, **given)
    assert error.field == "generate_sound"
    assert error.hint == "sound goes with text_to_video, image_to_video, video_to_video"


def test_generate_sound_is_a_flag(nano: CheckpointLayout) -> None:
    assert refuse(nano, prompt="a car", generate_sound="yes").field == "generate_sound"


@pytest.mark.parametrize("mode", MODES)
def test_only_dynamics_do_without_a_prompt(mode: str, nano: CheckpointLayout) -> None:
    given = {**MINIMAL[mode], "prompt": ""}
    if mode in ("forward_dynamics", "inverse_dynamics"):
        assert resolve_fields(nano, **given).prompt == ""
    else:
        assert refuse(nano, **given).field == "prompt"


# --- foreign fields --------------------------------------------------------------------------------------------------

FOREIGN: dict[str, tuple[Any, Callable[[str], bool]]] = {
    # field: a good value of it, whether a mode reads it
    "image": (IMAGE, lambda mode: "image" in MODES[mode].media),
    "video": (CLIP, lambda mode: "video" in MODES[mode].media),
    "actions": (ACTIONS, lambda mode: MODES[mode].actions is ActionRole.GIVEN),
    "action_chunk_size": (8, lambda mode: MODES[mode].has_actions),
    "domain_name": ("av", lambda mode: MODES[mode].has_actions),
    "domain_id": (1, lambda mode: MODES[mode].has_actions),
    "raw_action_dim": (9, lambda mode: MODES[mode].has_actions),
    "resolution_tier": (480, lambda mode: MODES[mode].has_actions),
    "view_point": ("wrist_view", lambda mode: MODES[mode].has_actions),
    "height": (32, lambda mode: not MODES[mode].has_actions),
    "width": (32, lambda mode: not MODES[mode].has_actions),
    "condition_frame_indexes_vision": ([0], lambda mode: mode.startswith("video_to_video")),
    "condition_video_keep": ("last", lambda mode: mode.startswith("video_to_video")),
}
FOR_ALL = {
    *("prompt", "mode", "negative_prompt", "num_frames", "fps", "num_inference_steps", "guidance_scale", "seed"),
    *("guidance_interval", "flow_shift", "schedule", "use_system_prompt", "append_metadata", "negative_metadata"),
    *("output", "output_quality", "crf", "lossless", "noise", "compat", "generate_sound"),
}


def test_every_field_is_for_all_modes_or_for_some() -> None:
    assert {field.name for field in fields(GenerationRequest)} == FOR_ALL | set(FOREIGN)


@pytest.mark.parametrize("field", FOREIGN)
@pytest.mark.parametrize("mode", MODES)
def test_a_field_that_a_mode_does_not_read_is_refused(mode: str, field: str, nano: CheckpointLayout) -> None:
    value, is_read = FOREIGN[field]
    given = {**MINIMAL[mode], "mode": mode}
    if field in MODES[mode].media:
        given = {name: other for name, other in given.items() if name not in ("image", "video")}
    given[field] = value
    if is_read(mode):
        if field in ("height", "width"):
            given |= {"height": 32, "width": 48}
        assert resolve_fields(nano, **given).mode == mode
        return
    error = refuse(nano, **given)
    assert error.field == field
    assert error.allowed == f"left out for {mode}"
    assert error.hint == FIELDS[field].otherwise or all(other in error.hint for other in FIELDS[field].modes)


# --- what the checkpoint can do --------------------------------------------------------------------------------------


def test_edge_makes_no_sound_and_continues_no_clip(edge: CheckpointLayout) -> None:
    can = "text_to_image, text_to_video, image_to_video, forward_dynamics, inverse_dynamics, policy"
    for given, field, why in [
        ({"generate_sound": True}, "generate_sound", "makes no sound"),
        ({"image": IMAGE, "generate_sound": True}, "generate_sound", "makes no sound"),
        ({"mode": "text_to_video_with_sound"}, "mode", "makes no sound"),
        ({"video": CLIP}, "mode", "was not trained for it"),
        ({"mode": "video_to_video", "video": CLIP}, "mode", "was not trained for it"),
    ]:
        error = refuse(edge, CapabilityError, prompt="a car", **given)
        assert error.field == field
        assert error.allowed.endswith(f"a mode that {edge.name} can do: {can}")
        assert why in error.hint


def test_a_checkpoint_without_the_heads_lists_what_is_left(nano: CheckpointLayout) -> None:
    without_action = replace(nano, transformer=replace(nano.transformer, action_gen=False))
    error = refuse(without_action, CapabilityError, **MINIMAL["policy"])
    assert (error.field, error.given) == ("mode", "'policy'")
    assert "no weights for actions" in error.hint
    assert error.allowed.endswith("text_to_video_with_sound, image_to_video_with_sound, video_to_video_with_sound")
    for silent in (replace(nano, audio=None), replace(nano, transformer=replace(nano.transformer, sound_gen=False))):
        if silent.audio is not None:
            silent = replace(silent, audio=None)  # as it is read: no heads, no tokenizer
        error = refuse(silent, CapabilityError, prompt="a car", generate_sound=True)
        assert "with_sound" not in error.allowed
        assert "no sound_tokenizer" in error.hint
        assert find_offered_modes(silent) == tuple(name for name in MODES if not name.endswith("_with_sound"))


def test_a_checkpoint_without_its_sound_tokenizer_is_silent(tiny_nano: Path, tmp_path: Path) -> None:
    root = tmp_path / "nano"
    shutil.copytree(tiny_nano, root, ignore=shutil.ignore_patterns("sound_tokenizer"))
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, "sound_tokenizer": [None, None]}))
    layout = CheckpointLayout.open(root)
    refuse(layout, CapabilityError, prompt="a car", generate_sound=True)
    assert resolve_fields(layout, prompt="a car").num_sound_latents == 0


def test_an_app_without_a_decoder_of_sound_offers_none(nano: CheckpointLayout) -> None:
    with pytest.raises(CapabilityError, match="configured without") as caught:
        resolve(GenerationRequest(prompt="a car", generate_sound=True), nano, is_sound_offered=False)
    assert "with_sound" not in caught.value.allowed


def test_like_diffusers_asks_for_the_weights_only(edge: CheckpointLayout) -> None:
    assert resolve_fields(edge, prompt="a car", video=CLIP, compat="diffusers").mode == "video_to_video"
    refuse(edge, CapabilityError, prompt="a car", generate_sound=True, compat="diffusers")


# --- frames that a clip gives ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("indexes", "clean", "num_encoded"),
    [
        (None, (0, 1), 5),
        (0, (0,), 1),
        (2, (2,), 9),
        ([1, 0], (0, 1), 5),
        ((2, 0, 2), (0, 2), 9),
        ([1, 1], (1,), 5),
    ],
    ids=str,
)
def test_chosen_frames_are_sorted_and_counted_once(
    indexes: Any, clean: tuple[int, ...], num_encoded: int, nano: CheckpointLayout
) -> None:
    picture = resolve_fields(nano, prompt="a car", video=CLIP, **SMALL, condition_frame_indexes_vision=indexes).picture
    assert picture is not None
    assert (picture.clean_frames, picture.num_frames) == (clean, num_encoded)


@pytest.mark.parametrize(
    "indexes", [-1, 3, [0, 3], [-1], [], (), "0", "0,1", b"0", ["0"], True, [True], 1.0, [0.0], [[0]], {0: 1}, [None]]
)
def test_frames_that_cannot_be_chosen_are_refused(indexes: Any, nano: CheckpointLayout) -> None:
    error = refuse(nano, prompt="a car", video=CLIP, **SMALL, condition_frame_indexes_vision=indexes)
    assert error.field == "condition_frame_indexes_vision"
    assert "latent frames from 0 to 2" in error.allowed


def test_keep_says_which_end(nano: CheckpointLayout) -> None:
    for keep, expected in ((None, "first"), ("first", "first"), ("last", "last")):
        picture = resolve_fields(nano, prompt="a car", video=CLIP, condition_video_keep=keep).picture
        assert picture is not None
        assert picture.keep == expected
    for keep in ("middle", "", 1):
        assert refuse(nano, prompt="a car", video=CLIP, condition_video_keep=keep).field == "condition_video_keep"


# --- actions ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "chunk_size", "num_frames", "note"),
    [
        ({}, 16, 17, ""),
        ({"action_chunk_size": 8}, 8, 9, ""),
        ({"num_frames": 9}, 8, 9, ""),
        ({"num_frames": 9, "action_chunk_size": 8}, 8, 9, ""),
        ({"action_chunk_size": 6}, 6, 5, "of the 7 frames of the chunk, 5 are part of it"),
        ({"action_chunk_size": 1}, 1, 1, "of the 2 frames of the chunk, 1 are part of it"),
    ],
    ids=str,
)
def test_a_chunk_has_one_action_between_two_frames(
    given: dict[str, Any], chunk_size: int, num_frames: int, note: str, nano: CheckpointLayout
) -> None:
    for mode in ("policy", "inverse_dynamics"):
        request = resolve_fields(nano, **MINIMAL[mode], **given)
        assert request.action is not None
        assert (request.action.chunk_size, request.num_frames) == (chunk_size, num_frames)
        assert [note in said for said in request.notes if "video" not in said] == [True] * bool(note)


@pytest.mark.parametrize(
    ("fields", "num_given", "note"),
    [
        ({"mode": "inverse_dynamics", "domain_name": "av"}, 9, "has 9 frames of the 17 that are used"),
        ({"mode": "inverse_dynamics", "domain_name": "av"}, 17, ""),
        ({"mode": "inverse_dynamics", "domain_name": "av"}, 20, "of the video's 20 frames the first 17"),
        ({"mode": "policy", "domain_name": "av", "prompt": "go"}, 20, ""),
        ({"prompt": "a car"}, 3, "has 3 frames of the 5 that are used"),
        ({"prompt": "a car"}, 20, ""),
    ],
)
def test_a_clip_of_another_length_than_is_used_is_noted(
    fields: dict[str, Any], num_given: int, note: str, nano: CheckpointLayout
) -> None:
    notes = resolve_fields(nano, **fields, video=moving_clip(num_given, 32, 48)).notes
    assert [note in said for said in notes] == [True] * bool(note)


def test_something_has_to_be_left_to_make(nano: CheckpointLayout) -> None:
    error = refuse(nano, **MINIMAL["video_to_video"], num_frames=5)
    assert (error.field, error.allowed) == ("num_frames", "at least 9")
    assert "[0, 1] are given" in error.hint
    one = resolve_fields(nano, **MINIMAL["video_to_video"], num_frames=5, condition_frame_indexes_vision=0)
    assert one.picture is not None
    assert one.picture.clean_frames == (0,)
    resolve_fields(nano, **MINIMAL["video_to_video"], num_frames=5, compat="diffusers")


def test_height_and_width_come_together(nano: CheckpointLayout) -> None:
    for given, missing in ({"height": 32}, "width"), ({"width": 32}, "height"):
        error = refuse(nano, prompt="a car", **given)
        assert error.field == missing
        assert "together" in error.allowed


def test_the_given_actions_are_the_chunk_unless_it_is_said(nano: CheckpointLayout) -> None:
    minimal = MINIMAL["forward_dynamics"]
    request = resolve_fields(nano, **{**minimal, "actions": ACTIONS[:12]})
    assert request.action is not None
    assert (request.action.chunk_size, request.num_frames, request.notes) == (12, 13, ())
    for chunk_size, note in ((8, "of 16 given actions the first 8 are used"), (20, "the last of 16 given actions")):
        request = resolve_fields(nano, **minimal, action_chunk_size=chunk_size)
        assert request.action is not None
        assert request.action.given is not None
        assert len(request.action.given) == chunk_size
        assert request.action.given[:8] == tuple(tuple(row) for row in np.float32(ACTIONS[:8]).tolist())
        assert any(note in said for said in request.notes)
        assert request.action.given[-1] == request.action.given[min(chunk_size, 16) - 1]


@pytest.mark.parametrize(
    ("mode", "given", "field"),
    [
        ("policy", {"num_frames": 9, "action_chunk_size": 16}, "num_frames"),
        ("policy", {"num_frames": 1}, "num_frames"),
        ("policy", {"num_frames": 1202}, "num_frames"),
        ("policy", {"num_frames": 9.0}, "num_frames"),
        ("policy", {"action_chunk_size": 0}, "action_chunk_size"),
        ("policy", {"action_chunk_size": 1201}, "action_chunk_size"),
        ("policy", {"action_chunk_size": True}, "action_chunk_size"),
        ("forward_dynamics", {"actions": None}, "actions"),
        ("forward_dynamics", {"actions": [[1.0] * 8]}, "actions"),
        ("forward_dynamics", {"raw_action_dim": 10}, "raw_action_dim"),
        ("forward_dynamics", {"raw_action_dim": "9"}, "raw_action_dim"),
        ("forward_dynamics", {"raw_action_dim": 0}, "raw_action_dim"),
        ("forward_dynamics", {"domain_name": "libero", "actions": [[1.0] * 65]}, "raw_action_dim"),
        ("policy", {"raw_action_dim": 65}, "raw_action_dim"),
        ("policy", {"raw_action_dim": True}, "raw_action_dim"),
        ("policy", {"domain_name": "libero"}, "raw_action_dim"),
        ("policy", {"domain_name": None, "domain_id": 10}, "raw_action_dim"),
        ("policy", {"domain_name": None}, "domain_name"),
        ("policy", {"domain_name": "r2d2"}, "domain_name"),
        ("policy", {"domain_id": 7}, "domain_id"),
        ("policy", {"domain_id": 32}, "domain_id"),
        ("policy", {"resolution_tier": 360}, "resolution_tier"),
        ("policy", {"resolution_tier": True}, "resolution_tier"),
        ("policy", {"resolution_tier": "480"}, "resolution_tier"),
        ("policy", {"resolution_tier": 480.0}, "resolution_tier"),
        ("policy", {"resolution_tier": [480]}, "resolution_tier"),
        ("policy", {"view_point": "bird_view"}, "view_point"),
        ("policy", {"view_point": ["ego_view"]}, "view_point"),
        ("policy", {"image": IMAGE[:15]}, "image"),
        ("inverse_dynamics", {"video": CLIP[:, :, :15]}, "video"),
        ("policy", {"actions": ACTIONS}, "actions"),
    ],
    ids=str,
)
def test_contradictions_about_actions_are_refused(
    mode: str, given: dict[str, Any], field: str, nano: CheckpointLayout
) -> None:
    assert refuse(nano, **{**MINIMAL[mode], **given}).field == field


def test_an_embodiment_of_many_widths_takes_the_one_that_is_said(nano: CheckpointLayout) -> None:
    libero = {"domain_name": "libero"}
    for given, width in [
        ({**MINIMAL["policy"], **libero, "raw_action_dim": 7}, 7),
        ({**MINIMAL["forward_dynamics"], **libero}, 9),
        ({**MINIMAL["forward_dynamics"], **libero, "raw_action_dim": 9}, 9),
        ({**MINIMAL["policy"], "domain_name": None, "domain_id": 30, "raw_action_dim": 64}, 64),
        ({**MINIMAL["policy"], "domain_id": 1}, 9),
    ]:
        action = resolve_fields(nano, **given).action
        assert action is not None
        assert action.width == width


@pytest.mark.parametrize(
    ("tier", "picture", "made", "canvas"),
    [
        (256, (540, 640), (256, 304), (256, 320)),
        (480, (540, 640), (528, 640), (544, 736)),
        (720, (540, 640), (528, 640), (832, 1104)),
        (480, (720, 1280), (464, 832), (480, 832)),
        (704, (100, 100), (96, 96), (960, 960)),
    ],
)
def test_a_tier_is_a_canvas_that_the_picture_is_fitted_into(
    tier: int, picture: tuple[int, int], made: tuple[int, int], canvas: tuple[int, int], nano: CheckpointLayout
) -> None:
    given = {**MINIMAL["policy"], "image": moving_clip(1, *picture)[0], "resolution_tier": tier}
    request = resolve_fields(nano, **given)
    described = request.prompt_format
    assert ((described.height, described.width), (request.height, request.width)) == (canvas, made)


# --- guidance, output, sound -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval", [(400, 1000), [0, 0], (0.5, 999.5), (1000, 1000)])
def test_a_guidance_interval_is_two_timesteps(interval: Any, nano: CheckpointLayout) -> None:
    found = resolve_fields(nano, prompt="a car", guidance_interval=interval).guidance_interval
    assert found == tuple(interval)
    assert found is not None
    assert [type(value) for value in found] == [float, float]


@pytest.mark.parametrize(
    "interval",
    [
        *((900, 400), (-1, 400), (0, 1001), (400,), (1, 2, 3), (), "ab", b"ab", 5, {1: 2, 3: 4}),
        *((float("nan"), 5), (0, float("inf")), (None, 5), ("0", "5"), (True, 5)),
    ],
    ids=str,
)
def test_other_intervals_are_refused(interval: Any, nano: CheckpointLayout) -> None:
    assert refuse(nano, prompt="a car", guidance_interval=interval).field == "guidance_interval"


OUTPUTS = {
    **dict.fromkeys(MODES, ("mp4",)),
    "text_to_image": ("png", "jpeg", "webp"),
    **{name: ("mp4", "wav") for name in MODES if name.endswith("_with_sound")},
    "policy": ("mp4", "actions"),
    "inverse_dynamics": ("actions", "mp4"),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_has_its_outputs(mode: str, nano: CheckpointLayout) -> None:
    default = resolve_fields(nano, **MINIMAL[mode]).file
    assert ("actions" if default is None else default.kind) == OUTPUTS[mode][0]
    for output in ("mp4", "wav", "png", "jpeg", "webp", "actions", "gif", "", 5):
        if output in OUTPUTS[mode]:
            request = resolve_fields(nano, **MINIMAL[mode], output=output)
            assert request.has_pictures == (output not in ("actions", "wav"))
            if output == "actions":
                assert request.file is None
            else:
                assert request.file is not None
                assert request.file.kind == output
                assert (request.file.sound is not None) == mode.endswith("_with_sound")
        else:
            error = refuse(nano, **MINIMAL[mode], output=output)
            assert error.field == "output"
            assert sorted(ast.literal_eval(error.allowed.removeprefix("one of "))) == sorted(OUTPUTS[mode])


def test_sound_is_no_longer_than_its_limit(nano: CheckpointLayout) -> None:
    with_sound = {"prompt": "a car", "generate_sound": True, "height": 32, "width": 32}
    error = refuse(nano, **with_sound, num_frames=1201, fps=20)
    assert error.field == "num_frames / fps"
    assert "at most 60 s" in error.allowed
    assert resolve_fields(nano, prompt="a car", num_frames=1201, fps=20, height=32, width=32).num_sound_latents == 0
    request = resolve_fields(nano, **with_sound, num_frames=1201, fps=24)
    assert request.file is not None
    sound = request.file.sound
    assert sound is not None
    assert (request.num_sound_latents, sound.num_samples) == (1252, 2_402_000)
    assert (sound.sampling_rate, sound.num_channels) == (48_000, 2)


def test_rounding_up_is_said(nano: CheckpointLayout) -> None:
    request = resolve_fields(nano, prompt="a car", video=CLIP, generate_sound=True, num_frames=6)
    assert request.num_frames == 9
    assert request.notes == ("num_frames=6 was rounded up to 9: clips have 1 + k * 4 frames",)
    assert request.num_sound_latents == 10, "of the rounded clip"


# --- media -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [name for name, mode in MODES.items() if mode.media])
def test_only_packed_reads_a_path(mode: str, nano: CheckpointLayout, tmp_path: Path) -> None:
    path = tmp_path / "secret"
    frames = [Image.fromarray(frame) for frame in CLIP]
    field = "image" if "image" in MINIMAL[mode] else "video"
    if field == "image":
        frames[0].save(path, "PNG")
    else:
        frames[0].save(path, "GIF", save_all=True, append_images=frames[1:])
    for source in (path, str(path), frames[0]):
        request = GenerationRequest(**{**MINIMAL[mode], "mode": mode, field: source})
        with pytest.raises(RequestError) as caught:
            resolve(request, nano)
        assert "packed()" in str(caught.value)
        assert "secret" not in str(caught.value)
        assert resolve(request.packed(), nano).mode == mode


@pytest.mark.parametrize("field", ["image", "video"])
@pytest.mark.parametrize(
    "content", [b"", b"what?", b"\x89PNG\r\n\x1a\n" + b"\0" * 50, b"\0\0\0\x18ftypmp42" + b"\0" * 50], ids=repr
)
def test_files_that_are_no_media_are_a_bad_field(
    field: str, content: bytes, nano: CheckpointLayout, tmp_path: Path
) -> None:
    path = tmp_path / "given"
    path.write_bytes(content)
    for source in (content, path, str(path)):
        with pytest.raises(RequestError) as caught:
            resolve(GenerationRequest(prompt="a car", **{field: source}).packed(), nano)
        assert caught.value.field == field


def test_packing_takes_what_travels_and_leaves_the_rest(tmp_path: Path) -> None:
    plain = GenerationRequest(prompt="a car")
    assert plain.packed() is plain
    (tmp_path / "file").write_bytes(b"bytes")
    packed = GenerationRequest(prompt="a car", image=tmp_path / "file", seed=3).packed()
    assert (packed.image, packed.seed) == (b"bytes", 3)
    with pytest.raises(RequestError, match="image must be .*missing"):
        GenerationRequest(prompt="a car", image=tmp_path / "missing").packed()
    with pytest.raises(RequestError, match="video must be .*int"):
        GenerationRequest(prompt="a car", video=5).packed()  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "is_noted"), [('{"a": 1}', False), ("{a}", True), (' {"a": 1', True), ("a {b}", False)]
)
@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_text_that_begins_like_json_and_is_none_is_noted(
    name: str, text: str, is_noted: bool, nano: CheckpointLayout
) -> None:
    notes = resolve_fields(nano, **{"prompt": "a", name: text}).notes
    assert notes == ((f"{name} begins like JSON and is none: it is read as a plain text",) if is_noted else ())
