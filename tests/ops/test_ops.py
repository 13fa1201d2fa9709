"""Every implementation of every operator against its eager twin."""

from __future__ import annotations

import logging

import pytest
import torch

from cosmos3_core.errors import RequestError
from cosmos3_core.ops import eager, registry, triton_ops
from cosmos3_core.ops.registry import IMPLEMENTATIONS, names_of, select_ops
from tests.ops.comparison import (
    ELEMENTWISE_SHAPES,
    GPU_CASES,
    TOLERANCES,
    Shape,
    largest_difference,
    relative_difference,
    step_errors,
)

CPU = torch.device("cpu")
SHAPES = [(5, 5, 4, 4, 8), (7, 30, 8, 2, 16), (64, 300, 8, 4, 32), (33, 33, 6, 3, 128)]  # Q, K, N, N_kv, D


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_sdpa_equals_eager(dtype: torch.dtype, shape: Shape, causal: bool) -> None:
    if causal and shape[0] != shape[1]:
        shape = (shape[1], *shape[1:])
    assert largest_difference("sdpa", dtype, CPU, shape, causal) <= TOLERANCES["attention", "sdpa", dtype]


@pytest.mark.gpu
@pytest.mark.parametrize(("shape", "causal"), GPU_CASES, ids=str)
def test_cudnn_equals_eager(shape: Shape, causal: bool) -> None:
    dtype = torch.bfloat16
    assert (
        largest_difference("cudnn", dtype, torch.device("cuda"), shape, causal)
        <= TOLERANCES["attention", "cudnn", dtype]
    )


@pytest.mark.gpu
@pytest.mark.parametrize("weight_in_fp32", [False, True])
@pytest.mark.parametrize("shape", ELEMENTWISE_SHAPES, ids=str)
@pytest.mark.parametrize(("op", "name", "dtype"), [key for key in TOLERANCES if key[1] == "triton"], ids=str)
def test_triton_equals_eager(
    op: str, name: str, dtype: torch.dtype, shape: tuple[int, int, int], weight_in_fp32: bool
) -> None:
    difference = relative_difference(op, name, dtype, torch.device("cuda"), shape, weight_in_fp32)
    assert difference <= TOLERANCES[op, name, dtype]


@pytest.mark.gpu
def test_a_step_is_as_exact_with_fused_operators() -> None:
    eager_error, fused_error = step_errors(torch.device("cuda"))
    assert fused_error <= 1.1 * eager_error


@pytest.mark.parametrize("causal", [False, True])
def test_a_single_key_is_not_left_to_cudnn(causal: bool) -> None:
    """It has no kernel for that: with no other allowed, attention would fail."""
    shape = (1, 1, 8, 2, 16)
    assert (
        largest_difference("cudnn", torch.bfloat16, CPU, shape, causal)
        <= TOLERANCES["attention", "cudnn", torch.bfloat16]
    )


def test_eager_attention_is_the_textbook_formula() -> None:
    q, k, v = (torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(i)) for i in range(3))
    weights = torch.softmax(q[:, 0] @ k[:, 0].T / 2.0, dim=-1)
    assert torch.allclose(eager.attention(q, k, v, False)[:, 0], weights @ v[:, 0], atol=1e-6)
    assert torch.allclose(eager.attention(q, k, v, True)[0], v[0], atol=1e-6)


def test_every_implementation_has_a_tolerance() -> None:
    all_of_them = {(op, name) for op, implementations in IMPLEMENTATIONS.items() for name in implementations}
    assert {(op, name) for op, name in all_of_them if name != "eager"} == {(op, name) for op, name, _ in TOLERANCES}


def test_the_choice_is_logged_and_can_be_overridden(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="cosmos3_core.ops.registry"):
        assert select_ops(CPU, torch.float32).attention is IMPLEMENTATIONS["attention"]["sdpa"]
        chosen = select_ops(CPU, torch.float32, {"attention": "eager"})
        assert chosen.attention is eager.attention
        assert set(names_of(chosen)) == set(IMPLEMENTATIONS)
        assert set(names_of(chosen).values()) == {"eager"}
    assert "op attention: sdpa" in caplog.text
    assert "op attention: eager (asked for)" in caplog.text


def test_without_a_triton_that_works_the_choice_is_eager(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise ModuleNotFoundError("No module named 'triton'\nsecond line")

    monkeypatch.setattr(triton_ops, "rms_norm", fail)
    monkeypatch.setattr(torch, "ones", lambda *arguments, **more: None)  # there may be no such device
    monkeypatch.setattr(registry, "prefers_cudnn_attention", lambda device, dtype: (True, "Hopper"))
    with caplog.at_level(logging.INFO, logger="cosmos3_core.ops.registry"):
        ops = select_ops(torch.device("cuda"), torch.bfloat16)
    assert names_of(ops) == {op: "cudnn" if op == "attention" else "eager" for op in IMPLEMENTATIONS}
    because = "Triton does not work here: ModuleNotFoundError: No module named 'triton'"
    assert f"op silu_mul: eager ({because})" in caplog.text


def test_unknown_names_list_the_valid_ones() -> None:
    with pytest.raises(RequestError, match="cudnn.*eager.*sdpa"):
        select_ops(CPU, torch.float32, {"attention": "flash"})
    with pytest.raises(RequestError, match="attention"):
        select_ops(CPU, torch.float32, {"convolution": "eager"})
