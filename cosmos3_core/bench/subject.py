"""What is measured: a model's configs, where its tensors come from, and the shape of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cosmos3_core.checkpoint.configs import SchedulerConfig, TransformerConfig, VideoVAEConfig, geometry
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.random_weights import random_tensors
from cosmos3_core.checkpoint.tensors import transformer_tensors, video_vae_tensors
from cosmos3_core.checkpoint.weight_files import WeightFiles
from cosmos3_core.errors import RequestError
from cosmos3_core.shapes import Geometry, LatentShape

_NANO = TransformerConfig(action_gen=True, sound_gen=True)
_VAE = VideoVAEConfig(latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)

CLOSING_IDS = (1, 2)
"""Stand in for the end of turn and the token that opens the generated part."""

# The published sizes; tiny is Nano's shape at a laptop's scale.
RANDOM_MODELS: dict[str, tuple[TransformerConfig, VideoVAEConfig]] = {
    "tiny": (
        replace(
            _NANO,
            hidden_size=256,
            num_hidden_layers=4,
            num_attention_heads=8,
            num_key_value_heads=4,
            head_dim=32,
            intermediate_size=768,
            rope_axes_dim=(6, 5, 5),
            vocab_size=4096,
        ),
        replace(_VAE, base_dim=16, decoder_base_dim=16),
    ),
    "nano": (_NANO, _VAE),
    "super": (
        replace(_NANO, hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600),
        _VAE,
    ),
    "edge": (
        TransformerConfig(
            hidden_size=2048,
            num_hidden_layers=28,
            num_attention_heads=16,
            intermediate_size=9216,
            hidden_act="relu2",
            rms_norm_eps=1e-5,
            rope_theta=1e8,
            vocab_size=131072,
            qk_norm_for_text=False,
            use_und_k_norm_for_gen=True,
            action_gen=True,
        ),
        _VAE,
    ),
}


@dataclass(frozen=True)
class Work:
    """The shape of the work.

    Attributes:
        num_frames, height, width: pixels of the clip.
        text_tokens, negative_tokens: prompt lengths; real ones are some 1,550 and 3,300 tokens on Nano.
        runs: counted runs of each stage.
        chunk_latents: latent frames per decoded chunk.
    """

    num_frames: int
    height: int
    width: int
    text_tokens: int
    negative_tokens: int
    runs: int
    chunk_latents: int

    def token_ids(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Arbitrary ids [L] of the two prompts; the last two are ``CLOSING_IDS``, as diffusers appends them itself."""
        generator = torch.Generator().manual_seed(0)
        closing = torch.tensor(CLOSING_IDS)
        text, negative = (
            torch.cat((torch.randint(vocab_size, (count - len(CLOSING_IDS),), generator=generator), closing))
            for count in (self.text_tokens, self.negative_tokens)
        )
        return text, negative


@dataclass(frozen=True)
class Subject:
    """One model on one device.

    Attributes:
        name: for the report.
        transformer, vae, scheduler: its configs.
        tensors: component ("transformer" or "vae"), published name -> the tensor on the device, in ``dtype``; made or
            read anew at each call, so that two copies of a large model never exist for the sake of one.
        device, dtype: where and in what it runs.
    """

    name: str
    transformer: TransformerConfig
    vae: VideoVAEConfig
    scheduler: SchedulerConfig
    tensors: Callable[[str, str], Tensor]
    device: torch.device
    dtype: torch.dtype

    @property
    def geometry(self) -> Geometry:
        return geometry(self.transformer, self.vae)

    def latent_shape(self, work: Work) -> LatentShape:
        """Latent grid of the work."""
        return self.geometry.latent_shape(work.num_frames, work.height, work.width)


def random_subject(model: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """A model of a published size with random weights made on the device; the same for every call.

    Raises:
        RequestError: not one of ``RANDOM_MODELS``.
    """
    if model not in RANDOM_MODELS:
        raise RequestError("random_weights", model, f"one of {list(RANDOM_MODELS)}")
    transformer, vae = RANDOM_MODELS[model]
    shapes = {"transformer": transformer_tensors(transformer), "vae": video_vae_tensors(vae)}

    def tensors(component: str, name: str) -> Tensor:
        ((_, tensor),) = random_tensors({name: shapes[component][name]}, 0, device=device, dtype=dtype)
        return tensor

    return Subject(f"{model}, random weights", transformer, vae, SchedulerConfig(), tensors, device, dtype)


def checkpoint_subject(directory: Path, device: torch.device, dtype: torch.dtype | None) -> Subject:
    """The model of a checkpoint; ``dtype`` None keeps the stored one.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    layout = CheckpointLayout.open(directory)
    files = {name: WeightFiles.open(layout.component_dir(name)) for name in ("transformer", "vae")}
    kept = dtype if dtype is not None else files["transformer"].dtype

    def tensors(component: str, name: str) -> Tensor:
        entry = files[component].tensors[name]
        with safe_open(entry.path, framework="pt") as file:
            return file.get_tensor(entry.stored_name).to(device, kept)

    return Subject(layout.name, layout.transformer, layout.vae, layout.scheduler, tensors, device, kept)
