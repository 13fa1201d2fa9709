"""diffusers 0.42.1 as the independent reference: same checkpoint, same request, what it computes on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

# The reference is asked for one schedule at a time; these are the switches that diffusers has for it.
_SCHEDULER_SWITCHES = {
    "native": {"use_karras_sigmas": False},
    "linear": {"use_karras_sigmas": False},
    "karras": {"use_karras_sigmas": True},
}


@dataclass
class Reference:
    """What one diffusers run gave."""

    text_ids: list[int]
    negative_text_ids: list[int]
    position_ids: list[Tensor] = field(default_factory=list)  # per forward pass, [3, text + video tokens]
    velocities: list[Tensor] = field(default_factory=list)  # per forward pass, before guidance
    latents: list[Tensor] = field(default_factory=list)  # per step
    frames: np.ndarray[Any, Any] | None = None  # uint8 [F, Y, X, 3]


class DiffusersPipeline:
    """diffusers' pipeline on one checkpoint, in fp32 on the CPU."""

    def __init__(self, checkpoint: Path) -> None:
        from diffusers import Cosmos3OmniPipeline

        self.pipeline = Cosmos3OmniPipeline.from_pretrained(
            checkpoint, enable_safety_checker=False, dtype=torch.float32
        )
        self.pipeline.set_progress_bar_config(disable=True)
        self._shipped_scheduler = self.pipeline.scheduler
        self._shipped_native = self.pipeline.config.use_native_flow_schedule

    def run(
        self, prompt: str, *, schedule: str | None = None, flow_shift: float | None = None, **arguments: Any
    ) -> Reference:
        """Run the pipeline; ``schedule`` None leaves the scheduler as shipped."""
        from diffusers import UniPCMultistepScheduler

        self.pipeline.scheduler = self._shipped_scheduler
        self.pipeline.register_to_config(use_native_flow_schedule=self._shipped_native)
        if schedule is not None:
            switches = {**_SCHEDULER_SWITCHES[schedule], **({"flow_shift": flow_shift} if flow_shift else {})}
            self.pipeline.scheduler = UniPCMultistepScheduler.from_config(self._shipped_scheduler.config, **switches)
            self.pipeline.register_to_config(use_native_flow_schedule=schedule == "native")

        shape = {key: arguments[key] for key in ("num_frames", "height", "width")}
        ids = self.pipeline.tokenize_prompt(
            prompt, arguments.get("negative_prompt"), **shape, fps=arguments.get("fps", 24.0)
        )
        reference = Reference(*ids)

        def on_forward(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            reference.position_ids.append(kwargs["position_ids"].clone())
            reference.velocities.append(output[0][0].clone())

        def on_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            reference.latents.append(tensors["latents"].clone())
            return {}

        hook = self.pipeline.transformer.register_forward_hook(on_forward, with_kwargs=True)
        try:
            output = self.pipeline(prompt, callback_on_step_end=on_step, output_type="pil", **arguments)
        finally:
            hook.remove()
        reference.frames = np.stack([np.asarray(frame) for frame in output.video])
        return reference


@pytest.fixture(scope="session")
def diffusers_pipeline() -> Callable[[Path], DiffusersPipeline]:
    """Checkpoint directory -> the reference pipeline, loaded once a session."""
    return cache(DiffusersPipeline)


def relative_l2(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|."""
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture(scope="session")
def relative_difference() -> Callable[[Tensor, Tensor], float]:
    return relative_l2
