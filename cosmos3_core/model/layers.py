"""The layers of both towers.

Shape letters: S tokens (text or generated), M width, N heads, D head dim.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.tensors import NUM_TIMESTEP_FEATURES
from cosmos3_core.model.rope import RopeTable
from cosmos3_core.ops.registry import Ops


def take_rows(x: Tensor, rows: slice) -> Tensor:
    """Return ``x[rows]`` along dim 0, with zeros past the end."""
    taken = x[rows]
    missing = rows.stop - rows.start - taken.shape[0]
    return F.pad(taken, (0, 0) * (x.ndim - 1) + (0, missing)) if missing else taken


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, statistics in fp32.

    Args:
        weight_in_fp32: multiply by the weight before the result is rounded to the input's dtype (the Nemotron
            backbone of Edge) instead of after (the Qwen3 backbone); both are the same in fp32.
    """

    def __init__(self, width: int, eps: float, ops: Ops, *, weight_in_fp32: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.ops = ops
        self.weight_in_fp32 = weight_in_fp32
        self.weight = nn.Parameter(torch.empty(width), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.ops.rms_norm(x, self.weight, self.eps, self.weight_in_fp32)

    def add_and_norm(self, x: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x + branch`` and its norm."""
        return self.ops.add_rms_norm(x, branch, self.weight, self.eps, self.weight_in_fp32)

    def rotate(self, x_SND: Tensor, rope: RopeTable) -> Tensor:
        """Normalise every head, then rotate it."""
        return self.ops.norm_rope(x_SND, self.weight, self.eps, self.weight_in_fp32, rope)


class MLP(nn.Module):
    """The feed-forward block: SwiGLU (``silu``; gate and up in one matrix, gate first) or squared ReLU (``relu2``)."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.gated = config.hidden_act == "silu"
        inner = config.intermediate_size
        self.up = nn.Linear(config.hidden_size, 2 * inner if self.gated else inner, bias=False)
        self.down = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(self, x_SM: Tensor) -> Tensor:
        hidden = self.up(x_SM)
        if self.gated:
            return self.down(self.ops.silu_mul(hidden))
        return self.down(F.relu(hidden).square())


class QKV(nn.Module):
    """Query, key and value projections in one matrix: rows of all query heads, then key heads, then value heads.

    Args:
        config: sizes, of this rank's share if heads are split.
        with_queries: False for keys and values only.
    """

    def __init__(self, config: TransformerConfig, *, with_queries: bool = True) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_heads = config.num_key_value_heads
        self.heads = [config.num_attention_heads if with_queries else 0, kv_heads, kv_heads]
        self.proj = nn.Linear(config.hidden_size, sum(self.heads) * self.head_dim, bias=config.attention_bias)

    def forward(self, x_SM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q [S, N, D] (N = 0 without queries), k and v [S, N_kv, D]."""
        heads_SND = self.proj(x_SM).view(x_SM.shape[0], -1, self.head_dim)
        q, k, v = heads_SND.split(self.heads, dim=1)
        return q, k, v


class TimeEmbedder(nn.Module):
    """Timestep -> [M]: sinusoid (cosines first) and a two-layer MLP, all in fp32 (DDPM's embedding, Ho et al. 2020).

    The weights stay fp32 in every checkpoint dtype: in bf16 neighbouring timesteps would coincide.
    """

    MAX_PERIOD = 10_000.0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(NUM_TIMESTEP_FEATURES, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, scaled_timestep: Tensor) -> Tensor:
        """Embed ``scaled_timestep``, a scalar fp32 tensor: timestep x timestep_scale."""
        half = NUM_TIMESTEP_FEATURES // 2
        exponent = torch.arange(half, dtype=torch.float32, device=scaled_timestep.device) / half
        angle = scaled_timestep * torch.exp(-torch.tensor(self.MAX_PERIOD).log() * exponent)
        return self.linear_2(F.silu(self.linear_1(torch.cat((angle.cos(), angle.sin())))))
