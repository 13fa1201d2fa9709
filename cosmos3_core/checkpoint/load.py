"""Loads modules from a checkpoint: built without storage, checked against the files, then filled slice by slice."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from cosmos3_core.checkpoint.configs import AudioVAEConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.reader import ParameterPlan, load_parameters
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors, video_vae_tensors
from cosmos3_core.checkpoint.weight_files import WeightFiles, check_tensors
from cosmos3_core.device import prefers_channels_last
from cosmos3_core.errors import CapabilityError
from cosmos3_core.model.transformer import Cosmos3Transformer
from cosmos3_core.model.weights import find_unused_tensors, transformer_plans
from cosmos3_core.ops.registry import select_ops
from cosmos3_core.ops.video import select_video_ops
from cosmos3_core.parallel.sharding import WHOLE_MODEL, Shard, local_config
from cosmos3_core.vae.audio import AudioVAE
from cosmos3_core.vae.video import VideoVAE

# The encoder: a decode-only export may leave it out.
_VIDEO_ENCODER = ("encoder.*", "quant_conv.*")
_AUDIO_ENCODER = ("encoder.*",)


def check_weights(layout: CheckpointLayout) -> None:
    """Read the headers of every component's files and compare them with the configs; reads no tensor.

    Raises:
        CheckpointError: the files are missing or damaged, or tensors have another shape.
    """
    _transformer_files(layout)
    _video_vae_files(layout, with_encoder=True)
    if layout.audio is not None:
        _audio_vae_files(layout, layout.audio)


def _transformer_files(layout: CheckpointLayout) -> WeightFiles:
    files = WeightFiles.open(layout.component_dir("transformer"))
    # Unused, or of an unsupported modality: may be absent, and is never read.
    check_tensors(files, transformer_tensors(layout.transformer), optional=find_unused_tensors(layout.transformer))
    return files


def _video_vae_files(layout: CheckpointLayout, *, with_encoder: bool) -> WeightFiles:
    files = WeightFiles.open(layout.component_dir("vae"))
    check_tensors(files, video_vae_tensors(layout.vae), optional=() if with_encoder else _VIDEO_ENCODER)
    return files


def _audio_vae_files(layout: CheckpointLayout, config: AudioVAEConfig) -> WeightFiles:
    files = WeightFiles.open(layout.component_dir("sound_tokenizer"))
    # Sound is never an input: the encoder is not read, so it may have any shape.
    check_tensors(files, audio_vae_tensors(config, with_encoder=False), optional=_AUDIO_ENCODER)
    return files


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
    files = _transformer_files(layout)
    dtype = dtype if dtype is not None else files.dtype
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
    files = _video_vae_files(layout, with_encoder=with_encoder)
    with torch.device("meta"):
        vae = VideoVAE(layout.vae, with_encoder=with_encoder, ops=select_video_ops(device))
    plans = [ParameterPlan(name, (name,)) for name, _ in vae.named_parameters()]
    load_parameters(vae, files, plans, device=device, dtype=dtype if dtype is not None else files.dtype)
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
    files = _audio_vae_files(layout, layout.audio)
    with torch.device("meta"):
        vae = AudioVAE(layout.audio)
    plans = [ParameterPlan(name, (name,)) for name, _ in vae.named_parameters()]
    load_parameters(vae, files, plans, device=device, dtype=dtype if dtype is not None else files.dtype)
    return vae.eval()
