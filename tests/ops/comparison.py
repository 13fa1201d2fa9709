"""Implementations of the operators against their eager twins. Needs torch, no pytest."""

from __future__ import annotations

from typing import Any

import torch

from cosmos3_core.bench.ours import Ours
from cosmos3_core.bench.subject import Clip, Work, random_subject
from cosmos3_core.model.rope import RopeTable
from cosmos3_core.ops import eager
from cosmos3_core.ops.registry import IMPLEMENTATIONS, Ops, select_ops

Shape = tuple[int, int, int, int, int]  # Q, K, N, N_kv, D

# (operator, implementation, dtype) -> how far from eager it may be. Attention: largest absolute difference on inputs of
# unit scale. The others: norm of the difference from eager in fp32, over the norm of that.
TOLERANCES = {
    ("attention", "sdpa", torch.float32): 2e-6,
    ("attention", "sdpa", torch.bfloat16): 2e-2,
    ("attention", "cudnn", torch.bfloat16): 2e-2,
    **{
        (op, "triton", dtype): tolerance
        for op in ("rms_norm", "add_rms_norm", "norm_rope", "silu_mul")
        for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 5e-3))
    },
}
NEEDS_GPU = ("cudnn", "triton")
# As in generation, and causal as in a prompt; the last is a prompt of one token.
GPU_CASES: list[tuple[Shape, bool]] = [
    ((64, 300, 8, 2, 128), False),
    ((2880, 4430, 32, 8, 128), False),
    ((300, 300, 32, 8, 128), True),
    ((1, 1, 8, 2, 128), True),
]
ELEMENTWISE_SHAPES = [(2880, 32, 128), (333, 40, 128), (1, 8, 128), (77, 3, 24)]  # S, N, D; the width is N * D


def largest_difference(name: str, dtype: torch.dtype, device: torch.device, shape: Shape, causal: bool) -> float:
    """Return an attention implementation's largest absolute difference from eager, on random inputs of unit scale."""
    q_tokens, k_tokens, heads, kv_heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(device, dtype)

    q, k, v = draw(q_tokens, heads, dim), draw(k_tokens, kv_heads, dim), draw(k_tokens, kv_heads, dim)
    expected = eager.attention(q, k, v, causal)
    result = IMPLEMENTATIONS["attention"][name](q, k, v, causal)
    assert result.shape == expected.shape
    assert result.dtype == expected.dtype
    return float((result.float() - expected.float()).abs().max())


def relative_difference(
    op: str, name: str, dtype: torch.dtype, device: torch.device, shape: tuple[int, int, int], weight_in_fp32: bool
) -> float:
    """Return an elementwise operator's relative distance from eager in fp32; the largest of several results."""
    tokens, heads, dim = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*size: int, std: float = 2.0, mean: float = 0.0) -> torch.Tensor:
        return (std * torch.randn(size, generator=generator) + mean).to(device, dtype)

    x, y, gate_up = draw(tokens, heads * dim), draw(tokens, heads * dim), draw(tokens, 2 * heads * dim)
    weight = draw(dim if op == "norm_rope" else heads * dim, std=0.25, mean=1.0)
    norm = (weight, 1e-6, weight_in_fp32)
    angle = 100 * torch.rand((tokens, dim // 2), generator=generator)
    rope = RopeTable(angle.cos().to(device, dtype), angle.sin().to(device, dtype))
    # Heads come as a view of a wider matrix.
    inputs: dict[str, tuple[Any, ...]] = {
        "rms_norm": (x, *norm),
        "add_rms_norm": (x, y, *norm),
        "norm_rope": (draw(tokens, heads + 3, dim)[:, 1 : heads + 1], *norm, rope),
        "silu_mul": (gate_up,),
    }
    results = IMPLEMENTATIONS[op][name](*inputs[op])
    expected = getattr(eager, op)(*(_in_fp32(value) for value in inputs[op]))
    largest = 0.0
    if isinstance(results, torch.Tensor):
        results, expected = (results,), (expected,)
    for got, wanted in zip(results, expected, strict=True):
        assert got.shape == wanted.shape
        assert got.dtype == dtype
        largest = max(largest, float((got.float() - wanted).norm() / wanted.norm()))
    return largest


def step_errors(device: torch.device) -> tuple[float, float]:
    """How far bf16 velocities of a small model are from fp32 ones, relative: with eager elementwise operators, and with
    those chosen for the device."""
    work = Work(Clip(num_frames=9, height=96, width=160, chunk_latents=1), text_tokens=40, negative_tokens=30)
    ours = Ours(random_subject("tiny", device, torch.bfloat16), work)
    transformer = ours.denoiser.transformer
    chosen = select_ops(device, torch.bfloat16, {"attention": "sdpa"})
    plain = Ops()

    def velocity(ops: Ops) -> torch.Tensor:
        transformer.use_ops(ops)
        ours.denoiser.forget_prompts()
        plan = ours.denoiser.prepare(ours.request)
        latents = ours.denoiser.start(plan).latents
        branch = plan.branches[0]
        return transformer.velocity(latents, plan.noise_masks, 500, branch.text, branch.rope)["video"].float()

    with torch.no_grad():
        in_bf16 = [velocity(plain), velocity(chosen)]
        transformer.float()  # the weights keep the values that bf16 gave them
        exact = velocity(plain)
    plain_error, chosen_error = (float((v - exact).norm() / exact.norm()) for v in in_bf16)
    return plain_error, chosen_error


def _in_fp32(value: Any) -> Any:
    if isinstance(value, RopeTable):
        return RopeTable(value.cos.float(), value.sin.float())
    return value.float() if isinstance(value, torch.Tensor) else value
