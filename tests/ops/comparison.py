"""An implementation of attention against its eager twin. Needs torch, no pytest."""

from __future__ import annotations

import torch

from cosmos3_core.ops import eager
from cosmos3_core.ops.registry import IMPLEMENTATIONS

Shape = tuple[int, int, int, int, int]  # Q, K, N, N_kv, D

# (implementation, dtype) -> largest absolute difference from eager on inputs of unit scale
TOLERANCES = {
    ("sdpa", torch.float32): 2e-6,
    ("sdpa", torch.bfloat16): 2e-2,
    ("cudnn", torch.bfloat16): 2e-2,
}
# As in generation, and causal as in a prompt; the last is a prompt of one token.
GPU_CASES: list[tuple[Shape, bool]] = [
    ((64, 300, 8, 2, 128), False),
    ((2880, 4430, 32, 8, 128), False),
    ((300, 300, 32, 8, 128), True),
    ((1, 1, 8, 2, 128), True),
]


def largest_difference(name: str, dtype: torch.dtype, device: torch.device, shape: Shape, causal: bool) -> float:
    """The largest absolute difference, on random inputs of unit scale."""
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
