"""The sources of each parameter of :class:`Cosmos3Transformer`: its name -> published tensor names.

Sources of one parameter are stacked along dim 0 (fused QKV, fused gate and up). :func:`find_unused_tensors` lists the
published tensors without a parameter: the loader accepts them in a file and does not read them. No torch here.
"""

from __future__ import annotations

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.tensors import ParameterPlan, transformer_tensors


def transformer_plans(config: TransformerConfig) -> list[ParameterPlan]:
    """Return one plan per parameter of the transformer built from ``config`` (or from its local share)."""
    plans = [
        ParameterPlan("understanding.embed.weight", ("embed_tokens.weight",)),
        ParameterPlan("generation.norm.weight", ("norm_moe_gen.weight",)),
        *(
            ParameterPlan(f"heads.video.{proj}.{kind}", (f"{proj}.{kind}",))
            for proj in ("proj_in", "proj_out")
            for kind in ("weight", "bias")
        ),
        *(
            ParameterPlan(f"time_embedder.{name}", (f"time_embedder.{name}",), is_fp32=True)
            for name in ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
        ),
    ]
    plans += _track_heads(config)
    for index in range(config.num_hidden_layers):
        is_last = index == config.num_hidden_layers - 1
        plans += _understanding_layer(config, index, keys_only=is_last)
        plans += _generation_layer(config, index)
    return plans


def find_unused_tensors(config: TransformerConfig) -> list[str]:
    """Return the published tensors that generation does not read.

    These are the language-model head, and the understanding tower after its last keys and values.
    """
    used = {source for plan in transformer_plans(config) for source in plan.sources}
    return [name for name in transformer_tensors(config) if name not in used]


def _track_heads(config: TransformerConfig) -> list[ParameterPlan]:
    """Return the plans of the sound and action heads that the checkpoint has."""
    plans = []
    if config.sound_gen:
        plans.append(ParameterPlan("heads.sound.modality_embed", ("audio_modality_embed",)))
        for proj in ("proj_in", "proj_out"):
            for kind in ("weight", "bias"):
                plans.append(ParameterPlan(f"heads.sound.{proj}.{kind}", (f"audio_{proj}.{kind}",)))
    if config.action_gen:
        plans.append(ParameterPlan("heads.action.modality_embed", ("action_modality_embed",)))
        for proj in ("proj_in", "proj_out"):
            plans.append(ParameterPlan(f"heads.action.{proj}.weight", (f"action_{proj}.fc.weight",)))
            plans.append(ParameterPlan(f"heads.action.{proj}.bias", (f"action_{proj}.bias.weight",)))
    return plans


def _understanding_layer(config: TransformerConfig, index: int, *, keys_only: bool) -> list[ParameterPlan]:
    here, there = f"understanding.layers.{index}", f"layers.{index}"
    attention = f"{there}.self_attn"
    projections = ("to_k", "to_v") if keys_only else ("to_q", "to_k", "to_v")
    plans = [
        ParameterPlan(f"{here}.input_norm.weight", (f"{there}.input_layernorm.weight",)),
        *_linear(config, f"{here}.qkv.proj", [f"{attention}.{name}" for name in projections]),
    ]
    if config.qk_norm_for_text:
        plans.append(ParameterPlan(f"{here}.k_norm.weight", (f"{attention}.norm_k.weight",)))
        if not keys_only:
            plans.append(ParameterPlan(f"{here}.q_norm.weight", (f"{attention}.norm_q.weight",)))
    elif config.use_und_k_norm_for_gen:
        source = f"{attention}.k_norm_und_for_gen.weight"
        plans.append(ParameterPlan(f"{here}.k_norm_for_generation.weight", (source,)))
    if not keys_only:
        plans += _linear(config, f"{here}.out", [f"{attention}.to_out"])
        plans.append(ParameterPlan(f"{here}.post_norm.weight", (f"{there}.post_attention_layernorm.weight",)))
        plans += _mlp(config, f"{here}.mlp", f"{there}.mlp")
    return plans


def _generation_layer(config: TransformerConfig, index: int) -> list[ParameterPlan]:
    here, there = f"generation.layers.{index}", f"layers.{index}"
    attention = f"{there}.self_attn"
    return [
        ParameterPlan(f"{here}.input_norm.weight", (f"{there}.input_layernorm_moe_gen.weight",)),
        *_linear(config, f"{here}.qkv.proj", [f"{attention}.add_{name}_proj" for name in "qkv"]),
        ParameterPlan(f"{here}.q_norm.weight", (f"{attention}.norm_added_q.weight",)),
        ParameterPlan(f"{here}.k_norm.weight", (f"{attention}.norm_added_k.weight",)),
        *_linear(config, f"{here}.out", [f"{attention}.to_add_out"]),
        ParameterPlan(f"{here}.post_norm.weight", (f"{there}.post_attention_layernorm_moe_gen.weight",)),
        *_mlp(config, f"{here}.mlp", f"{there}.mlp_moe_gen"),
    ]


def _linear(config: TransformerConfig, here: str, there: list[str]) -> list[ParameterPlan]:
    """Return an attention projection; only these may have biases, by the config."""
    kinds = ("weight", "bias") if config.attention_bias else ("weight",)
    return [ParameterPlan(f"{here}.{kind}", tuple(f"{source}.{kind}" for source in there)) for kind in kinds]


def _mlp(config: TransformerConfig, here: str, there: str) -> list[ParameterPlan]:
    inner = ("gate_proj", "up_proj") if config.hidden_act == "silu" else ("up_proj",)
    return [
        ParameterPlan(f"{here}.up.weight", tuple(f"{there}.{name}.weight" for name in inner)),
        ParameterPlan(f"{here}.down.weight", (f"{there}.down_proj.weight",)),
    ]
