"""The weight files of each component of a checkpoint, their headers checked against the configs. No torch here."""

from __future__ import annotations

from cosmos3_core.checkpoint.configs import AudioVAEConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors, video_vae_tensors
from cosmos3_core.checkpoint.weight_files import WeightFiles, check_tensors
from cosmos3_core.model.weights import find_unused_tensors

# The encoder: a decode-only export may leave it out.
_VIDEO_ENCODER = ("encoder.*", "quant_conv.*")
_AUDIO_ENCODER = ("encoder.*",)


def check_weights(layout: CheckpointLayout) -> None:
    """Read the headers of every component's files and compare them with the configs; reads no tensor.

    Raises:
        CheckpointError: the files are missing or damaged, or tensors have another shape.
    """
    transformer_files(layout)
    video_vae_files(layout, with_encoder=True)
    if layout.audio is not None:
        audio_vae_files(layout, layout.audio)


def transformer_files(layout: CheckpointLayout) -> WeightFiles:
    """Open ``transformer/``; raise as :func:`check_weights`."""
    files = WeightFiles.open(layout.component_dir("transformer"))
    # Unused, or of an unsupported modality: may be absent, and is never read.
    check_tensors(files, transformer_tensors(layout.transformer), optional=find_unused_tensors(layout.transformer))
    return files


def video_vae_files(layout: CheckpointLayout, *, with_encoder: bool) -> WeightFiles:
    """Open ``vae/``, of which the encoder may be missing unless it is asked for; raise as :func:`check_weights`."""
    files = WeightFiles.open(layout.component_dir("vae"))
    check_tensors(files, video_vae_tensors(layout.vae), optional=() if with_encoder else _VIDEO_ENCODER)
    return files


def audio_vae_files(layout: CheckpointLayout, config: AudioVAEConfig) -> WeightFiles:
    """Open ``sound_tokenizer/``; raise as :func:`check_weights`."""
    files = WeightFiles.open(layout.component_dir("sound_tokenizer"))
    # Sound is never an input: the encoder is not read, so it may have any shape.
    check_tensors(files, audio_vae_tensors(config, with_encoder=False), optional=_AUDIO_ENCODER)
    return files
