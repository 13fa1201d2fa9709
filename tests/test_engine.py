"""The engine does what its arguments say; each would go unnoticed elsewhere because the default is what tests use."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.denoiser import StepEvent
from cosmos3_core.engine import Engine
from cosmos3_core.errors import CheckpointError, RequestError, StateError
from cosmos3_core.generate import generate, main
from cosmos3_core.ops import eager
from cosmos3_core.phyai import Cosmos3T2VRequest
from cosmos3_core.request import GenerationRequest
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.shapes import LatentShape

IDS = torch.tensor([[5, 6, 7]])
REQUEST = Cosmos3T2VRequest(
    IDS,
    torch.ones_like(IDS),
    IDS[:, :2],
    torch.ones(1, 2),
    (3, 3, 2),
    num_inference_steps=5,
    guidance_scale=3.0,
    seed=1,
)
JOB = DenoiseRequest((5, 6, 7), (5, 6), LatentShape(3, 3, 2), 24.0, 5, 3.0, "native", 10.0, 1)


@pytest.fixture
def engine(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> Engine:
    return engine_for(tiny_nano)


def latents_with(tiny: Path, **arguments: Any) -> Tensor:
    with Engine(tiny, device="cpu", **arguments) as engine:
        return engine.step(REQUEST, output="latent")


def test_schedule_and_shift_come_from_the_engine_unless_the_request_says(engine: Engine, tiny_nano: Path) -> None:
    native = engine.step(REQUEST, output="latent")
    assert torch.equal(native, engine.denoise(JOB)["video"])
    by_engine = {
        "karras": latents_with(tiny_nano, use_karras_sigmas=True),
        "shipped": latents_with(tiny_nano, use_karras_sigmas=None),
        "shift": latents_with(tiny_nano, flow_shift=3.0),
    }
    assert torch.equal(by_engine["karras"], engine.step(replace(REQUEST, schedule="karras"), output="latent"))
    assert torch.equal(by_engine["shipped"], by_engine["karras"])
    assert torch.equal(by_engine["shift"], engine.step(replace(REQUEST, flow_shift=3.0), output="latent"))
    assert not torch.equal(by_engine["karras"], native)
    assert not torch.equal(by_engine["shift"], native)


def test_a_run_resumes_where_it_was(engine: Engine) -> None:
    states: list[DenoiseState] = []
    whole = engine.denoise(JOB, on_step=lambda event: states.append(event.state))
    events: list[StepEvent] = []
    resumed = engine.denoise(JOB, resume=DenoiseState.from_bytes(states[2].to_bytes()), on_step=events.append)
    assert [event.step for event in events] == [4, 5]
    assert list(resumed) == list(whole) == ["video"]
    assert torch.equal(resumed["video"], whole["video"])
    sigmas = engine.denoiser.prepare(JOB).solver.schedule.sigmas
    assert [event.sigma for event in events] == list(sigmas[4:6])


def test_a_run_of_all_modalities_is_resumed_after_every_step(engine: Engine) -> None:
    job = replace(
        JOB,
        clean_frames=(1,),
        clean_latents=torch.randn(1, 48, 1, 3, 2, generator=torch.Generator().manual_seed(0)),
        num_sound_latents=3,
        action=ActionLatents(4, 7, 10),
    )
    states: list[DenoiseState] = []
    whole = engine.denoise(job, on_step=lambda event: states.append(event.state))
    for state in (*states[:-1], states[0].to("cpu")):
        resumed = engine.denoise(job, resume=DenoiseState.from_bytes(state.to_bytes()))
        assert list(resumed) == list(whole) == ["video", "sound", "action"]
        assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_moving_a_state_keeps_its_history(engine: Engine) -> None:
    plan = engine.denoiser.prepare(JOB)
    state = engine.denoiser.step(plan, engine.denoiser.step(plan, engine.denoiser.start(plan)))
    assert state.to("cpu").to_bytes() == state.to_bytes()
    assert state.solver["video"].corrected is not None
    assert len(state.solver["video"].x0) == 2


@pytest.mark.parametrize(
    "changed",
    [
        {"fps": 16.0},
        {"schedule": "karras"},
        {"flow_shift": 3.0},
        {"latent_shape": LatentShape(3, 3, 3)},
        {"negative_text_ids": (5, 7)},
        {"noise": {"video": torch.zeros(1, 48, 3, 3, 2)}},
        {"num_inference_steps": 6},
        {"guidance_scale": 2.0},
        {"text_ids": (5, 6, 8)},
        {"seed": 2},
        {"guidance_interval": (0.0, 900.0)},
        {"clean_frames": (0,), "clean_latents": torch.zeros(1, 48, 1, 3, 2)},
        {"num_sound_latents": 2},
        {"action": ActionLatents(2, 4, 2)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_every_field_is_in_the_fingerprint(changed: dict[str, Any], engine: Engine) -> None:
    assert replace(JOB, **changed).fingerprint != JOB.fingerprint
    plan = engine.denoiser.prepare(JOB)
    with pytest.raises(StateError, match="another request"):
        engine.denoiser.step(plan, engine.denoiser.start(engine.denoiser.prepare(replace(JOB, **changed))))


def test_every_part_of_a_condition_is_in_the_fingerprint() -> None:
    clean = {"clean_frames": (0,), "clean_latents": torch.zeros(1, 48, 1, 3, 2)}
    variants = [
        replace(JOB, **clean),
        replace(JOB, **{**clean, "clean_frames": (1,)}),
        replace(JOB, **{**clean, "clean_latents": torch.ones(1, 48, 1, 3, 2)}),
        replace(JOB, num_sound_latents=2),
        replace(JOB, num_sound_latents=3),
        replace(JOB, action=ActionLatents(2, 4, 2)),
        replace(JOB, action=ActionLatents(3, 4, 2)),
        replace(JOB, action=ActionLatents(2, 5, 2)),
        replace(JOB, action=ActionLatents(2, 4, 3)),
        replace(JOB, action=ActionLatents(2, 4, 2, ((0.0, 0.0), (0.0, 0.0)))),
        replace(JOB, action=ActionLatents(2, 4, 2, ((0.0, 0.0), (0.0, 0.5)))),
    ]
    assert len({variant.fingerprint for variant in variants}) == len(variants)


def test_equal_requests_have_equal_fingerprints_and_models_differ(engine: Engine, tiny_super: Path) -> None:
    assert replace(JOB, fps=24, guidance_scale=3).fingerprint == JOB.fingerprint
    unguided = replace(JOB, guidance_scale=1.0)
    assert replace(unguided, negative_text_ids=(9,)).fingerprint == unguided.fingerprint
    state = engine.denoiser.start(engine.denoiser.prepare(JOB))
    with Engine(tiny_super, device="cpu") as other, pytest.raises(StateError, match="model"):
        other.denoiser.step(other.denoiser.prepare(JOB), state)


def test_dtype_ops_and_cache_reach_what_they_are_for(tiny_nano: Path, engine: Engine) -> None:
    with Engine(tiny_nano, device="cpu", dtype=torch.bfloat16, ops={"attention": "eager"}, text_cache_bytes=7) as half:
        assert half.denoiser.transformer.dtype == torch.bfloat16
        assert half.denoiser.transformer.ops.attention is eager.attention
        pixels = half.step(REQUEST)
        assert half.denoiser.text_cache.num_bytes == 0, "no prompt fits into 7 bytes"
        assert pixels.dtype == torch.float32
        assert next(half.decode(half.denoise(JOB)["video"])).dtype == torch.bfloat16
    exact = engine.step(REQUEST)
    assert 0 < (pixels - exact).norm() / exact.norm() < 0.2


def test_chunks_are_as_long_as_asked(engine: Engine) -> None:
    latents = engine.denoise(JOB)["video"]
    assert [chunk.shape[2] for chunk in engine.decode(latents)] == [1, 4, 4]
    assert [chunk.shape[2] for chunk in engine.decode(latents, chunk_latents=2)] == [1, 8]
    latents.mul_(1.0)  # an ordinary tensor, the caller's to change


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"flow_shift": -1.0}, "flow_shift"),
        ({"use_karras_sigmas": "auto"}, "use_karras"),
        ({"dtype": torch.int8}, "dtype"),
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(arguments: dict[str, Any], said: str, tiny_nano: Path) -> None:
    with pytest.raises(RequestError, match=said):
        Engine(tiny_nano, device="cpu", **arguments)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse_to_load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("weights were loaded for what had to be refused")

    monkeypatch.setattr("cosmos3_core.checkpoint.load.load_parameters", refuse_to_load)


@pytest.mark.usefixtures("no_loading")
def test_damage_is_found_before_weights_are_read(tiny_nano: Path, tmp_path: Path) -> None:
    root = tmp_path / "checkpoint"
    shutil.copytree(tiny_nano, root)
    weights = root / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="truncated"):
        Engine(root, device="cpu")


@pytest.mark.usefixtures("no_loading")
@pytest.mark.parametrize("flags", [["--height", "100"], ["--steps", "0"], ["--tp", "2"]], ids=str)
def test_the_command_line_refuses_before_it_loads(flags: list[str], tiny_nano: Path) -> None:
    assert main(["--checkpoint", str(tiny_nano), "--prompt", "a car", "--device", "cpu", *flags]) == 2


@pytest.mark.parametrize(
    ("out", "settings"),
    [
        ("no/folder/x", {}),
        ("", {}),
        (".", {}),
        ("a\0b", {}),
        ("x" * 300, {}),
        (5, {}),
        (None, {}),
        ("x", {"crf": 99.0}),
    ],
    ids=lambda value: str(value)[:20],
)
def test_a_place_or_setting_that_cannot_be_is_refused_before_the_denoising(
    out: Any, settings: dict[str, Any], engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ran(*args: Any) -> None:
        raise AssertionError("the transformer ran")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine.denoiser.transformer, "velocity", ran)
    sides = {"height": 32, "width": 32}
    request = GenerationRequest(prompt="a car", num_frames=5, **sides, num_inference_steps=1, **settings)
    with pytest.raises(RequestError):
        generate(engine, request, out)
    assert list(tmp_path.iterdir()) == []


def test_quality_settings_reach_the_file(engine: Engine, tmp_path: Path) -> None:
    request = GenerationRequest(prompt="a car", num_frames=9, height=64, width=64, num_inference_steps=2)
    sizes = {}
    for name, settings in (("fine", {"crf": 5}), ("coarse", {"crf": 45}), ("exact", {"lossless": True})):
        path = generate(engine, replace(request, **settings), tmp_path / name).path  # type: ignore[arg-type]
        assert path is not None
        sizes[name] = path.stat().st_size
    assert sizes["coarse"] < sizes["fine"] < sizes["exact"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--guidance-scale", "2"],
        ["--flow-shift", "3"],
        ["--compat", "diffusers"],
        ["--dtype", "bfloat16"],
        ["--crf", "40"],
        ["--lossless"],
    ],
    ids=lambda flags: flags[0],
)
def test_every_flag_changes_the_file(flags: list[str], tiny_nano: Path, tmp_path: Path) -> None:
    arguments = ["--checkpoint", str(tiny_nano), "--prompt", "a car", "--num-frames", "5", "--height", "64"]
    arguments += ["--width", "64", "--steps", "3", "--device", "cpu"]
    assert main([*arguments, "--out", str(tmp_path / "plain")]) == 0
    assert main([*arguments, *flags, "--out", str(tmp_path / "flagged")]) == 0
    assert (tmp_path / "plain.mp4").read_bytes() != (tmp_path / "flagged.mp4").read_bytes()


@pytest.mark.parametrize(
    "change", [{"append_metadata": False}, {"use_system_prompt": True}, {"negative_metadata": "none"}], ids=str
)
def test_every_prompt_setting_changes_the_prompts(change: dict[str, Any], engine: Engine) -> None:
    request = GenerationRequest(prompt="a car", num_frames=5, height=32, width=32, num_inference_steps=1)
    plain = generate(engine, request, output="latent")
    changed = generate(engine, replace(request, **change), output="latent")
    assert plain.latents is not None
    assert changed.latents is not None
    assert not torch.equal(plain.latents["video"], changed.latents["video"])


def test_bf16_towers_follow_diffusers_in_bf16(tiny_nano: Path) -> None:
    """One step in the dtype that the product runs in: the norms, rope and timestep traps are bf16's."""
    from diffusers import Cosmos3OmniPipeline

    pipeline = Cosmos3OmniPipeline.from_pretrained(tiny_nano, enable_safety_checker=False, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    steps: list[Tensor] = []

    def on_step(_: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        steps.append(tensors["latents"].clone())
        return {}

    shape = {"num_frames": 9, "height": 80, "width": 64, "num_inference_steps": 3}
    generator = torch.Generator().manual_seed(3)
    pipeline("A red car.", generator=generator, output_type="latent", callback_on_step_end=on_step, **shape)
    with Engine(tiny_nano, device="cpu", dtype=torch.bfloat16) as engine:
        request = GenerationRequest(prompt="A red car.", seed=3, compat="diffusers", **shape)
        ours: list[Tensor] = []
        generate(engine, request, output="latent", on_step=lambda event: ours.append(event.state.latents["video"]))
    assert (ours[0] - steps[0]).norm() / steps[0].norm() < 5e-3
