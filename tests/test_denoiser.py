"""Requests are values: interleaving, resuming, and what is paid once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_transformer
from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.engine import Engine
from cosmos3_core.errors import RequestError, StateError
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.shapes import LatentShape

REQUEST = DenoiseRequest(
    text_ids=(5, 6, 7, 8, 9),
    negative_text_ids=(3, 4),
    latent_shape=LatentShape(3, 5, 4),
    fps=24.0,
    num_inference_steps=6,
    guidance_scale=6.0,
    schedule="native",
    flow_shift=10.0,
    seed=1,
)
OTHER = replace(REQUEST, text_ids=(20, 21, 22), latent_shape=LatentShape(1, 4, 6), num_inference_steps=9, seed=2)


@pytest.fixture
def denoiser(tiny_nano: Path, engine_for: Callable[[Path], Engine]) -> Denoiser:
    """A fresh prompt cache around the session's transformer."""
    engine = engine_for(tiny_nano)
    return Denoiser(engine.denoiser.transformer, engine.layout.geometry, engine.layout.scheduler)


def final_latents(denoiser: Denoiser, request: DenoiseRequest) -> Tensor:
    return denoiser.run(denoiser.prepare(request)).latents["video"]


def test_two_interleaved_requests_each_get_what_they_get_alone(denoiser: Denoiser) -> None:
    alone = [final_latents(denoiser, request) for request in (REQUEST, OTHER)]
    plans = [denoiser.prepare(request) for request in (REQUEST, OTHER)]
    states = [denoiser.start(plan) for plan in plans]
    while any(state.step_index < plan.num_steps for plan, state in zip(plans, states, strict=True)):
        for index, plan in enumerate(plans):
            if states[index].step_index < plan.num_steps:
                states[index] = denoiser.step(plan, states[index])
    for state, expected in zip(states, alone, strict=True):
        assert torch.equal(state.latents["video"], expected)


def test_a_step_leaves_the_given_state_as_it_was(denoiser: Denoiser) -> None:
    plan = denoiser.prepare(REQUEST)
    state = denoiser.step(plan, denoiser.step(plan, denoiser.start(plan)))
    before = state.to_bytes()
    first, second = denoiser.step(plan, state), denoiser.step(plan, state)
    assert state.to_bytes() == before
    assert torch.equal(first.latents["video"], second.latents["video"])


def test_nothing_of_a_request_stays_on_the_denoiser(denoiser: Denoiser) -> None:
    def attributes() -> dict[str, object]:
        return {name: value for name, value in vars(denoiser).items() if name not in ("text_cache", "_ledger")}

    final_latents(denoiser, REQUEST)
    before = attributes()
    parameters = {name: p.clone() for name, p in denoiser.transformer.named_parameters()}
    buffers = len(list(denoiser.transformer.buffers()))
    final_latents(denoiser, OTHER)
    assert attributes() == before
    assert len(list(denoiser.transformer.buffers())) == buffers
    for name, parameter in denoiser.transformer.named_parameters():
        assert torch.equal(parameter, parameters[name])


RESUME = """
import sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_audio_vae, load_transformer, load_video_vae
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.shapes import LatentShape
layout = CheckpointLayout.open(sys.argv[1])
transformer = load_transformer(layout, device=torch.device("cpu"), dtype=torch.float32)
for load in (load_video_vae, load_audio_vae):
    load(layout, device=torch.device("cpu"))
request = DenoiseRequest(
    text_ids=(5, 6, 7, 8, 9), negative_text_ids=(3, 4),
    latent_shape=LatentShape(3, 5, 4), fps=24.0, num_inference_steps=6, guidance_scale=6.0,
    schedule="native", flow_shift=10.0, seed=1,
)
for path in map(Path, sys.argv[2:]):
    denoiser = Denoiser(transformer, layout.geometry, layout.scheduler)
    state = DenoiseState.from_bytes(path.read_bytes())
    assert state.step_index == int(path.stem)
    path.with_suffix(".done").write_bytes(denoiser.run(denoiser.prepare(request), state).to_bytes())
heavy = {"torch._dynamo", "sympy", "transformers"} & sys.modules.keys()
assert not heavy, f"a rank's start is slower by the import of {heavy}"
"""


def test_a_saved_state_resumes_in_a_fresh_process_to_the_bit(
    denoiser: Denoiser, tiny_nano: Path, tmp_path: Path
) -> None:
    plan = denoiser.prepare(REQUEST)
    state = denoiser.start(plan)
    expected: dict[int, bytes] = {}
    for step in range(6):
        if step in (0, 1, 3, 5):
            (tmp_path / f"{step}.state").write_bytes(state.to_bytes())
            expected[step] = denoiser.run(plan, state).to_bytes()
        state = denoiser.step(plan, state)
    paths = [str(tmp_path / f"{step}.state") for step in expected]
    subprocess.run([sys.executable, "-c", RESUME, str(tiny_nano), *paths], check=True, timeout=100)
    assert {step: (tmp_path / f"{step}.done").read_bytes() for step in expected} == expected


def test_a_state_of_another_request_is_refused(denoiser: Denoiser) -> None:
    plan = denoiser.prepare(REQUEST)
    for changed in (
        replace(REQUEST, seed=3),
        replace(REQUEST, text_ids=(5, 6, 7, 8, 10)),
        replace(REQUEST, guidance_scale=5.0),
        replace(REQUEST, num_inference_steps=7),
    ):
        state = denoiser.start(denoiser.prepare(changed))
        with pytest.raises(StateError, match="another request"):
            denoiser.step(plan, state)
    done = denoiser.run(plan)
    with pytest.raises(StateError, match="no step 6"):
        denoiser.step(plan, done)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"\x80\x04" + b, lambda b: b[8:]]
)
def test_damaged_state_bytes_are_a_typed_error(denoiser: Denoiser, damage: Callable[[bytes], bytes]) -> None:
    data = denoiser.start(denoiser.prepare(REQUEST)).to_bytes()
    with pytest.raises(StateError, match="not a saved denoise state"):
        DenoiseState.from_bytes(damage(data))


def test_two_prefills_for_a_guided_request_and_none_for_the_same_prompts_again(denoiser: Denoiser) -> None:
    request = replace(REQUEST, num_inference_steps=35)
    final_latents(denoiser, request)
    assert denoiser.text_cache.num_prefills == 2
    final_latents(denoiser, replace(request, seed=9, latent_shape=LatentShape(2, 4, 4)))
    assert denoiser.text_cache.num_prefills == 2
    final_latents(denoiser, replace(request, text_ids=(1, 2, 3)))
    assert denoiser.text_cache.num_prefills == 3


def test_guidance_off_prefills_one_branch(denoiser: Denoiser) -> None:
    final_latents(denoiser, replace(REQUEST, guidance_scale=1.0))
    assert denoiser.text_cache.num_prefills == 1


def test_the_prompt_cache_is_bounded_and_an_eviction_does_not_change_results(denoiser: Denoiser) -> None:
    expected = final_latents(denoiser, REQUEST)
    one_entry = len(REQUEST.text_ids) * denoiser.request_memory.bytes_per_text_token
    for max_bytes in (0, one_entry):
        small = Denoiser(denoiser.transformer, denoiser.geometry, denoiser.scheduler, text_cache_bytes=max_bytes)
        assert torch.equal(final_latents(small, REQUEST), expected)
        assert small.text_cache.num_bytes <= max_bytes
        # Kept by the plan for as long as the request runs: never more than one prefill a branch.
        assert small.text_cache.num_prefills == 2


def test_the_memory_of_a_request_is_predicted(denoiser: Denoiser) -> None:
    """Between two steps: state, prompts and positions. The bound that admits requests stands on it."""
    larger = replace(REQUEST, latent_shape=LatentShape(3, 10, 6))
    for request in (REQUEST, replace(REQUEST, guidance_scale=1.0), larger):
        plan = denoiser.prepare(request)
        state = denoiser.start(plan)
        for _ in range(3):
            state = denoiser.step(plan, state)
        tensors = [modality.latent for modality in plan.initial.values()]
        for solver in state.solver.values():
            tensors += [solver.sample, *solver.x0] + ([] if solver.corrected is None else [solver.corrected])
        for branch in plan.branches:
            tensors += [branch.rope.cos, branch.rope.sin, *branch.text.keys, *branch.text.values]
        held = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        foretold = denoiser.request_memory.of(request)
        assert held <= foretold <= 1.2 * held


def test_a_saved_state_of_another_request_is_refused_on_resume(denoiser: Denoiser) -> None:
    plan = denoiser.prepare(REQUEST)
    state = denoiser.step(plan, denoiser.start(plan))
    assert denoiser.resume(plan, DenoiseState.from_bytes(state.to_bytes())).step_index == 1
    with pytest.raises(StateError, match="another request"):
        denoiser.resume(denoiser.prepare(OTHER), state)


def test_more_steps_than_distinct_timesteps(denoiser: Denoiser) -> None:
    request = replace(REQUEST, num_inference_steps=150, latent_shape=LatentShape(1, 2, 2))
    plan = denoiser.prepare(request)
    timesteps = plan.solver.schedule.timesteps
    assert len(set(timesteps)) < len(timesteps)
    few = final_latents(denoiser, replace(request, num_inference_steps=75))
    many = denoiser.run(plan).latents["video"]
    assert torch.isfinite(many).all()
    # Both have converged on the same path; a solver that lost its place would not.
    assert (many - few).norm() / few.norm() < 0.05


def test_given_noise_replaces_the_seed(denoiser: Denoiser) -> None:
    noise = torch.randn((1, 48, 3, 5, 4), generator=torch.Generator().manual_seed(REQUEST.seed))
    given = final_latents(denoiser, replace(REQUEST, seed=99, noise={"video": noise}))
    assert torch.equal(given, final_latents(denoiser, REQUEST))
    with pytest.raises(RequestError, match=r"noise.video.*\[1, 48, 3, 5, 4\]"):
        denoiser.prepare(replace(REQUEST, noise={"video": noise[:, :, :1]}))
    with pytest.raises(RequestError, match="noise.*smell"):
        denoiser.prepare(replace(REQUEST, noise={"smell": noise}))


def test_what_a_request_holds_counts_sound_and_actions(denoiser: Denoiser) -> None:
    memory, config = denoiser.request_memory, denoiser.transformer.config
    alone = memory.of(REQUEST)
    sound = memory.of(replace(REQUEST, num_sound_latents=7)) - alone
    actions = memory.of(replace(REQUEST, action=ActionLatents(6, 1, 9))) - alone
    # Five tensors of fp32 each, and a position a token.
    assert sound == 7 * (5 * 4 * config.sound_dim + memory.bytes_per_token)
    assert actions == 6 * (5 * 4 * config.action_dim + memory.bytes_per_token)
    assert memory.bytes_per_token > 0


def test_token_ids_outside_the_vocabulary_are_refused(denoiser: Denoiser) -> None:
    for bad in (-1, denoiser.transformer.config.vocab_size):
        with pytest.raises(RequestError, match="text_ids"):
            denoiser.prepare(replace(REQUEST, text_ids=(1, bad)))


def test_bfloat16_towers_keep_fp32_outside(tiny_nano: Path, denoiser: Denoiser) -> None:
    layout = CheckpointLayout.open(tiny_nano)
    transformer = load_transformer(layout, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert transformer.time_embedder.linear_1.weight.dtype == torch.float32
    assert transformer.dtype == torch.bfloat16
    half = Denoiser(transformer, layout.geometry, layout.scheduler)
    plan = half.prepare(REQUEST)
    state = half.step(plan, half.start(plan))
    solver = state.solver["video"]
    assert {x.dtype for x in (solver.sample, solver.corrected, *solver.x0) if x is not None} == {torch.float32}
    exact = denoiser.step(denoiser.prepare(REQUEST), denoiser.start(denoiser.prepare(REQUEST)))
    difference = (state.latents["video"] - exact.latents["video"]).norm() / exact.latents["video"].norm()
    assert 0 < difference < 0.05
