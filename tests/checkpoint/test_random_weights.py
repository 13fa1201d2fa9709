"""Random weights: reproducible, independent of each other, and scaled by the kind of tensor."""

from __future__ import annotations

import math

import pytest
import torch

from cosmos3_core.checkpoint.configs import AudioVAEConfig, TransformerConfig
from cosmos3_core.checkpoint.random_weights import random_tensors
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors

SMALL = transformer_tensors(
    TransformerConfig(hidden_size=48, num_hidden_layers=1, intermediate_size=96, vocab_size=128, action_gen=True)
)


def test_the_same_seed_gives_the_same_tensors_and_another_seed_others() -> None:
    first, again, other = (dict(random_tensors(SMALL, seed)) for seed in (3, 3, 4))
    assert list(first) == list(SMALL)
    for name, shape in SMALL.items():
        assert first[name].shape == shape
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], other[name])


def test_a_tensor_does_not_depend_on_the_others() -> None:
    whole = dict(random_tensors(SMALL, 0))
    for name, shape in SMALL.items():
        assert torch.equal(dict(random_tensors({name: shape}, 0))[name], whole[name]), name


def test_the_values_are_the_same_on_every_machine() -> None:
    # Written down once; a change here changes every tiny checkpoint in the world.
    tensors = dict(random_tensors({"proj_in.weight": (2, 4), "norm.weight": (3,)}, 0))
    assert [value.hex() for value in tensors["norm.weight"].tolist()] == [
        "0x1.4ee7140000000p+0",
        "0x1.0848ee0000000p+0",
        "0x1.67933a0000000p+0",
    ]
    assert [value.hex() for value in tensors["proj_in.weight"][0].tolist()] == [
        "-0x1.170c8a0000000p-1",
        "0x1.7681120000000p-2",
        "0x1.926aa80000000p-1",
        "-0x1.b0c32a0000000p-3",
    ]


def test_bfloat16_is_the_rounded_float32() -> None:
    exact, rounded = dict(random_tensors(SMALL, 0)), dict(random_tensors(SMALL, 0, dtype=torch.bfloat16))
    assert all(torch.equal(rounded[name], exact[name].bfloat16()) for name in SMALL)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("embed_tokens.weight", 0.0, 1.0),
        ("layers.0.self_attn.to_k.weight", 0.0, 1 / math.sqrt(48)),
        ("layers.0.self_attn.to_add_out.weight", 0.0, 1.5 / math.sqrt(4096)),
        ("action_proj_in.fc.weight", 0.0, 1 / math.sqrt(64)),  # rows are [in, out]
        ("action_proj_out.fc.weight", 0.0, 1 / math.sqrt(48)),
        ("action_proj_out.bias.weight", 0.0, 0.2),
        ("layers.0.self_attn.norm_added_q.weight", 1.0, 0.25),
        ("layers.0.input_layernorm_moe_gen.weight", 1.0, 0.25),
    ],
)
def test_scales(name: str, mean: float, std: float) -> None:
    tensor = dict(random_tensors(SMALL, 0))[name]
    assert tensor.mean().item() == pytest.approx(mean, abs=4 * std / math.sqrt(tensor.numel()))
    assert tensor.std().item() == pytest.approx(std, rel=0.02 + 2 / math.sqrt(tensor.numel()))


def test_no_tensor_is_constant_or_zero() -> None:
    for name, tensor in random_tensors(SMALL | audio_vae_tensors(AudioVAEConfig(enc_dim=4, dec_dim=4)), 0):
        assert tensor.isfinite().all(), name
        assert tensor.std() > 1e-3, name
