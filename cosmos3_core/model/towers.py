"""The two towers of Cosmos3's mixture of transformers: same depth, separate weights, one shared attention.

The understanding tower reads the prompt, causally, and never sees generated tokens or the timestep. The generation
tower takes its keys and values, layer by layer, which depend on the prompt alone and are computed once. It attends,
without a mask, to those and to all its own tokens.

Shape letters: L text tokens, S generated tokens, M width, N heads, D head dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.model.layers import MLP, QKV, RMSNorm, take_rows
from cosmos3_core.model.rope import RopeTable, apply_rope
from cosmos3_core.ops.registry import Ops


@dataclass(frozen=True)
class TextKV:
    """Keys (rotated) and values of one prompt in every layer, for the generation tower.

    Attributes:
        keys: per layer [L, N_kv, D], in the towers' dtype.
        values: per layer [L, N_kv, D].
    """

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]

    @property
    def num_tokens(self) -> int:
        return self.keys[0].shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in (*self.keys, *self.values))


def _norm(config: TransformerConfig, width: int, ops: Ops) -> RMSNorm:
    return RMSNorm(width, config.rms_norm_eps, ops, weight_in_fp32=config.hidden_act == "relu2")


def _rotate(x_LND: Tensor, norm: RMSNorm | None, rope: RopeTable) -> Tensor:
    return apply_rope(x_LND, rope) if norm is None else norm.rotate(x_LND, rope)


class UnderstandingLayer(nn.Module):
    """One layer over the prompt. The last one stops at its keys and values (``keys_only``)."""

    def __init__(self, config: TransformerConfig, ops: Ops, *, keys_only: bool) -> None:
        super().__init__()
        self.ops = ops
        self.keys_only = keys_only
        self.input_norm = _norm(config, config.hidden_size, ops)
        self.qkv = QKV(config, with_queries=not keys_only)
        # Qwen3 backbones normalise text queries and keys; Nemotron backbones only the keys for generation.
        self.k_norm = _norm(config, config.head_dim, ops) if config.qk_norm_for_text else None
        self.q_norm = _norm(config, config.head_dim, ops) if config.qk_norm_for_text and not keys_only else None
        separate = config.use_und_k_norm_for_gen and not config.qk_norm_for_text
        self.k_norm_for_generation = _norm(config, config.head_dim, ops) if separate else None
        if not keys_only:
            q_dim = config.num_attention_heads * config.head_dim
            self.out = nn.Linear(q_dim, config.hidden_size, bias=config.attention_bias)
            self.post_norm = _norm(config, config.hidden_size, ops)
            self.mlp = MLP(config, ops)

    def forward(self, x_LM: Tensor, rope: RopeTable) -> tuple[Tensor, Tensor, Tensor]:
        """Return the layer's output [L, M], the keys for generation [L, N_kv, D] and the values [L, N_kv, D]."""
        q_LND, k_LND, v_LND = self.qkv(self.input_norm(x_LM))
        seen_norm = self.k_norm if self.k_norm_for_generation is None else self.k_norm_for_generation
        seen_k_LND = _rotate(k_LND, seen_norm, rope)
        if self.keys_only:
            # A copy: a view would keep the whole projection alive as long as the cache entry.
            return x_LM, seen_k_LND, v_LND.clone()
        k_LND = seen_k_LND if self.k_norm_for_generation is None else apply_rope(k_LND, rope)
        attended_LND = self.ops.attention(_rotate(q_LND, self.q_norm, rope), k_LND, v_LND, True)
        x_LM, normed_LM = self.post_norm.add_and_norm(x_LM, self.out(attended_LND.flatten(1)))
        return x_LM + self.mlp(normed_LM), seen_k_LND, v_LND.clone()


class UnderstandingTower(nn.Module):
    """The prompt's tower: token ids -> keys and values of every layer."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        last = config.num_hidden_layers - 1
        # From a weight: drawing one on the meta device makes torch import its compiler, 1.7 s on each rank.
        weight = torch.empty(config.vocab_size, config.hidden_size)
        self.embed = nn.Embedding.from_pretrained(weight, freeze=False)
        self.layers = nn.ModuleList(UnderstandingLayer(config, ops, keys_only=i == last) for i in range(last + 1))

    def forward(self, text_ids_L: Tensor, rope: RopeTable) -> TextKV:
        x_LM = self.embed(text_ids_L)
        keys, values = [], []
        for layer in self.layers:
            x_LM, k_LND, v_LND = layer(x_LM, rope)
            keys.append(k_LND)
            values.append(v_LND)
        return TextKV(tuple(keys), tuple(values))


class GenerationLayer(nn.Module):
    """One layer over the generated tokens, which attend to the prompt's keys and their own, without a mask."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.input_norm = _norm(config, config.hidden_size, ops)
        self.qkv = QKV(config)
        self.q_norm = _norm(config, config.head_dim, ops)
        self.k_norm = _norm(config, config.head_dim, ops)
        q_dim = config.num_attention_heads * config.head_dim
        self.out = nn.Linear(q_dim, config.hidden_size, bias=config.attention_bias)
        self.post_norm = _norm(config, config.hidden_size, ops)
        self.mlp = MLP(config, ops)

    def forward(self, x_SM: Tensor, text_k_LND: Tensor, text_v_LND: Tensor, rope: RopeTable, num_tokens: int) -> Tensor:
        q_SND, k_SND, v_SND = self.qkv(self.input_norm(x_SM))
        q_SND = self.q_norm.rotate(q_SND, rope)
        k_SND = self.k_norm.rotate(k_SND, rope)
        keys = torch.cat((text_k_LND, self.ops.all_tokens(k_SND, num_tokens)))
        values = torch.cat((text_v_LND, self.ops.all_tokens(v_SND, num_tokens)))
        attended_SND = self.ops.attention(q_SND, keys, values, False)
        x_SM, normed_SM = self.post_norm.add_and_norm(x_SM, self.out(attended_SND.flatten(1)))
        return x_SM + self.mlp(normed_SM)


class GenerationTower(nn.Module):
    """The generated tokens' tower. Input and output are this rank's tokens, see :class:`Ops`; ``rope`` is for all."""

    def __init__(self, config: TransformerConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.layers = nn.ModuleList(GenerationLayer(config, ops) for _ in range(config.num_hidden_layers))
        self.norm = _norm(config, config.hidden_size, ops)

    def forward(self, x_SM: Tensor, text: TextKV, rope: RopeTable) -> Tensor:
        num_tokens = rope.cos.shape[0]
        rows = self.ops.own_rows(num_tokens)
        rope = RopeTable(take_rows(rope.cos, rows), take_rows(rope.sin, rows))
        for layer, text_k_LND, text_v_LND in zip(self.layers, text.keys, text.values, strict=True):
            x_SM = layer(x_SM, text_k_LND, text_v_LND, rope, num_tokens)
        return self.norm(x_SM)
