"""Guidance for some of the steps: outside of the interval one branch runs, and nothing else is different there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.engine import Engine
from cosmos3_core.generate import generate
from cosmos3_core.request import GenerationRequest
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.shapes import LatentShape

CLEAN = torch.randn((1, 48, 1, 3, 2), generator=torch.Generator().manual_seed(5))
# The native schedule of 4 steps: timesteps 999, 967, 908, 768.
REQUEST = DenoiseRequest(
    (5, 6, 7),
    (5, 6),
    LatentShape(3, 3, 2),
    24.0,
    4,
    3.0,
    "native",
    10.0,
    1,
    clean_frames=(0,),
    clean_latents=CLEAN,
    num_sound_latents=5,
    action=ActionLatents(4, 7, 10),
)
NEVER = (0.0, 1.0)

INTERVALS: list[tuple[Any, list[int]]] = [
    (None, [2, 2, 2, 2]),
    ((0.0, 1000.0), [2, 2, 2, 2]),
    ((908.0, 967.0), [1, 2, 2, 1]),
    ((908.5, 966.5), [1, 1, 1, 1]),
    ((967.0, 967.0), [1, 2, 1, 1]),
    ((800.0, 1000.0), [2, 2, 2, 1]),
    ((0.0, 800.0), [1, 1, 1, 2]),
    (NEVER, [1, 1, 1, 1]),
    ((0.0, 0.0), [1, 1, 1, 1]),
]


@pytest.fixture
def denoiser(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> Denoiser:
    return engine_for(tiny_nano).denoiser


@pytest.fixture
def timesteps_run(denoiser: Denoiser, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The timestep of every forward pass."""
    run: list[int] = []
    velocity = denoiser.transformer.velocity

    def count(latents: Any, noise_masks: Any, timestep: int, *others: Any) -> Any:
        run.append(timestep)
        return velocity(latents, noise_masks, timestep, *others)

    monkeypatch.setattr(denoiser.transformer, "velocity", count)
    return run


def assert_same(one: DenoiseState, other: DenoiseState) -> None:
    assert list(one.latents) == list(other.latents) == ["video", "sound", "action"]
    for name, latents in one.latents.items():
        assert torch.equal(latents, other.latents[name]), name


@pytest.mark.parametrize(("interval", "passes"), INTERVALS, ids=lambda value: str(value))
def test_outside_of_the_interval_one_branch_runs(
    interval: Any, passes: list[int], denoiser: Denoiser, timesteps_run: list[int]
) -> None:
    plan = denoiser.prepare(replace(REQUEST, guidance_interval=interval))
    timesteps = plan.solver.schedule.timesteps
    assert timesteps == (999, 967, 908, 768)
    denoiser.run(plan)
    assert [timesteps_run.count(timestep) for timestep in timesteps] == passes
    assert [plan.num_branches_at(timestep) for timestep in timesteps] == passes


def test_without_guidance_an_interval_is_for_nothing(denoiser: Denoiser, timesteps_run: list[int]) -> None:
    unguided = replace(REQUEST, guidance_scale=1.0)
    with_interval = denoiser.run(denoiser.prepare(replace(unguided, guidance_interval=(900.0, 1000.0))))
    assert timesteps_run == [999, 967, 908, 768]
    assert_same(with_interval, denoiser.run(denoiser.prepare(unguided)))


def test_a_step_outside_is_one_without_guidance_and_a_step_inside_a_guided_one(denoiser: Denoiser) -> None:
    plans = {
        "some": denoiser.prepare(replace(REQUEST, guidance_interval=(908.0, 967.0))),
        "all": denoiser.prepare(REQUEST),
        "none": denoiser.prepare(replace(REQUEST, guidance_scale=1.0)),
    }
    state = denoiser.start(plans["some"])
    for expected, other in (("none", "all"), ("all", "none"), ("all", "none"), ("none", "all")):
        now = {name: denoiser.step(plan, replace(state, fingerprint=plan.fingerprint)) for name, plan in plans.items()}
        assert_same(now["some"], now[expected])
        assert not torch.equal(now["some"].latents["video"], now[other].latents["video"])
        assert not torch.equal(now["some"].latents["sound"], now[other].latents["sound"])
        assert not torch.equal(now["some"].latents["action"], now[other].latents["action"])
        state = now["some"]


def test_the_whole_range_is_guidance_and_none_of_it_is_none(denoiser: Denoiser) -> None:
    def run(**changes: Any) -> DenoiseState:
        return denoiser.run(denoiser.prepare(replace(REQUEST, **changes)))

    assert_same(run(guidance_interval=(0.0, 1000.0)), run())
    assert_same(run(guidance_interval=NEVER), run(guidance_scale=1.0))


def test_the_interval_is_part_of_what_names_a_request() -> None:
    names = {replace(REQUEST, guidance_interval=interval).fingerprint for interval, _ in INTERVALS}
    assert len(names) == len(INTERVALS)


def test_a_user_can_ask_for_it(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> None:
    small = GenerationRequest(prompt="a car", num_frames=5, height=32, width=32, num_inference_steps=4)

    def video(**changes: Any) -> torch.Tensor:
        latents = generate(engine_for(tiny_nano), replace(small, **changes), output="latent").latents
        assert latents is not None
        return latents["video"]

    assert torch.equal(video(guidance_interval=(0, 1)), video(guidance_scale=1.0))
    assert torch.equal(video(guidance_interval=[0, 1000]), video())
    assert not torch.equal(video(guidance_interval=(900, 1000)), video())
