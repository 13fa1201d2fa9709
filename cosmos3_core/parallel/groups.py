"""Process groups: made here, in one place, and passed on as an argument."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # exported, but not in its __all__

from cosmos3_core.parallel.layout import Layout, Place

Group = Any  # torch's ProcessGroup; None stands for a group of one


@dataclass(frozen=True)
class Groups:
    """One rank's view of its layout.

    Attributes:
        layout: the degrees.
        place: this rank's coordinates.
        tp, cfg, sp: this rank's group along each axis; None where the axis has one rank.
    """

    layout: Layout
    place: Place
    tp: Group = None
    cfg: Group = None
    sp: Group = None

    @property
    def rank(self) -> int:
        return self.layout.rank(self.place)


ALONE = Groups(Layout(), Place(0, 0, 0))
"""The groups of a rank that is alone."""


def host_store(host: str, num_ranks: int, timeout_s: float) -> Any:
    """A meeting place on a port that the operating system picks; its ``port`` is to be told to the other ranks.

    Args:
        host: address under which the other ranks reach this one.
        num_ranks: how many will come, this one included.
        timeout_s: for every wait in it.
    """
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, 0, num_ranks, is_master=True, timeout=timeout, wait_for_workers=False)


def join_store(host: str, port: int, num_ranks: int, timeout_s: float) -> Any:
    """The meeting place that another rank hosts."""
    return TCPStore(host, port, num_ranks, is_master=False, timeout=timedelta(seconds=timeout_s))


def init_groups(layout: Layout, rank: int, *, backend: str, timeout_s: float, store: Any = None) -> Groups:
    """Join the other ranks and make this rank's groups. Every rank calls it once, with the same layout.

    Args:
        layout: the degrees; ``num_ranks`` processes take part.
        rank: of this process.
        backend: "nccl" on GPUs, "gloo" on CPUs.
        timeout_s: for joining, and for every collective afterwards.
        store: where the ranks meet, a ``torch.distributed`` store; None takes torchrun's environment.
    """
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.num_ranks, timeout=timeout)
    mine: dict[str, Group] = {}
    for axis in ("tp", "cfg", "sp"):
        for ranks in layout.peers(axis):
            # Collective: every rank makes every group, also those that it is not in.
            group = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                mine[axis] = group
    return Groups(layout, layout.place(rank), **mine)


def close_groups() -> None:
    """Leave the groups. Harmless where none were made."""
    if dist.is_initialized():
        dist.destroy_process_group()
