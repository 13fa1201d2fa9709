"""Models of the published sizes, for random weights. No torch here."""

from __future__ import annotations

from dataclasses import replace

from cosmos3_core.checkpoint.configs import TransformerConfig, VideoVAEConfig

_NANO = TransformerConfig(action_gen=True, sound_gen=True)
_VAE = VideoVAEConfig(latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)

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
"""Name -> configs of its transformer and VAE; tiny has Nano's shape at a laptop's scale."""
