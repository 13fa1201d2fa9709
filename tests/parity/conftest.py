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


# What diffusers calls the latents of each modality.
_NAMES = {"video": "latents", "sound": "sound_latents", "action": "action_latents"}
_INPUTS = {"video": "vision_tokens", "sound": "sound_tokens", "action": "action_tokens"}


@dataclass
class Reference:
    """What one diffusers run gave."""

    text_ids: list[int] = field(default_factory=list)
    negative_text_ids: list[int] = field(default_factory=list)
    position_ids: list[Tensor] = field(default_factory=list)  # per forward pass, [3, all tokens]
    initial: dict[str, Tensor] = field(default_factory=dict)  # modality -> what the first forward pass got
    velocities: list[Tensor] = field(default_factory=list)  # of the video, per forward pass, before guidance
    steps: list[dict[str, Tensor]] = field(default_factory=list)  # per step: modality -> latents
    frames: np.ndarray[Any, Any] | None = None  # uint8 [F, Y, X, 3]
    sound: Tensor | None = None  # [channels, samples]
    action: Tensor | None = None  # [steps, width]; where actions are generated

    @property
    def latents(self) -> list[Tensor]:
        """The video's, per step."""
        return [step["video"] for step in self.steps]


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

        reference = Reference()
        tokenize = self.pipeline.tokenize_prompt

        def on_tokenize(*args: Any, **kwargs: Any) -> tuple[list[int], list[int]]:
            reference.text_ids, reference.negative_text_ids = tokenize(*args, **kwargs)
            return reference.text_ids, reference.negative_text_ids

        def on_forward(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not reference.position_ids:
                given = {name: kwargs.get(key) for name, key in _INPUTS.items()}
                reference.initial = {name: tokens[0].clone() for name, tokens in given.items() if tokens is not None}
            reference.position_ids.append(kwargs["position_ids"].clone())
            reference.velocities.append(output[0][0].clone())

        def on_step(pipeline: Any, index: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            given = {name: tensors[key] for name, key in _NAMES.items()}
            reference.steps.append({name: latents.clone() for name, latents in given.items() if latents is not None})
            return {}

        hook = self.pipeline.transformer.register_forward_hook(on_forward, with_kwargs=True)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(self.pipeline, "tokenize_prompt", on_tokenize)
                # It surfaces the video's alone unless told otherwise.
                patch.setattr(self.pipeline, "_callback_tensor_inputs", list(_NAMES.values()))
                output = self.pipeline(
                    prompt,
                    callback_on_step_end=on_step,
                    callback_on_step_end_tensor_inputs=list(_NAMES.values()),
                    output_type="pil",
                    **arguments,
                )
        finally:
            hook.remove()
        reference.frames = np.stack([np.asarray(frame) for frame in output.video])
        reference.sound = output.sound
        reference.action = None if output.action is None else output.action[0]
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
