"""The alias table: every known other name, and no published one."""

from __future__ import annotations

import pytest

from cosmos3_core.checkpoint.aliases import find_published_name
from cosmos3_core.checkpoint.configs import AudioVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors, video_vae_tensors


@pytest.mark.parametrize(
    ("stored", "published"),
    [
        ("model.embed_tokens.weight", "embed_tokens.weight"),
        ("model.net.language_model.model.norm.weight", "norm.weight"),
        ("transformer.vae2llm.weight", "proj_in.weight"),
        ("llm2vae.bias", "proj_out.bias"),
        ("action2llm.fc.weight", "action_proj_in.fc.weight"),
        ("llm2action.bias.weight", "action_proj_out.bias.weight"),
        ("action_modality_embed.weight", "action_modality_embed"),
        ("sound2llm.weight", "audio_proj_in.weight"),
        ("llm2sound.bias", "audio_proj_out.bias"),
        ("sound_modality_embed", "audio_modality_embed"),
        ("sound_modality_embed.weight", "audio_modality_embed"),
        ("audio_modality_embed.weight", "audio_modality_embed"),
        ("time_embedder.mlp.0.weight", "time_embedder.linear_1.weight"),
        ("time_embedder.mlp.2.bias", "time_embedder.linear_2.bias"),
        ("model.layers.3.self_attn.q_proj.weight", "layers.3.self_attn.to_q.weight"),
        ("layers.3.self_attn.v_proj.bias", "layers.3.self_attn.to_v.bias"),
        ("layers.3.self_attn.o_proj.weight", "layers.3.self_attn.to_out.weight"),
        ("layers.3.self_attn.k_norm.weight", "layers.3.self_attn.norm_k.weight"),
        ("layers.3.self_attn.k_proj_moe_gen.weight", "layers.3.self_attn.add_k_proj.weight"),
        ("layers.3.self_attn.o_proj_moe_gen.weight", "layers.3.self_attn.to_add_out.weight"),
        ("layers.3.self_attn.q_norm_moe_gen.weight", "layers.3.self_attn.norm_added_q.weight"),
        ("layers.3.self_attn.k_norm_und_for_gen.weight", "layers.3.self_attn.k_norm_und_for_gen.weight"),
        ("model.layers.3.mlp_moe_gen.up_proj.weight", "layers.3.mlp_moe_gen.up_proj.weight"),
        ("action_pos_embed.pos_embed", None),
    ],
)
def test_aliases_have_their_published_names(stored: str, published: str | None) -> None:
    assert find_published_name(stored) == published


def test_published_names_are_left_alone() -> None:
    """This holds for all components: the VAEs' files pass through the same table."""
    transformer = TransformerConfig(num_hidden_layers=2, action_gen=True, sound_gen=True, attention_bias=True)
    edge = TransformerConfig(num_hidden_layers=2, qk_norm_for_text=False, use_und_k_norm_for_gen=True)
    for table in (
        transformer_tensors(transformer),
        transformer_tensors(edge),
        video_vae_tensors(VideoVAEConfig()),
        audio_vae_tensors(AudioVAEConfig()),
    ):
        assert [find_published_name(name) for name in table] == list(table)
