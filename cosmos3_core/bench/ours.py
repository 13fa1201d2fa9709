"""This project's side of a benchmark, one method a stage."""

from __future__ import annotations

import torch

from cosmos3_core.bench.subject import Subject, Work
from cosmos3_core.checkpoint.reader import replace_parameter
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import DenoisePlan, Denoiser
from cosmos3_core.device import prefers_channels_last
from cosmos3_core.model.transformer import Cosmos3Transformer
from cosmos3_core.model.weights import transformer_plans
from cosmos3_core.ops.registry import select_ops
from cosmos3_core.ops.video import select_video_ops
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.vae.video import VideoVAE


class Ours:
    """The transformer of a subject, and one request on it."""

    def __init__(self, subject: Subject, work: Work) -> None:
        self.subject, self.work = subject, work
        self.denoiser = Denoiser(_transformer(subject), subject.geometry, subject.scheduler)
        text_ids, negative_ids = work.token_ids(subject.transformer.vocab_size)
        self.request = DenoiseRequest(
            text_ids=tuple(text_ids.tolist()),
            negative_text_ids=tuple(negative_ids.tolist()),
            latent_shape=subject.latent_shape(work.clip),
            fps=24.0,
            num_inference_steps=1000,
            guidance_scale=6.0,
            schedule="native",
            flow_shift=10.0,
            seed=0,
        )
        self._plan: DenoisePlan | None = None
        self._state: DenoiseState | None = None

    def prefill(self) -> None:
        """Run both prompts through the understanding tower."""
        self.denoiser.forget_prompts()
        self._plan = self.denoiser.prepare(self.request)

    def start(self) -> None:
        """Begin a denoising loop; untimed."""
        if self._plan is None:
            self.prefill()
        assert self._plan is not None
        self._state = self.denoiser.start(self._plan)

    def step(self) -> None:
        """Run one guided step: both branches, guidance, solver."""
        assert self._plan is not None
        assert self._state is not None
        self._state = self.denoiser.step(self._plan, self._state)


def _transformer(subject: Subject) -> Cosmos3Transformer:
    with torch.device("meta"):
        module = Cosmos3Transformer(subject.transformer, select_ops(subject.device, subject.dtype))
    for plan in transformer_plans(subject.transformer):
        parts = [subject.tensors("transformer", name) for name in plan.sources]
        replace_parameter(module, plan.target, torch.cat(parts).to(torch.float32 if plan.is_fp32 else subject.dtype))
    return module


def video_vae(subject: Subject) -> VideoVAE:
    """Return the subject's video VAE as served."""
    with torch.device("meta"):
        module = VideoVAE(subject.vae, ops=select_video_ops(subject.device))
    for name, _ in list(module.named_parameters()):
        replace_parameter(module, name, subject.tensors("vae", name))
    if prefers_channels_last(subject.device):
        module.use_channels_last()
    return module
