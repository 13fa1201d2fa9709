"""Configs of each variant's tiny checkpoint, and the JSON files that publish them.

The keys are those of nvidia/Cosmos3-Nano, -Super and -Edge, including those that no code reads. Widths and depths are
small. In Nano and Super no two widths of a layer are equal, so that a mix-up cannot pass; in Edge, as in the published
one, the queries are as wide as the hidden state.
"""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass
from typing import Any, TypeVar

from cosmos3_core.checkpoint.configs import AudioVAEConfig, SchedulerConfig, TransformerConfig, VideoVAEConfig

_Config = TypeVar("_Config", TransformerConfig, VideoVAEConfig, AudioVAEConfig, SchedulerConfig)


@dataclass(frozen=True)
class TinyVariant:
    """One published variant, made small.

    Attributes:
        transformer: config of both towers, small.
        transformer_keys: further keys of its ``transformer/config.json``.
        scheduler: the noise schedule that it ships.
        pipeline_class: ``_class_name`` in ``model_index.json``.
        pipeline_keys: settings in ``model_index.json``.
        tokenizer_class: the tokenizer's class in ``model_index.json``.
        negative_prompt: content of ``assets/negative_prompt.json``; None without the file.
    """

    transformer: TransformerConfig
    transformer_keys: dict[str, Any]
    scheduler: SchedulerConfig
    pipeline_class: str
    pipeline_keys: dict[str, Any]
    tokenizer_class: str
    negative_prompt: dict[str, str] | None = None


_COMMON = TransformerConfig(
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=16,
    # Proportions of the published 24, 20, 20: rows and columns take every third slot each, the last ones fall to time.
    rope_axes_dim=(4, 2, 2),
    vocab_size=512,
    action_gen=True,
)

_QWEN3_KEYS: dict[str, Any] = {
    "freeze_und": False,
    "initializer_range": 0.02,
    "joint_attn_implementation": "two_way",
    "max_action_dim": 64,
    "model_type": "qwen3_vl_text",
    "position_embedding_type": "unified_3d_mrope",
    "qk_norm": False,
    "qk_norm_for_diffusion": True,
    "rope_scaling": {"mrope_interleaved": True, "mrope_section": [4, 2, 2], "rope_type": "default"},
    "temporal_compression_factor_sound": 1,
    "use_cache": True,
    "use_moe": True,
    "video_temporal_causal": False,
}

_NANO = TinyVariant(
    transformer=dataclasses.replace(
        _COMMON, hidden_size=96, intermediate_size=192, num_hidden_layers=2, sound_gen=True
    ),
    transformer_keys=_QWEN3_KEYS,
    scheduler=SchedulerConfig(use_karras_sigmas=True),
    pipeline_class="Cosmos3OmniDiffusersPipeline",
    pipeline_keys={},
    tokenizer_class="Qwen2TokenizerFast",
)

_SUPER = dataclasses.replace(
    _NANO,
    # As in the real one the queries (8 x 16) are 1.6 times as wide as the hidden state.
    transformer=dataclasses.replace(
        _COMMON, hidden_size=80, intermediate_size=160, num_hidden_layers=3, sound_gen=True
    ),
)

_EDGE = TinyVariant(
    transformer=dataclasses.replace(
        _COMMON,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=2,
        hidden_act="relu2",
        rms_norm_eps=1e-5,
        rope_theta=1e8,
        qk_norm_for_text=False,
        use_und_k_norm_for_gen=True,
    ),
    transformer_keys={
        "backbone_type": "cosmos3_edge_nemotron_dense",
        "rope_axes_dim": [4, 2, 2],
        "rope_scaling": {"mrope_section": [4, 2, 2]},
        "temporal_compression_factor": 4,
        "use_und_k_norm_for_gen": True,
    },
    scheduler=SchedulerConfig(flow_shift=3.0),
    pipeline_class="Cosmos3OmniPipeline",
    pipeline_keys={"default_use_system_prompt": False, "native_flow_shift": 3.0, "use_native_flow_schedule": True},
    tokenizer_class="PreTrainedTokenizerFast",
    negative_prompt={
        "quality": "blurry, noisy, overexposed, with visible compression artifacts",
        "motion": "frozen, or jumping from frame to frame",
        "subject": "deformed hands and faces, objects that melt into each other",
    },
)

TINY_VARIANTS = {"nano": _NANO, "super": _SUPER, "edge": _EDGE}

TINY_AUDIO_VAE = AudioVAEConfig(enc_dim=4, dec_dim=4)


def tiny_video_vae(seed: int) -> VideoVAEConfig:
    """Return a narrow Wan 2.2 VAE. The statistics of its latents come with the weights and so depend on the seed."""
    draw = random.Random(f"{seed}/latent statistics")
    return VideoVAEConfig(
        base_dim=4,
        decoder_base_dim=8,
        latents_mean=tuple(round(draw.uniform(-0.5, 0.5), 4) for _ in range(48)),
        latents_std=tuple(round(draw.uniform(0.3, 0.6), 4) for _ in range(48)),
    )


# --- the JSON files --------------------------------------------------------------------------------------------------


def model_index_json(variant: TinyVariant) -> dict[str, Any]:
    """Return ``model_index.json``: the class that reads each folder."""
    has_sound = variant.transformer.sound_gen
    return {
        "_class_name": variant.pipeline_class,
        "_diffusers_version": "0.37.1",
        **variant.pipeline_keys,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"] if has_sound else [None, None],
        "text_tokenizer": ["transformers", variant.tokenizer_class],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "vision_encoder": ["transformers", "Qwen3VLVisionModel"],
    }


def transformer_json(variant: TinyVariant, dtype: str) -> dict[str, Any]:
    """Return ``transformer/config.json``."""
    config = variant.transformer
    keys = _publish(config, "Cosmos3OmniTransformer") | {
        "attention_dropout": 0.0,
        "dtype": dtype,
        "sound_dim": config.sound_dim if config.sound_gen else None,
    }
    # Each variant states the split of its rotary slots in keys of its own; only Edge has the second key norm.
    for name in ("rope_axes_dim", "use_und_k_norm_for_gen"):
        del keys[name]
    return keys | variant.transformer_keys


def video_vae_json(config: VideoVAEConfig) -> dict[str, Any]:
    """Return ``vae/config.json``."""
    return _publish(config, "AutoencoderKLWan") | {"clip_output": False, "dropout": 0.0}


def audio_vae_json(config: AudioVAEConfig) -> dict[str, Any]:
    """Return ``sound_tokenizer/config.json``. Everything but the sizes is fixed by the architecture."""
    return _publish(config, "Cosmos3AVAEAudioTokenizer") | {
        "activation": "snakebeta",
        "anti_aliasing": False,
        "bottleneck": {"type": "vae"},
        "bottleneck_type": "vae",
        "causal": False,
        "dec_anti_aliasing": False,
        "dec_final_tanh": False,
        "dec_type": "oobleck",
        "dec_use_nearest_upsample": False,
        "dec_use_snake": True,
        "dec_use_tanh_at_final": False,
        "enc_identity_init": False,
        "enc_intermediate_dim": 768,
        "enc_num_layers": 12,
        "enc_type": "spec_convnext",
        "enc_use_snake": True,
        "latent_mean": None,
        "latent_std": None,
        "model_type": "autoencoder_v2",
        "normalize_volume": True,
        "padding_mode": "zeros",
        "snake_logscale": True,
        "use_cuda_kernel": False,
        "use_wav_as_input": True,
    }


def scheduler_json(config: SchedulerConfig) -> dict[str, Any]:
    """Return ``scheduler/scheduler_config.json``."""
    return _publish(config, "UniPCMultistepScheduler") | {
        "disable_corrector": [],
        "final_sigmas_type": "zero",
        "lower_order_final": True,
        "predict_x0": True,
        "thresholding": False,
        "timestep_spacing": "linspace",
    }


VISION_ENCODER_JSON: dict[str, Any] = {
    # The reasoner's vision encoder. Generation never loads it, so no weights lie beside this file.
    "architectures": ["Qwen3VLVisionModel"],
    "depth": 2,
    "hidden_size": 32,
    "model_type": "qwen3_vl",
    "num_heads": 4,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}


def _publish(config: _Config, class_name: str) -> dict[str, Any]:
    """Return a config as in its file: tuples as lists, whole numbers without a decimal point."""
    shown: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.37.1"}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, tuple):
            value = list(value)
        elif isinstance(value, float) and value.is_integer():
            value = int(value)
        shown[name] = value
    return shown
