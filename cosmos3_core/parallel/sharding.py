"""The one table of how tensor parallelism splits the published transformer tensors.

The loader cuts stored tensors by :func:`split_of`; the model builds its modules from :func:`local_config`. The two
agree because heads and MLP columns are cut into equal, contiguous runs, one per rank in order. No torch here.
"""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from dataclasses import dataclass

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.errors import RequestError


class Split(enum.Enum):
    """How a tensor's elements spread over the ranks."""

    COLUMN = "column"  # by outputs: dim 0 of an [out, in] weight, and the bias with it
    ROW = "row"  # by inputs: dim 1 of an [out, in] weight; the ranks' products add up to the output
    REPLICATE = "replicate"  # whole on every rank


_SPLITS: tuple[tuple[str, Split], ...] = (
    # Understanding tower: to_q, to_k, to_v, mlp. Generation tower: add_q_proj, add_k_proj, add_v_proj, mlp_moe_gen.
    (r"layers\.\d+\.self_attn\.(to_[qkv]|add_[qkv]_proj)\.(weight|bias)", Split.COLUMN),
    (r"layers\.\d+\.mlp(_moe_gen)?\.(gate|up)_proj\.(weight|bias)", Split.COLUMN),
    # Without the biases of these two: they belong to the summed output, so every rank holds them whole.
    (r"layers\.\d+\.self_attn\.(to_out|to_add_out)\.weight", Split.ROW),
    (r"layers\.\d+\.mlp(_moe_gen)?\.down_proj\.weight", Split.ROW),
)
_PATTERNS = tuple((re.compile(pattern), split) for pattern, split in _SPLITS)


def split_of(name: str) -> Split:
    """Return how the tensor with this published name is split; a name outside the table is replicated."""
    for pattern, split in _PATTERNS:
        if pattern.fullmatch(name):
            return split
    return Split.REPLICATE


@dataclass(frozen=True)
class Shard:
    """One rank's share of every split tensor.

    Attributes:
        rank: number of the share, from 0.
        num_shards: number of shares.

    Raises:
        RequestError: ``rank`` is not one of ``num_shards`` ranks.
    """

    rank: int
    num_shards: int

    def __post_init__(self) -> None:
        if self.num_shards < 1:
            raise RequestError("tp", self.num_shards, "at least 1")
        if not 0 <= self.rank < self.num_shards:
            raise RequestError("rank", self.rank, f"from 0 to {self.num_shards - 1}")

    def slice(self, extent: int, tensor: str = "tensor") -> slice:
        """Return this rank's run of ``extent`` rows or columns.

        Args:
            extent: rows or columns of the whole tensor.

        Raises:
            RequestError: ``extent`` does not divide evenly.
        """
        if extent % self.num_shards:
            raise RequestError(
                "tp", self.num_shards, f"a divisor of {extent}, the rows or columns of {tensor} that the ranks share"
            )
        share = extent // self.num_shards
        return slice(self.rank * share, (self.rank + 1) * share)


WHOLE_MODEL = Shard(0, 1)
"""The share of a single rank."""


def list_tp_sizes(config: TransformerConfig) -> tuple[int, ...]:
    """Return the degrees of tensor parallelism that give each rank whole heads and equal MLP columns, ascending."""
    shared = math.gcd(config.num_attention_heads, config.num_key_value_heads, config.intermediate_size)
    return tuple(size for size in range(1, shared + 1) if shared % size == 0)


def local_config(config: TransformerConfig, tp_size: int) -> TransformerConfig:
    """Return the config of one of ``tp_size`` ranks: heads and MLP columns are divided, all else stays.

    Raises:
        RequestError: ``tp_size`` does not divide the heads, the key-value heads and the MLP columns.
    """
    allowed = list_tp_sizes(config)
    if tp_size not in allowed:
        raise RequestError(
            "tp",
            tp_size,
            f"one of {', '.join(map(str, allowed))} for this checkpoint ({config.num_attention_heads} heads, "
            f"{config.num_key_value_heads} key-value heads, {config.intermediate_size} MLP columns)",
        )
    return dataclasses.replace(
        config,
        num_attention_heads=config.num_attention_heads // tp_size,
        num_key_value_heads=config.num_key_value_heads // tp_size,
        intermediate_size=config.intermediate_size // tp_size,
    )
