"""Every implementation of every operator against its eager twin."""

from __future__ import annotations

import logging

import pytest
import torch

from cosmos3_core.errors import RequestError
from cosmos3_core.ops import eager
from cosmos3_core.ops.registry import IMPLEMENTATIONS, select_ops

CPU = torch.device("cpu")
# (implementation, dtype) -> largest absolute difference from eager on inputs of unit scale
TOLERANCES = {
    ("sdpa", torch.float32): 2e-6,
    ("sdpa", torch.bfloat16): 2e-2,
    ("cudnn", torch.bfloat16): 2e-2,
}
SHAPES = [(5, 5, 4, 4, 8), (7, 30, 8, 2, 16), (64, 300, 8, 4, 32), (33, 33, 6, 3, 128)]  # Q, K, N, N_kv, D


def compare(name: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, ...], causal: bool) -> None:
    q_tokens, k_tokens, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    q, k, v = draw(q_tokens, heads, dim), draw(k_tokens, kv_heads, dim), draw(k_tokens, kv_heads, dim)
    expected = eager.attention(q, k, v, causal)
    result = IMPLEMENTATIONS["attention"][name](q, k, v, causal)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    assert (result.float() - expected.float()).abs().max() <= TOLERANCES[name, dtype]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_equals_eager(dtype: torch.dtype, shape: tuple[int, ...], causal: bool) -> None:
    if causal and shape[0] != shape[1]:
        shape = (shape[1], *shape[1:])
    compare("sdpa", dtype, CPU, shape, causal)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 300, 8, 2, 128), (2880, 4430, 32, 8, 128)], ids=str)
def test_cudnn_equals_eager(shape: tuple[int, ...]) -> None:
    compare("cudnn", torch.bfloat16, torch.device("cuda"), shape, causal=False)


def test_eager_attention_is_the_textbook_formula() -> None:
    q, k, v = (torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weights = torch.softmax(q[:, 0] @ k[:, 0].T / 2.0, dim=-1)
    assert torch.allclose(eager.attention(q, k, v, False)[:, 0], weights @ v[:, 0], atol=1e-6)
    assert torch.allclose(eager.attention(q, k, v, True)[0], v[0], atol=1e-6)


def test_every_implementation_has_a_tolerance() -> None:
    fast = {name for implementations in IMPLEMENTATIONS.values() for name in implementations} - {"eager"}
    assert fast == {name for name, _ in TOLERANCES}


def test_the_choice_is_logged_and_can_be_overridden(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cosmos3_core.ops.registry"):
        assert select_ops(CPU, torch.float32).attention is IMPLEMENTATIONS["attention"]["sdpa"]
        assert select_ops(CPU, torch.float32, {"attention": "eager"}).attention is eager.attention
    assert "op attention: sdpa" in caplog.text
    assert "op attention: eager (asked for)" in caplog.text


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(RequestError, match="cudnn.*eager.*sdpa"):
        select_ops(CPU, torch.float32, {"attention": "flash"})
    with pytest.raises(RequestError, match="attention"):
        select_ops(CPU, torch.float32, {"convolution": "eager"})
