"""The start of denoising: noise from one generator, given media, and latents that never change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.initial import initial_states
from cosmos3_core.conditioning.state import LatentState
from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.denoiser import StepEvent
from cosmos3_core.engine import Engine
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.shapes import LatentShape

PLAIN = DenoiseRequest((5, 6, 7), (5, 6), LatentShape(3, 3, 2), 24.0, 4, 3.0, "native", 10.0, 1)
GENERATED = ActionLatents(num_actions=8, domain_id=7, width=10)
GIVEN = replace(GENERATED, given=tuple(tuple(0.1 * row - 0.37 * column for column in range(10)) for row in range(8)))
CLEAN = torch.randn((1, 48, 2, 3, 2), generator=torch.Generator().manual_seed(5))
EVERYTHING = replace(PLAIN, clean_frames=(0, 2), clean_latents=CLEAN, num_sound_latents=7, action=GENERATED)


@pytest.fixture
def layout(tiny_nano: Path) -> CheckpointLayout:
    return CheckpointLayout.open(tiny_nano)


def states_of(request: DenoiseRequest, layout: CheckpointLayout) -> dict[str, LatentState]:
    return initial_states(request, geometry=layout.geometry, config=layout.transformer)


def draws(seed: int) -> list[Tensor]:
    """One generator's, in the order of diffusers: video, sound, actions."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in ((1, 48, 3, 3, 2), (64, 7), (8, 64))]


def test_noise_comes_from_one_generator_video_then_sound_then_actions(layout: CheckpointLayout) -> None:
    video, sound, action = draws(1)
    states = states_of(replace(EVERYTHING, clean_frames=(), clean_latents=None), layout)
    assert list(states) == ["video", "sound", "action"]
    assert torch.equal(states["video"].latent, video)
    assert torch.equal(states["sound"].latent, sound)
    assert torch.equal(states["action"].latent[:, :10], action[:, :10])


def test_given_noise_takes_the_place_of_its_draw(layout: CheckpointLayout) -> None:
    sound = torch.ones(64, 7)
    states = states_of(replace(EVERYTHING, noise={"sound": sound}), layout)
    assert torch.equal(states["sound"].latent, sound)
    generator = torch.Generator().manual_seed(1)
    video = torch.randn((1, 48, 3, 3, 2), generator=generator)
    assert torch.equal(states["video"].latent[:, :, 1], video[:, :, 1])
    assert torch.equal(states["action"].latent[:, :10], torch.randn((8, 64), generator=generator)[:, :10])


def test_masks_moves_and_positions(layout: CheckpointLayout) -> None:
    states = states_of(EVERYTHING, layout)
    video, sound, action = states.values()
    assert video.noise_mask.tolist() == [0, 1, 0]
    assert torch.equal(video.free_mask.expand(1, 48, 3, 3, 2)[0, 0, :, 0, 0], video.noise_mask)
    assert torch.equal(video.latent[:, :, [0, 2]], CLEAN)
    assert torch.equal(video.latent[:, :, 1], draws(1)[0][:, :, 1])
    assert (video.is_partly_fixed, sound.is_partly_fixed, action.is_partly_fixed) == (True, False, True)
    assert sound.noise_mask.tolist() == [1] * 7
    assert action.noise_mask.tolist() == [1] * 8
    assert torch.equal(action.free_mask, torch.cat([torch.ones(8, 10), torch.zeros(8, 54)], dim=1))
    assert not action.latent[:, 10:].any()
    # 3 frames of 2 x 1 tokens; a step of time is a 24th of a second.
    assert [state.positions.shape for state in states.values()] == [(3, 6), (3, 7), (3, 8)]
    assert video.positions[0].tolist() == [0, 0, 1, 1, 2, 2]
    assert video.positions[1].tolist() == [0, 1, 0, 1, 0, 1]
    assert sound.positions[0].tolist() == pytest.approx([step * 24 / 25 for step in range(7)])
    assert action.positions[0].tolist() == pytest.approx([(step + 1) / 4 for step in range(8)])
    for track in (sound, action):
        assert not track.positions[1:].any()
    for state in states.values():
        tensors = (state.latent, state.noise_mask, state.free_mask, state.positions)
        assert {(tensor.dtype, str(tensor.device)) for tensor in tensors} == {(torch.float32, "cpu")}
        torch.broadcast_shapes(state.free_mask.shape, state.latent.shape)


def test_positions_follow_the_frame_rate(layout: CheckpointLayout) -> None:
    video, _, action = states_of(replace(EVERYTHING, fps=5.0), layout).values()
    assert video.positions[0, ::2].tolist() == pytest.approx([frame * 24 / 5 for frame in range(3)])
    assert action.positions[0].tolist() == pytest.approx([(step + 1) * 6 / 5 for step in range(8)])


def test_given_actions_are_clean_and_padded_with_zeros(layout: CheckpointLayout) -> None:
    action = states_of(replace(EVERYTHING, action=GIVEN), layout)["action"]
    assert torch.equal(action.latent[:, :10], torch.tensor(GIVEN.given))
    assert not action.latent[:, 10:].any()
    assert action.noise_mask.tolist() == [0] * 8
    assert not action.free_mask.any()


@pytest.mark.parametrize("action", [GENERATED, GIVEN], ids=["generated", "given"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_fixed_latents_stay_to_the_bit_in_every_step(
    action: ActionLatents, guidance_scale: float, tiny_nano: Path, engine_for: Callable[[Path], Engine]
) -> None:
    events: list[StepEvent] = []
    request = replace(EVERYTHING, action=action, guidance_scale=guidance_scale)
    latents = engine_for(tiny_nano).denoise(request, on_step=events.append)
    assert len(events) == 4
    for event in events:
        now = event.state.latents
        assert torch.equal(now["video"][:, :, [0, 2]], CLEAN)
        assert not now["action"][:, 10:].any()
        assert action.given is None or torch.equal(now["action"][:, :10], torch.tensor(action.given))
    start = draws(1)
    assert not torch.equal(latents["video"][:, :, 1], start[0][:, :, 1])
    assert not torch.equal(latents["sound"], start[1])
    if action.given is None:
        assert (latents["action"][:, :10] != start[2][:, :10]).all()


def test_a_clip_that_is_wholly_given_comes_back_and_actions_are_found(
    tiny_nano: Path, engine_for: Callable[[Path], Engine]
) -> None:
    clean = torch.randn((1, 48, 3, 3, 2), generator=torch.Generator().manual_seed(6))
    request = replace(PLAIN, clean_frames=(0, 1, 2), clean_latents=clean, action=GENERATED)
    latents = engine_for(tiny_nano).denoise(request)
    assert torch.equal(latents["video"], clean)
    other = engine_for(tiny_nano).denoise(replace(request, clean_latents=-clean))
    assert not torch.equal(latents["action"], other["action"]), "the actions are those of the clip"


def test_the_embodiment_counts(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> None:
    one, other = (
        engine_for(tiny_nano).denoise(replace(PLAIN, action=replace(GENERATED, domain_id=domain_id)))["action"]
        for domain_id in (7, 8)
    )
    assert not torch.equal(one, other)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"clean_frames": (0,)}, "clean_latents", "[1, 48, 1, 3, 2]"),
    ({"clean_frames": (0,), "clean_latents": CLEAN}, "clean_latents", "[1, 48, 2, 3, 2]"),
    ({"clean_frames": (0, 1), "clean_latents": CLEAN[:, :, :, :1]}, "clean_latents", "[1, 48, 2, 1, 2]"),
    ({"clean_frames": (0, 1), "clean_latents": CLEAN[:, :32]}, "clean_latents", "[1, 32, 2, 3, 2]"),
    ({"action": replace(GENERATED, domain_id=32)}, "domain_id", "0 to 31"),
    ({"action": replace(GENERATED, domain_id=-1)}, "domain_id", "-1"),
    ({"action": replace(GENERATED, width=65)}, "action", "1 to 64 numbers"),
    ({"action": replace(GENERATED, width=0)}, "action", "8 x 0"),
    ({"action": replace(GENERATED, num_actions=0)}, "action", "0 x 10"),
    ({"action": replace(GIVEN, num_actions=9)}, "action", "9 rows of 10"),
    ({"action": replace(GIVEN, width=9)}, "action", "8 rows of 9"),
    ({"action": replace(GIVEN, given=((0.0,) * 10,) * 7 + ((0.0,) * 9,))}, "action", "[9, 10]"),
    ({"noise": {"sound": torch.zeros(64, 7)}}, "noise", "sound"),
    ({"num_sound_latents": 7, "noise": {"sound": torch.zeros(7, 64)}}, "noise.sound", "[64, 7]"),
]


@pytest.mark.parametrize(("changes", "field", "said"), BAD, ids=lambda value: "")
def test_noise_or_media_that_do_not_match_the_request_are_refused(
    changes: dict[str, Any], field: str, said: str, layout: CheckpointLayout
) -> None:
    with pytest.raises(RequestError) as caught:
        states_of(replace(PLAIN, **changes), layout)
    assert caught.value.field == field
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"clean_frames": (3,)}, "clean_frames"),
        ({"clean_frames": (-1,)}, "clean_frames"),
        ({"num_sound_latents": -1}, "num_sound_latents"),
        ({"num_sound_latents": 10**6}, "num_sound_latents"),
        ({"num_sound_latents": 2.0}, "num_sound_latents"),
    ],
    ids=str,
)
def test_a_request_that_cannot_be_is_refused_as_a_value(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(RequestError) as caught:
        replace(PLAIN, **changes)
    assert caught.value.field == field


def test_a_transformer_without_the_heads_says_so(layout: CheckpointLayout) -> None:
    mute = replace(layout, transformer=replace(layout.transformer, sound_gen=False, action_gen=False))
    with pytest.raises(CapabilityError, match="num_sound_latents must be 0 .got 7.*no sound"):
        states_of(replace(PLAIN, num_sound_latents=7), mute)
    with pytest.raises(CapabilityError, match="no weights for actions"):
        states_of(replace(PLAIN, action=GENERATED), mute)
