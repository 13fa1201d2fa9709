"""A mode is two rows of data: one that the product has never heard of runs through the public path."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos3_core.conditioning.modes import MODES, ActionRole, Mode, Resizing
from cosmos3_core.engine import Engine
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.generate import generate
from cosmos3_core.media.probe import probe_video
from cosmos3_core.presets import PRESETS, Preset
from cosmos3_core.request import GenerationRequest
from cosmos3_core.resolve import resolve
from tests.mode_inputs import CLIP, IMAGE


def last_frame(num_latent_frames: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
    return (num_latent_frames - 1,)


@pytest.fixture
def arrive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds the mode "arrive", which knows where a clip ends and finds what leads there."""

    def add(**properties: Any) -> None:
        mode = Mode("arrive", clean_frames=last_frame, **properties)
        monkeypatch.setitem(MODES, "arrive", mode)
        monkeypatch.setitem(PRESETS, ("nano", "arrive"), Preset(9, 32, 48, 24.0, 3, 2.0, 10.0, "this test"))

    return add


@pytest.mark.parametrize(
    ("media", "resizing"),
    [("video", Resizing.STRETCH), ("image", Resizing.CROP), ("image", Resizing.STRETCH), ("video", Resizing.CROP)],
    ids=str,
)
def test_a_new_mode_is_a_row(
    media: str,
    resizing: Resizing,
    arrive: Callable[..., None],
    tiny_nano: Path,
    engine_for: Callable[[Path], Engine],
    tmp_path: Path,
) -> None:
    arrive(media=(media,), resizing=resizing)
    engine = engine_for(tiny_nano)
    request = GenerationRequest(prompt="a car", mode="arrive", **{media: IMAGE if media == "image" else CLIP})
    resolved = resolve(request, engine.layout)
    assert resolved.picture is not None
    assert (resolved.picture.num_frames, resolved.picture.clean_frames) == (9, (2,))
    result = generate(engine, request, output="latent")
    assert result.latents is not None
    given = engine.clean_latents(resolved.picture)
    assert torch.equal(result.latents["video"][:, :, 2:], given)
    assert not torch.equal(result.latents["video"][:, :, :1], given)
    clip = generate(engine, request, tmp_path / "clip")
    assert clip.path is not None
    assert probe_video(clip.path).num_frames == 9


def test_a_new_mode_is_held_to_its_row(
    arrive: Callable[..., None], tiny_nano: Path, tiny_edge: Path, engine_for: Callable[[Path], Engine]
) -> None:
    arrive(media=("video",), resizing=Resizing.STRETCH)
    layout = engine_for(tiny_nano).layout
    for fields, field in [
        ({}, "video"),
        ({"image": IMAGE}, "image"),
        ({"video": CLIP, "actions": [[1.0]]}, "actions"),
        ({"video": CLIP, "condition_frame_indexes_vision": 0}, "condition_frame_indexes_vision"),
        ({"video": CLIP, "generate_sound": True}, "generate_sound"),
    ]:
        with pytest.raises(RequestError) as caught:
            resolve(GenerationRequest(prompt="a car", mode="arrive", **fields), layout)
        assert caught.value.field == field
    with pytest.raises(CapabilityError, match="arrive.*not trained for it"):
        resolve(GenerationRequest(prompt="a car", mode="arrive", video=CLIP), engine_for(tiny_edge).layout)


def test_the_modes_are_the_published_ones() -> None:
    """Media that is brought, latent frames of five that it gives, (those of (0, 1) that were chosen), what else."""
    image, video, either = ("image",), ("video",), ("image", "video")
    expected = {
        "text_to_image": ((), (), None, ActionRole.NONE),
        "text_to_video": ((), (), None, ActionRole.NONE),
        "image_to_video": (image, (0,), Resizing.CROP, ActionRole.NONE),
        "video_to_video": (video, (0, 1), Resizing.STRETCH, ActionRole.NONE),
        "text_to_video_with_sound": ((), (), None, ActionRole.NONE),
        "image_to_video_with_sound": (image, (0,), Resizing.CROP, ActionRole.NONE),
        "video_to_video_with_sound": (video, (0, 1), Resizing.STRETCH, ActionRole.NONE),
        "forward_dynamics": (either, (0,), Resizing.PAD, ActionRole.GIVEN),
        "inverse_dynamics": (video, (0, 1, 2, 3, 4), Resizing.PAD, ActionRole.GENERATED),
        "policy": (either, (0,), Resizing.PAD, ActionRole.GENERATED),
    }
    assert {
        name: (mode.media, mode.clean_frames(5, (0, 1)), mode.resizing, mode.actions) for name, mode in MODES.items()
    } == expected
    assert [name for name, mode in MODES.items() if mode.has_sound] == [n for n in MODES if n.endswith("_with_sound")]
    assert [name for name, mode in MODES.items() if not mode.needs_prompt] == ["forward_dynamics", "inverse_dynamics"]
    assert [name for name, mode in MODES.items() if mode.is_image] == ["text_to_image"]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"media": ("video",)}, "go together"),
        ({"resizing": Resizing.CROP}, "go together"),
        ({"media": ("video",), "resizing": Resizing.PAD}, "only modes with actions"),
    ],
)
def test_a_row_that_contradicts_itself_is_refused(row: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mode("arrive", clean_frames=last_frame, **row)
