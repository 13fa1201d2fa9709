"""From the prompt to uint8 frames, every intermediate against diffusers on the same checkpoint and noise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cosmos3_core.engine import Engine
from cosmos3_core.generate import generate
from cosmos3_core.media.pixels import to_uint8
from cosmos3_core.model.rope import after_text, grid_positions, rope_table, text_positions
from cosmos3_core.request import GenerationRequest
from cosmos3_core.shapes import LatentShape

TOLERANCE = 1e-5  # relative L2, fp32


@dataclass(frozen=True)
class Case:
    """One point of the matrix: variant x schedule x steps x fps x shape."""

    variant: str
    schedule: str | None  # None: as shipped
    steps: int
    fps: float
    num_frames: int
    height: int
    width: int
    flow_shift: float = 10.0
    guidance_scale: float = 6.0
    prompt: str = "A red car drives along the coast."

    def __str__(self) -> str:
        shape = f"{self.num_frames}x{self.height}x{self.width}"
        return f"{self.variant}-{self.schedule or 'shipped'}-{self.steps}steps-{self.fps:g}fps-{shape}"


# 80 and 48 rows are 5 and 3 latent rows: odd, padded to whole patches, as 720p's 45 are.
CASES = [
    Case("nano", "native", 35, 24.0, 9, 80, 96),
    Case("nano", "linear", 10, 10.0, 13, 48, 64),
    Case("nano", "karras", 4, 16.0, 5, 80, 64),
    Case("nano", None, 12, 30.0, 9, 64, 48),
    Case("nano", "native", 6, 24.0, 1, 80, 80, flow_shift=3.0, guidance_scale=4.0),
    Case("nano", "native", 5, 24.0, 5, 64, 64, guidance_scale=1.0),
    Case("nano", "native", 5, 24.0, 5, 64, 64, guidance_scale=0.5),
    Case("super", "native", 8, 30.0, 9, 80, 48),
    Case("super", "linear", 12, 16.0, 5, 48, 80),
    Case("super", "karras", 10, 10.0, 9, 64, 80),
    Case("edge", "native", 10, 16.0, 9, 80, 80, flow_shift=3.0, guidance_scale=5.0),
    Case("edge", "karras", 12, 30.0, 5, 48, 48),
    Case("edge", "linear", 6, 10.0, 5, 80, 64, flow_shift=3.0),
    Case("edge", None, 8, 24.0, 5, 80, 64),
    Case("nano", "native", 4, 24.0, 5, 64, 64, prompt='{"subject": "a red car"}'),
]


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def checkpoint(case: Case, request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{case.variant}")


def test_every_intermediate_equals_diffusers(
    case: Case,
    checkpoint: Path,
    engine_for: Callable[[Path], Engine],
    diffusers_pipeline: Callable[[Path], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
    tmp_path: Path,
) -> None:
    reference = diffusers_pipeline(checkpoint).run(
        case.prompt,
        schedule=case.schedule,
        flow_shift=case.flow_shift,
        num_frames=case.num_frames,
        height=case.height,
        width=case.width,
        fps=case.fps,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        generator=torch.Generator().manual_seed(7),
    )
    engine = engine_for(checkpoint)
    request = GenerationRequest(
        prompt=case.prompt,
        num_frames=case.num_frames,
        height=case.height,
        width=case.width,
        fps=case.fps,
        num_inference_steps=case.steps,
        guidance_scale=case.guidance_scale,
        flow_shift=None if case.schedule is None else case.flow_shift,
        schedule=case.schedule,
        seed=7,
        compat="diffusers",
    )
    velocities: list[Tensor] = []
    latents: list[Tensor] = []
    model_velocity = engine.denoiser.transformer.velocity

    def record(*args: Any) -> dict[str, Tensor]:
        velocity = model_velocity(*args)
        velocities.append(velocity["video"])
        return velocity

    engine.denoiser.transformer.velocity = record  # type: ignore[method-assign]
    try:
        result = generate(
            engine, request, output="latent", on_step=lambda event: latents.append(event.state.latents["video"])
        )
    finally:
        engine.denoiser.transformer.velocity = model_velocity  # type: ignore[method-assign]

    conditional, unconditional = engine.tokenize(result.request)
    assert list(conditional.ids) == reference.text_ids
    assert list(unconditional.ids) == reference.negative_text_ids

    num_branches = 1 if case.guidance_scale == 1.0 else 2
    config, geometry = engine.layout.transformer, engine.layout.geometry
    grid = geometry.token_grid(geometry.latent_shape(result.request.num_frames, case.height, case.width))
    ours = grid_positions(grid, fps=case.fps, temporal=geometry.temporal, config=config)
    for prompt, theirs in zip((conditional, unconditional)[:num_branches], reference.position_ids, strict=False):
        placed = after_text(ours, len(prompt.ids), config)
        assert torch.equal(torch.cat((text_positions(len(prompt.ids)), placed), dim=1), theirs.float())
    assert len(velocities) == len(reference.velocities) == num_branches * case.steps
    for branch in range(num_branches):
        assert relative_difference(velocities[branch], reference.velocities[branch]) <= TOLERANCE
    assert len(latents) == len(reference.latents) == case.steps
    differences = [relative_difference(ours, theirs) for ours, theirs in zip(latents, reference.latents, strict=True)]
    assert max(differences) <= TOLERANCE, f"largest at step {int(np.argmax(differences)) + 1}"

    assert result.latents is not None
    assert reference.frames is not None
    frames = torch.cat([to_uint8(chunk) for chunk in engine.decode(result.latents["video"])]).numpy()
    assert frames.shape == reference.frames.shape
    off_by = np.abs(frames.astype(int) - reference.frames.astype(int))
    assert off_by.max() <= 1
    assert (off_by > 0).mean() <= 1e-3


@pytest.mark.parametrize("fps", [10.0, 16.0, 24.0, 30.0])
@pytest.mark.parametrize("num_frames", [1, 5, 189])
def test_positions_equal_diffusers_to_the_bit(
    fps: float, num_frames: int, tiny_nano: Path, engine_for: Callable[[Path], Engine]
) -> None:
    from diffusers.pipelines.cosmos.pipeline_cosmos3_omni import (
        get_3d_mrope_ids_text_tokens,
        get_3d_mrope_ids_vae_tokens,
    )

    layout = engine_for(tiny_nano).layout
    grid = layout.geometry.token_grid(LatentShape((num_frames + 3) // 4, 45, 80))
    text, offset = get_3d_mrope_ids_text_tokens(num_tokens=123, temporal_offset=0, use_float_positions=True)
    theirs, _ = get_3d_mrope_ids_vae_tokens(
        grid_t=grid.num_frames,
        grid_h=grid.height,
        grid_w=grid.width,
        temporal_offset=offset + 15000,
        fps=fps,
        base_fps=24.0,
        temporal_compression_factor=4,
    )
    ours = grid_positions(grid, fps=fps, temporal=layout.geometry.temporal, config=layout.transformer)
    assert torch.equal(after_text(ours, 123, layout.transformer), theirs.float())
    assert torch.equal(text_positions(123), text)


def test_a_clean_frame_equals_diffusers(
    tiny_nano: Path,
    engine_for: Callable[[Path], Engine],
    diffusers_pipeline: Callable[[Path], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
) -> None:
    """One forward pass with latent frame 0 conditioned, against diffusers' transformer with its own packing."""
    pipeline = diffusers_pipeline(tiny_nano).pipeline
    z_BCTHW = torch.randn(1, 48, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    text = pipeline._prepare_text_segment([5, 6, 7], device="cpu")
    start = text["vision_start_temporal_offset"]
    vision = pipeline._prepare_vision_segment(z_BCTHW, True, start, 24.0, text["und_len"], "cpu")
    with torch.no_grad():
        ((theirs,), _, _) = pipeline.transformer(
            input_ids=text["input_ids"],
            text_indexes=text["text_indexes"],
            position_ids=torch.cat([text["text_mrope_ids"], vision["vision_mrope_ids"]], dim=1),
            und_len=text["und_len"],
            sequence_length=text["und_len"] + vision["num_vision_tokens"],
            vision_tokens=[z_BCTHW],
            vision_token_shapes=vision["vision_token_shapes"],
            vision_sequence_indexes=vision["vision_sequence_indexes"],
            vision_mse_loss_indexes=vision["vision_mse_loss_indexes"],
            vision_timesteps=torch.full((vision["num_noisy_vision_tokens"],), 500),
            vision_noisy_frame_indexes=vision["vision_noisy_frame_indexes"],
            return_dict=False,
        )

    engine = engine_for(tiny_nano)
    transformer, config = engine.denoiser.transformer, engine.layout.transformer
    grid = engine.layout.geometry.token_grid(LatentShape(3, 5, 4))
    positions = after_text(grid_positions(grid, fps=24.0, temporal=4, config=config), 3, config)
    rope = rope_table(positions, config, device=torch.device("cpu"), dtype=torch.float32)
    prompt = transformer.prefill(torch.tensor([5, 6, 7]))
    mask_T = torch.tensor([0.0, 1.0, 1.0])
    ours = transformer.velocity({"video": z_BCTHW}, {"video": mask_T}, 500, prompt, rope)["video"]
    assert relative_difference(ours, theirs) <= TOLERANCE
