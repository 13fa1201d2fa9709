"""Loads modules from a checkpoint: built without storage, checked against the files, then filled slice by slice."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cosmos3_core.checkpoint.components import audio_vae_files, transformer_files, video_vae_files
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.reader import TORCH_DTYPES, load_parameters
from cosmos3_core.checkpoint.tensors import ParameterPlan
from cosmos3_core.device import prefers_channels_last
from cosmos3_core.errors import CapabilityError
from cosmos3_core.model.transformer import Cosmos3Transformer
from cosmos3_core.model.weights import transformer_plans
from cosmos3_core.ops.registry import select_ops
from cosmos3_core.ops.video import select_video_ops
from cosmos3_core.parallel.sharding import WHOLE_MODEL, Shard, local_config
from cosmos3_core.vae.audio import AudioVAE
from cosmos3_core.vae.video import VideoVAE


def load_transformer(
    layout: CheckpointLayout,
    *,
    device: torch.device,
    dtype: torch.dtype | None = None,
    ops: Mapping[str, str] | None = None,
    shard: Shard = WHOLE_MODEL,
) -> Cosmos3Transformer:
    """Load the transformer, or one rank's share of it, on its device.

    Args:
        dtype: dtype of the towers; None keeps the stored one. The time embedder always is fp32.
        ops: operator -> implementation name, to override the choice for the device.
        shard: this rank's share of the heads and FFN columns.

    Raises:
        CheckpointError: the files are missing or damaged, or tensors have another shape.
        RequestError: the heads do not divide by the number of shards, or an operator or implementation is unknown.
    """
    files = transformer_files(layout)
    dtype = dtype if dtype is not None else TORCH_DTYPES[files.dtype]
    config = local_config(layout.transformer, shard.num_shards)
    with torch.device("meta"):
        transformer = Cosmos3Transformer(config, select_ops(device, dtype, ops))
    load_parameters(transformer, files, transformer_plans(config), device=device, dtype=dtype, shard=shard)
    return transformer.eval()


def load_video_vae(
    layout: CheckpointLayout, *, device: torch.device, dtype: torch.dtype | None = None, with_encoder: bool = True
) -> VideoVAE:
    """Load the video VAE on its device.

    Args:
        dtype: None keeps the stored one.
        with_encoder: False leaves the encoder out, for a replica that only decodes.

    Raises:
        CheckpointError: the files are missing or damaged, or tensors have another shape.
    """
    files = video_vae_files(layout, with_encoder=with_encoder)
    with torch.device("meta"):
        vae = VideoVAE(layout.vae, with_encoder=with_encoder, ops=select_video_ops(device))
    plans = [ParameterPlan(name, (name,)) for name, _ in vae.named_parameters()]
    load_parameters(vae, files, plans, device=device, dtype=dtype if dtype is not None else TORCH_DTYPES[files.dtype])
    if prefers_channels_last(device):
        vae.use_channels_last()
    return vae.eval()


def load_audio_vae(layout: CheckpointLayout, *, device: torch.device, dtype: torch.dtype | None = None) -> AudioVAE:
    """Load the audio VAE's decoder on its device; an encoder in the files is not read.

    Args:
        dtype: None keeps the stored one.

    Raises:
        CapabilityError: the checkpoint makes no sound.
        CheckpointError: the files are missing or damaged, or tensors have another shape.
    """
    if layout.audio is None:
        lacking = "sound_tokenizer/" if layout.transformer.sound_gen else "sound heads in the transformer"
        raise CapabilityError(
            "modality", "sound", "video", f"{layout.name} has no {lacking}; load a checkpoint that makes sound"
        )
    files = audio_vae_files(layout, layout.audio)
    with torch.device("meta"):
        vae = AudioVAE(layout.audio)
    plans = [ParameterPlan(name, (name,)) for name, _ in vae.named_parameters()]
    load_parameters(vae, files, plans, device=device, dtype=dtype if dtype is not None else TORCH_DTYPES[files.dtype])
    return vae.eval()
