"""The tensor tables against diffusers' modules, built on the meta device."""

from __future__ import annotations

import dataclasses
import inspect
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer, Cosmos3OmniTransformer

from cosmos3_core.checkpoint.configs import AudioVAEConfig, TransformerConfig, VideoVAEConfig
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors, video_vae_tensors

NANO = TransformerConfig(action_gen=True, sound_gen=True)
SUPER = dataclasses.replace(
    NANO, hidden_size=5120, num_hidden_layers=64, num_attention_heads=64, intermediate_size=25600
)
EDGE = TransformerConfig(
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
)
ODD_TRANSFORMERS = {
    "biases": dataclasses.replace(NANO, num_hidden_layers=1, attention_bias=True),
    "relu2 with text norm": dataclasses.replace(EDGE, num_hidden_layers=1, qk_norm_for_text=True),
    "silu with key norm": dataclasses.replace(EDGE, num_hidden_layers=1, hidden_act="silu"),
    "no norms at all": dataclasses.replace(EDGE, num_hidden_layers=1, use_und_k_norm_for_gen=False),
    "no sound, no action": TransformerConfig(num_hidden_layers=2),
    "narrow heads": dataclasses.replace(NANO, num_hidden_layers=1, action_dim=7, sound_dim=5, num_embodiment_domains=3),
}
WAN = VideoVAEConfig(latents_mean=(0.0,) * 48, latents_std=(1.0,) * 48)


def shapes_of(module_class: Any, config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of diffusers' module for the same config."""
    known = inspect.signature(module_class.__init__).parameters  # our configs know a few keys that no weight depends on
    keys = {name: value for name, value in dataclasses.asdict(config).items() if name in known}
    arguments = {name: list(value) if isinstance(value, tuple) else value for name, value in keys.items()}
    with torch.device("meta"):
        module = module_class(**arguments)
    return {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}


def num_parameters(tensors: dict[str, tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in tensors.values())


@pytest.mark.parametrize(
    ("config", "num_tensors", "billions"),
    [(NANO, 814, 15.174), (SUPER, 1430, 64.020), (EDGE, 549, 3.370)],
    ids=["nano", "super", "edge"],
)
def test_transformer_equals_diffusers(config: TransformerConfig, num_tensors: int, billions: float) -> None:
    tensors = transformer_tensors(config)
    assert len(tensors) == num_tensors
    assert num_parameters(tensors) / 1e9 == pytest.approx(billions, abs=6e-4)
    assert tensors == shapes_of(Cosmos3OmniTransformer, config)


@pytest.mark.parametrize("name", ODD_TRANSFORMERS)
def test_transformer_variants_equal_diffusers(name: str) -> None:
    config = ODD_TRANSFORMERS[name]
    assert transformer_tensors(config) == shapes_of(Cosmos3OmniTransformer, config)


def test_super_queries_are_wider_than_its_hidden_state() -> None:
    tensors = transformer_tensors(SUPER)
    assert tensors["layers.63.self_attn.to_q.weight"] == (8192, 5120)
    assert tensors["layers.63.self_attn.to_add_out.weight"] == (5120, 8192)


def test_action_rows_are_in_by_out() -> None:
    tensors = transformer_tensors(ODD_TRANSFORMERS["narrow heads"])
    assert tensors["action_proj_in.fc.weight"] == (3, 7 * 4096)
    assert tensors["action_proj_out.bias.weight"] == (3, 7)


def test_video_vae_equals_diffusers() -> None:
    tensors = video_vae_tensors(WAN)
    assert len(tensors) == 196
    assert num_parameters(tensors) / 1e6 == pytest.approx(704.7, abs=0.05)
    assert tensors == shapes_of(AutoencoderKLWan, WAN)


def test_other_video_vae_depths_equal_diffusers() -> None:
    config = dataclasses.replace(
        WAN, base_dim=8, decoder_base_dim=12, dim_mult=(1, 4, 2), num_res_blocks=1, temperal_downsample=(True, False)
    )
    assert video_vae_tensors(config) == shapes_of(AutoencoderKLWan, config)


def test_audio_vae_equals_diffusers() -> None:
    tensors = audio_vae_tensors(AudioVAEConfig())
    assert len(tensors) == 249
    assert num_parameters(tensors) / 1e6 == pytest.approx(496.3, abs=0.05)
    assert tensors == shapes_of(Cosmos3AVAEAudioTokenizer, AudioVAEConfig())


def test_other_audio_vaes_equal_diffusers() -> None:
    encoder: dict[str, Any] = {
        "enc_dim": 6,
        "enc_num_blocks": 1,
        "enc_n_fft": 16,
        "enc_c_mults": (1, 3),
        "enc_strides": (2, 3),
    }
    decoder: dict[str, Any] = {"dec_dim": 4, "dec_c_mults": (2, 3), "dec_strides": (3, 2), "vocoder_input_dim": 5}
    config = AudioVAEConfig(stereo=False, enc_latent_dim=10, **encoder, **decoder)
    assert audio_vae_tensors(config) == shapes_of(Cosmos3AVAEAudioTokenizer, config)


def test_audio_decoder_alone() -> None:
    whole, decoder = audio_vae_tensors(AudioVAEConfig()), audio_vae_tensors(AudioVAEConfig(), with_encoder=False)
    assert decoder == {name: shape for name, shape in whole.items() if name.startswith("decoder.")}
    assert num_parameters(decoder) / 1e6 == pytest.approx(473.1, abs=0.05)


def test_tables_need_no_torch() -> None:
    program = "import sys; import cosmos3_core.checkpoint.tensors; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
