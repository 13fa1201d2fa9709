"""Every implementation of every operator against its eager twin."""

from __future__ import annotations

import logging

import pytest
import torch

from cosmos3_core.errors import RequestError
from cosmos3_core.ops import eager
from cosmos3_core.ops.registry import IMPLEMENTATIONS, names_of, select_ops
from tests.ops.comparison import GPU_CASES, TOLERANCES, Shape, largest_difference

CPU = torch.device("cpu")
SHAPES = [(5, 5, 4, 4, 8), (7, 30, 8, 2, 16), (64, 300, 8, 4, 32), (33, 33, 6, 3, 128)]  # Q, K, N, N_kv, D


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_equals_eager(dtype: torch.dtype, shape: Shape, causal: bool) -> None:
    if causal and shape[0] != shape[1]:
        shape = (shape[1], *shape[1:])
    assert largest_difference("sdpa", dtype, CPU, shape, causal) <= TOLERANCES["sdpa", dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "causal"), GPU_CASES, ids=str)
def test_cudnn_equals_eager(shape: Shape, causal: bool) -> None:
    dtype = torch.bfloat16
    assert largest_difference("cudnn", dtype, torch.device("cuda"), shape, causal) <= TOLERANCES["cudnn", dtype]


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_key_is_not_left_to_cudnn(causal: bool) -> None:
    """It has no kernel for that: with no other allowed, attention would fail."""
    shape = (1, 1, 8, 2, 16)
    assert largest_difference("cudnn", torch.bfloat16, CPU, shape, causal) <= TOLERANCES["cudnn", torch.bfloat16]


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
        chosen = select_ops(CPU, torch.float32, {"attention": "eager"})
        assert chosen.attention is eager.attention
        assert names_of(chosen) == {"attention": "eager"}
    assert "op attention: sdpa" in caplog.text
    assert "op attention: eager (asked for)" in caplog.text


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(RequestError, match="cudnn.*eager.*sdpa"):
        select_ops(CPU, torch.float32, {"attention": "flash"})
    with pytest.raises(RequestError, match="attention"):
        select_ops(CPU, torch.float32, {"convolution": "eager"})
