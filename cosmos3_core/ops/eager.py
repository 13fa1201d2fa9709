"""Plain PyTorch references: slow, obvious, the standard that fast implementations are compared with.

Shape letters: Q query tokens, K key tokens, N heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention(q_QND: Tensor, k_KND: Tensor, v_KND: Tensor, causal: bool) -> Tensor:
    """Softmax attention with grouped key/value heads.

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
