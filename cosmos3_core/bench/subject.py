"""The subject of a benchmark: a model's configs, the source of its tensors, and the shape of the work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from cosmos3_core import checks
from cosmos3_core.bench.flags import BenchModel
from cosmos3_core.bench.random_models import RANDOM_MODELS
from cosmos3_core.checkpoint.configs import SchedulerConfig, TransformerConfig, VideoVAEConfig, geometry
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.random_weights import random_tensors
from cosmos3_core.checkpoint.reader import TORCH_DTYPES
from cosmos3_core.checkpoint.tensors import transformer_tensors, video_vae_tensors
from cosmos3_core.checkpoint.weight_files import WeightFiles
from cosmos3_core.device import DTYPES
from cosmos3_core.shapes import Geometry, LatentShape

CLOSING_IDS = (1, 2)
"""Stand-ins for the end of turn and the token that opens the generated part."""


@dataclass(frozen=True)
class Clip:
    """The clip to decode.

    Attributes:
        num_frames, height, width: pixel frames, rows, columns.
        chunk_latents: latent frames per decoded chunk.
    """

    num_frames: int
    height: int
    width: int
    chunk_latents: int


@dataclass(frozen=True)
class Work:
    """The shape of a request.

    Attributes:
        clip: its result.
        text_tokens, negative_tokens: prompt lengths; real ones are some 1,550 and 3,300 tokens on Nano.
    """

    clip: Clip
    text_tokens: int
    negative_tokens: int

    def token_ids(self, vocab_size: int) -> tuple[Tensor, Tensor]:
        """Return arbitrary ids [L] of the two prompts, which end with ``CLOSING_IDS`` as in diffusers."""
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
        name: name in the report.
        transformer, vae, scheduler: its configs.
        tensors: (component "transformer" or "vae", published name) -> the tensor on the device, in ``dtype``; made or
            read at each call, so that a large model never exists twice.
        device, dtype: device and dtype of the model.
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

    def latent_shape(self, clip: Clip) -> LatentShape:
        """Return the latent grid of a clip."""
        return self.geometry.latent_shape(clip.num_frames, clip.height, clip.width)

    def latents(self, clip: Clip) -> Tensor:
        """Return random latents [1, C, T, H, W] of a clip, fp32; every call returns the same."""
        shape = (1, self.geometry.channels, *self.latent_shape(clip))
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self.device)


def open_subject(model: BenchModel, device: torch.device) -> Subject:
    """Open the chosen model on a device.

    Raises:
        RequestError: the dtype or model is unknown.
        CheckpointError: the checkpoint cannot be used.
    """
    dtype = None if model.dtype is None else DTYPES[checks.choice("dtype", model.dtype, tuple(DTYPES))]
    if model.checkpoint is not None:
        return checkpoint_subject(model.checkpoint, device, dtype)
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    return random_subject(str(model.random_weights), device, dtype or default)


def random_subject(model: str, device: torch.device, dtype: torch.dtype) -> Subject:
    """Return a model of a published size with random weights from the device; every call returns the same.

    Raises:
        RequestError: the model is not one of ``RANDOM_MODELS``.
    """
    transformer, vae = RANDOM_MODELS[checks.choice("random_weights", model, tuple(RANDOM_MODELS))]
    shapes = {"transformer": transformer_tensors(transformer), "vae": video_vae_tensors(vae)}

    def tensors(component: str, name: str) -> Tensor:
        ((_, tensor),) = random_tensors({name: shapes[component][name]}, 0, device=device, dtype=dtype)
        return tensor

    return Subject(f"{model}, random weights", transformer, vae, SchedulerConfig(), tensors, device, dtype)


def checkpoint_subject(directory: Path, device: torch.device, dtype: torch.dtype | None) -> Subject:
    """Return the model of a checkpoint; ``dtype`` None keeps the stored one.

    Raises:
        CheckpointError: the checkpoint cannot be used.
    """
    layout = CheckpointLayout.open(directory)
    files = {name: WeightFiles.open(layout.component_dir(name)) for name in ("transformer", "vae")}
    kept = dtype if dtype is not None else TORCH_DTYPES[files["transformer"].dtype]

    def tensors(component: str, name: str) -> Tensor:
        entry = files[component].tensors[name]
        with safe_open(entry.path, framework="pt") as file:
            return file.get_tensor(entry.stored_name).to(device, kept)

    return Subject(layout.name, layout.transformer, layout.vae, layout.scheduler, tensors, device, kept)
