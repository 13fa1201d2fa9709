"""Plain PyTorch operators: the reference that fast implementations are compared with.

Shape letters: Q query tokens, K key tokens, S tokens, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from cosmos3_core.model.rope import RopeTable, apply_rope


def attention(q_QND: Tensor, k_KND: Tensor, v_KND: Tensor, causal: bool) -> Tensor:
    """Compute softmax attention with grouped key/value heads.

    Args:
        q_QND: queries [Q, N, D].
        k_KND: keys [K, N_kv, D]; key head j serves query heads j * N/N_kv up to the next.
        v_KND: values [K, N_kv, D].
        causal: token i sees keys 0..i (Q and K equal); else every query sees every key.

    Returns:
        [Q, N, D] in q's dtype; scores and softmax in fp32.
    """
    group = q_QND.shape[1] // k_KND.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k_KND, v_KND))
    scores_NQK = torch.einsum("qnd,knd->nqk", q_QND.float(), k) * q_QND.shape[-1] ** -0.5
    if causal:
        allowed_QK = torch.ones(scores_NQK.shape[1:], dtype=torch.bool, device=q_QND.device).tril()
        scores_NQK = scores_NQK.masked_fill(~allowed_QK, float("-inf"))
    return torch.einsum("nqk,knd->qnd", scores_NQK.softmax(dim=-1), v).to(q_QND.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> Tensor:
    """Compute the root-mean-square norm over the last axis, with statistics in fp32.

    Args:
        x: [..., width].
        weight: [width], in x's dtype.
        weight_in_fp32: multiply by the weight before the result is rounded to x's dtype instead of after.

    Returns:
        Shaped like x, in its dtype.
    """
    # torch's fused kernel instead of its parts; docs/performance.md says why.
    if weight_in_fp32 or x.dtype == torch.float32:
        return F.rms_norm(x, weight.shape, weight, eps)
    return F.rms_norm(x, weight.shape, eps=eps) * weight


def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: float, weight_in_fp32: bool) -> tuple[Tensor, Tensor]:
    """Add a branch to the stream: return ``x + y`` and its :func:`rms_norm`."""
    total = x + y
    return total, rms_norm(total, weight, eps, weight_in_fp32)


def norm_rope(x_SND: Tensor, weight_D: Tensor, eps: float, weight_in_fp32: bool, rope: RopeTable) -> Tensor:
    """Normalise (:func:`rms_norm`) and rotate every head of queries or keys.

    Args:
        x_SND: [S, N, D]; may be a view into a tensor of more heads.
        weight_D, eps, weight_in_fp32: see :func:`rms_norm`.

    Returns:
        [S, N, D] in x's dtype.
    """
    return apply_rope(rms_norm(x_SND, weight_D, eps, weight_in_fp32), rope)


def silu_mul(gate_up: Tensor) -> Tensor:
    """Apply the gate of SwiGLU: [S, 2 x inner], gates first -> ``silu(gate) * up`` [S, inner]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up
