"""The table of defaults, frozen; what a request leaves out comes from it, and every mode runs with nothing said."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.modes import MODES
from cosmos3_core.engine import Engine
from cosmos3_core.generate import generate
from cosmos3_core.media.probe import probe_video
from cosmos3_core.presets import PRESETS, ActionPreset
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import find_offered_modes, resolve
from tests.mode_inputs import CLIP, MINIMAL, moving_clip

# num_frames, height, width, fps, num_inference_steps, guidance_scale, flow_shift, who says so, and the actions':
# chunk_size, resolution_tier, domain_name, raw_action_dim
VIDEO = (189, 720, 1280, 24.0, 35, 6.0, 10.0, "cosmos-framework", None)
STILL = (1, 960, 960, 24.0, 50, 4.0, 3.0, "cosmos-framework", None)
ACTING = (17, 256, 256, 5.0, 30, 1.0, 10.0, "cosmos-framework", (16, 256, None, None))
DROID = (33, 540, 640, 15.0, 4, 3.0, 5.0, "vLLM-Omni", (32, 480, "droid_lerobot", 8))
EDGE_VIDEO = (189, 480, 832, 24.0, 35, 5.0, 3.0, "SGLang", None)
EDGE_STILL = (1, 640, 640, 24.0, 35, 7.0, 3.0, "SGLang", None)

NANO = {
    "text_to_image": STILL,
    "text_to_video": VIDEO,
    "image_to_video": VIDEO,
    "video_to_video": VIDEO,
    "text_to_video_with_sound": VIDEO,
    "image_to_video_with_sound": VIDEO,
    "video_to_video_with_sound": VIDEO,
    "forward_dynamics": ACTING,
    "inverse_dynamics": ACTING,
    "policy": ACTING,
}
TABLE = {
    "nano": NANO,
    "super": NANO,
    "nano-policy-droid": {**NANO, "policy": DROID},
    "edge": {
        "text_to_image": EDGE_STILL,
        "text_to_video": EDGE_VIDEO,
        "image_to_video": EDGE_VIDEO,
        "forward_dynamics": ACTING,
        "inverse_dynamics": ACTING,
        "policy": ACTING,
    },
}
ROWS = [(kind, mode) for kind, rows in TABLE.items() for mode in rows]
# The picture that a robot of the published policy sees, so that tier and canvas count.
DROID_POLICY = {"prompt": "go on", "mode": "policy", "image": moving_clip(1, 540, 640)[0]}


def minimal(kind: str, mode: str) -> dict[str, Any]:
    return DROID_POLICY if (kind, mode) == ("nano-policy-droid", "policy") else MINIMAL[mode]


@pytest.fixture(scope="module")
def checkpoints(
    tiny_nano: Path, tiny_super: Path, tiny_edge: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Kind -> its checkpoint; the policy's files are those of Nano, but for the name."""
    policy = tmp_path_factory.mktemp("policy") / "Cosmos3-Nano-Policy-DROID"
    shutil.copytree(tiny_nano, policy)
    return {"nano": tiny_nano, "super": tiny_super, "edge": tiny_edge, "nano-policy-droid": policy}


def test_the_table_is_the_published_one() -> None:
    assert set(PRESETS) == set(ROWS)
    assert set(NANO) == set(MODES)
    for (kind, mode), preset in PRESETS.items():
        *numbers, source, action = TABLE[kind][mode]
        values = [preset.num_frames, preset.height, preset.width, preset.fps]
        values += [preset.num_inference_steps, preset.guidance_scale, preset.flow_shift]
        assert values == numbers, (kind, mode)
        assert [type(value) for value in values] == [type(number) for number in numbers]
        assert source in preset.source, (kind, mode)
        assert preset.guidance_interval is None
        assert preset.action == (None if action is None else ActionPreset(*action))


def test_every_kind_of_checkpoint_offers_its_rows(checkpoints: dict[str, Path]) -> None:
    for kind, checkpoint in checkpoints.items():
        layout = CheckpointLayout.open(checkpoint)
        assert layout.preset_kind == kind
        assert list(find_offered_modes(layout)) == [mode for mode in MODES if mode in TABLE[kind]]


@pytest.mark.parametrize(("kind", "mode"), ROWS)
def test_a_request_that_leaves_out_everything_gets_the_row(kind: str, mode: str, checkpoints: dict[str, Path]) -> None:
    num_frames, height, width, fps, steps, scale, shift, _, action = TABLE[kind][mode]
    fields = minimal(kind, mode)
    resolved = resolve(GenerationRequest(**fields), CheckpointLayout.open(checkpoints[kind]))
    assert (resolved.mode, resolved.num_frames, resolved.fps) == (mode, num_frames, fps)
    assert (resolved.num_inference_steps, resolved.guidance_scale, resolved.flow_shift) == (steps, scale, shift)
    assert (resolved.schedule, resolved.guidance_interval, resolved.seed) == ("native", None, 42)
    wording = resolved.prompt_format
    assert (wording.use_system_prompt, wording.append_metadata, wording.negative_metadata) == (False, True, "same")
    is_padded = mode == "inverse_dynamics"  # the clip has 9 frames
    assert [note for note in resolved.notes if "its last is repeated" not in note] == []
    assert len(resolved.notes) == is_padded
    if action is None:
        assert (resolved.height, resolved.width, (wording.height, wording.width)) == (height, width, (height, width))
        assert resolved.action is None
        assert resolved.negative_prompt is None
    else:
        chunk_size, tier, domain_name, width_of_action = action
        assert resolved.action is not None
        assert resolved.picture is not None
        assert resolved.picture.resolution_tier == tier
        assert (resolved.action.chunk_size, resolved.action.view_point) == (chunk_size, "ego_view")
        assert resolved.action.domain_name == (domain_name or "av")
        assert resolved.action.width == (width_of_action or 9)
        # The given picture decides: it is never enlarged, and stretched to multiples of 16.
        expected = (528, 640, (544, 736)) if domain_name else (32, 48, (192, 320))
        assert (resolved.height, resolved.width, (wording.height, wording.width)) == expected
        assert resolved.negative_prompt == ""
    kind_of_file = {"text_to_image": "png", "inverse_dynamics": None}.get(mode, "mp4")
    assert (None if resolved.file is None else resolved.file.kind) == kind_of_file
    assert bool(resolved.num_sound_latents) == mode.endswith("_with_sound")
    if resolved.num_sound_latents:
        assert resolved.file is not None
        assert resolved.file.sound is not None
        assert (resolved.num_sound_latents, resolved.file.sound.num_samples) == (197, 378_000)


@pytest.mark.parametrize(("kind", "mode"), ROWS)
def test_every_mode_runs_with_everything_left_out(
    kind: str,
    mode: str,
    checkpoints: dict[str, Path],
    engine_for: Callable[[Path], Engine],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The defaults' own sizes would take minutes: they are made small in the table, and nowhere else."""
    row = PRESETS[kind, mode]
    small = {"num_inference_steps": 2} if row.action else {"height": 32, "width": 48, "num_inference_steps": 2}
    if row.num_frames > 1 and not row.action:
        small["num_frames"] = 9
    monkeypatch.setitem(PRESETS, (kind, mode), replace(row, **small))
    fields = dict(minimal(kind, mode))
    if fields is not MINIMAL[mode] and kind == "nano-policy-droid" and mode == "policy":
        fields["image"] = MINIMAL["policy"]["image"]  # its tier's canvas is large, its own picture need not be
    result = generate(engine_for(checkpoints[kind]), GenerationRequest(**fields), tmp_path / "clip")
    num_frames = 1 if mode == "text_to_image" else row.num_frames if row.action else 9
    names = [] if mode == "inverse_dynamics" else ["clip.png" if mode == "text_to_image" else "clip.mp4"]
    assert [path.name for path in tmp_path.iterdir()] == names
    if names:
        assert result.path == tmp_path / names[0]
        info = probe_video(result.path)
        assert (info.num_frames, info.height, info.width) == (num_frames, 32, 48)
    if mode in ("inverse_dynamics", "policy"):
        assert result.actions is not None
        chunk_size, width = row.num_frames - 1, 8 if row.action and row.action.raw_action_dim else 9
        assert result.actions.values.shape == (chunk_size, width)
        assert torch.isfinite(torch.from_numpy(result.actions.values)).all()
    else:
        assert result.actions is None


def test_the_width_of_the_droid_policy_is_for_that_embodiment(checkpoints: dict[str, Path]) -> None:
    layout = CheckpointLayout.open(checkpoints["nano-policy-droid"])

    def width(**fields: Any) -> int:
        action = resolve(GenerationRequest(**{**DROID_POLICY, **fields}), layout).action
        assert action is not None
        return action.width

    assert width() == width(domain_id=8) == width(domain_name="droid_lerobot") == 8
    assert width(raw_action_dim=10) == 10
    assert width(domain_name="av") == 9
    assert width(domain_name="robomind-franka") == 10
    found = resolve(GenerationRequest(mode="inverse_dynamics", video=CLIP, domain_id=8), layout).action
    assert found is not None
    assert found.width == 10, "the published table's, in modes that the policy was not tuned for"
