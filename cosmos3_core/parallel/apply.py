"""Inserts the collectives into a loaded transformer, whose own modules have none."""

from __future__ import annotations

from dataclasses import replace

from cosmos3_core.model.transformer import Cosmos3Transformer
from cosmos3_core.parallel.collectives import BranchShare, SummedLinear, TokenShare
from cosmos3_core.parallel.groups import Groups


def parallelize(transformer: Cosmos3Transformer, groups: Groups) -> None:
    """Connect a transformer that holds one rank's share to the other ranks.

    1. TP: the row-split layers of both towers, attention output and FFN down, sum over the ranks.
    2. SP: the generation tower works on this rank's tokens and gathers keys and values.

    Args:
        transformer: loaded with ``groups.layout.shard(rank)``.
    """
    if groups.tp is not None:
        for layer in (*transformer.understanding.layers, *transformer.generation.layers):
            if hasattr(layer, "out"):
                layer.out = SummedLinear(layer.out, groups.tp)
                layer.mlp.down = SummedLinear(layer.mlp.down, groups.tp)
    if groups.sp is not None:
        share = TokenShare(groups.place.sp, groups.layout.sp, groups.sp)
        transformer.use_ops(replace(transformer.ops, own_rows=share.own_rows, all_tokens=share.all_tokens))


def branch_share(groups: Groups) -> BranchShare | None:
    """Return this rank's share of the guidance branches; None if it runs all of them."""
    return None if groups.cfg is None else BranchShare(groups.place.cfg, groups.cfg, is_speaker=groups.rank == 0)
