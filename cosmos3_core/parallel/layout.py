"""The layout of one model over ranks: its degrees of tensor, guidance and sequence parallelism. No torch here.

    CFG  outermost: ranks of the conditional branch first, then those of the unconditional one
    SP   inside a branch: shares of the generated tokens
    TP   innermost: ranks of one share are neighbours, because they exchange the most data

With tp=4, cfg=2 on eight ranks: 0-3 run the conditional branch, 4-7 the unconditional one.
"""

from __future__ import annotations

from dataclasses import dataclass

from cosmos3_core import checks
from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.errors import RequestError
from cosmos3_core.parallel.sharding import Shard, local_config

_MAX_DEGREE = 64


@dataclass(frozen=True)
class RankCoordinates:
    """One rank's coordinates in a layout."""

    cfg: int
    sp: int
    tp: int


@dataclass(frozen=True)
class Layout:
    """Degrees of the three axes.

    Attributes:
        tp: ranks that share every layer's heads and FFN columns.
        cfg: 1, or 2 to run the guidance branches side by side.
        sp: ranks that share the generated tokens.

    Raises:
        RequestError: a degree is out of bounds.
    """

    tp: int = 1
    cfg: int = 1
    sp: int = 1

    def __post_init__(self) -> None:
        checks.integer("tp", self.tp, 1, _MAX_DEGREE)
        checks.integer("sp", self.sp, 1, _MAX_DEGREE)
        if self.cfg not in (1, 2):
            raise RequestError("cfg", self.cfg, "1 or 2", "there are two guidance branches")

    def __str__(self) -> str:
        return f"TP{self.tp} x CFG{self.cfg} x SP{self.sp}"

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cfg * self.sp

    def place(self, rank: int) -> RankCoordinates:
        """Return a rank's coordinates.

        Raises:
            RequestError: the layout has no such rank.
        """
        checks.integer("rank", rank, 0, self.num_ranks - 1)
        outer, tp = divmod(rank, self.tp)
        cfg, sp = divmod(outer, self.sp)
        return RankCoordinates(cfg, sp, tp)

    def rank(self, place: RankCoordinates) -> int:
        """Return the rank at some coordinates."""
        return (place.cfg * self.sp + place.sp) * self.tp + place.tp

    def peers(self, axis: str) -> list[list[int]]:
        """Return the sets of ranks that differ only along one axis; every rank is in exactly one."""
        sets: dict[tuple[int, ...], list[int]] = {}
        for rank in range(self.num_ranks):
            place = self.place(rank)
            fixed = tuple(getattr(place, other) for other in ("cfg", "sp", "tp") if other != axis)
            sets.setdefault(fixed, []).append(rank)
        return list(sets.values())

    def shard(self, rank: int) -> Shard:
        """Return the share of the weights that a rank holds."""
        return Shard(self.place(rank).tp, self.tp)

    def check(self, config: TransformerConfig) -> None:
        """Make sure that a model fits this layout.

        Raises:
            RequestError: heads, KV heads or FFN columns do not divide by ``tp``; lists the sizes that do.
        """
        local_config(config, self.tp)
