"""Attention by torch's scaled_dot_product_attention, with the signature and meaning of :func:`eager.attention`."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attention(q_QND: Tensor, k_KND: Tensor, v_KND: Tensor, causal: bool) -> Tensor:
    """Run the backend that torch picks."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q_QND, k_KND, v_KND))
    grouped = q_QND.shape[1] != k_KND.shape[1]
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=grouped).squeeze(0).transpose(0, 1)


def attention_cudnn(q_QND: Tensor, k_KND: Tensor, v_KND: Tensor, causal: bool) -> Tensor:
    """Run cuDNN's kernel; torch would rank FlashAttention-2 first, which is slower on Hopper."""
    if k_KND.shape[0] == 1:  # a prompt of one token; cuDNN has no kernel for a single key
        return attention(q_QND, k_KND, v_KND, causal)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return attention(q_QND, k_KND, v_KND, causal)
