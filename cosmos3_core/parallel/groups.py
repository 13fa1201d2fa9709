"""Process groups, made only here and passed as arguments."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined] # exported, but not in its __all__

from cosmos3_core.device import collective_backend
from cosmos3_core.parallel.layout import Layout, RankCoordinates

Group = Any  # torch's ProcessGroup; None stands for a group of one


@dataclass(frozen=True)
class RankGroup:
    """One rank's view of ranks that share some work, numbered from 0.

    Attributes:
        rank: number of this rank.
        num_ranks: number of ranks.
        group: torch's process group; None for a single rank.
    """

    rank: int = 0
    num_ranks: int = 1
    group: Group = None


@dataclass(frozen=True)
class Groups:
    """One rank's view of its layout.

    Attributes:
        layout: the degrees.
        place: this rank's coordinates.
        tp, cfg, sp: this rank's group along each axis; None for an axis of one rank.
        everyone: all ranks of the layout, CFG outermost and TP innermost.
    """

    layout: Layout
    place: RankCoordinates
    tp: Group = None
    cfg: Group = None
    sp: Group = None
    everyone: RankGroup = RankGroup()

    @property
    def rank(self) -> int:
        return self.layout.rank(self.place)


ALONE = Groups(Layout(), RankCoordinates(0, 0, 0))
"""The groups of a single rank."""


def host_store(host: str, num_ranks: int, timeout_s: float) -> Any:
    """Open a rendezvous store on a port that the operating system picks; the other ranks need its ``port``.

    Args:
        host: address of this rank for the others.
        num_ranks: number of ranks, this one included.
        timeout_s: timeout of every wait on the store, seconds.
    """
    timeout = timedelta(seconds=timeout_s)
    return TCPStore(host, 0, num_ranks, is_master=True, timeout=timeout, wait_for_workers=False)


def join_store(host: str, port: int, num_ranks: int, timeout_s: float) -> Any:
    """Join the rendezvous store that another rank hosts."""
    return TCPStore(host, port, num_ranks, is_master=False, timeout=timedelta(seconds=timeout_s))


def init_groups(layout: Layout, rank: int, *, backend: str, timeout_s: float, store: Any = None) -> Groups:
    """Join the other ranks and make this rank's groups. Every rank calls it once, with the same layout.

    Args:
        layout: the degrees; ``num_ranks`` processes take part.
        backend: "nccl" on GPUs, "gloo" on CPUs.
        timeout_s: timeout of joining, and of every collective afterwards, seconds.
        store: rendezvous store of ``torch.distributed``; None takes torchrun's environment.
    """
    timeout = timedelta(seconds=timeout_s)
    dist.init_process_group(backend, store=store, rank=rank, world_size=layout.num_ranks, timeout=timeout)
    mine: dict[str, Group] = {}
    for axis in ("tp", "cfg", "sp"):
        for ranks in layout.peers(axis):
            # Collective: every rank makes every group, even those without it.
            group = dist.new_group(ranks, timeout=timeout) if len(ranks) > 1 else None
            if rank in ranks:
                mine[axis] = group
    everyone = RankGroup(rank, layout.num_ranks, dist.group.WORLD)
    return Groups(layout, layout.place(rank), **mine, everyone=everyone)


def init_group(num_ranks: int, rank: int, device: torch.device, *, timeout_s: float, store: Any = None) -> RankGroup:
    """Join the other ranks of a gang without a layout, such as decoders. Every rank calls it once.

    Args:
        device: device of the tensors to exchange; a GPU must be the process's current one.
        timeout_s: timeout of joining, and of every exchange afterwards, seconds.
        store: rendezvous store of ``torch.distributed``; None takes torchrun's environment.
    """
    timeout, backend = timedelta(seconds=timeout_s), collective_backend(device)
    dist.init_process_group(backend, store=store, rank=rank, world_size=num_ranks, timeout=timeout)
    ranks = RankGroup(rank, num_ranks, dist.group.WORLD)
    connect(ranks, device)
    return ranks


def connect(ranks: RankGroup, device: torch.device) -> None:
    """Connect all ranks of a group before any two exchange data. Every rank calls it.

    NCCL connects at a group's first operation, in which all ranks have to take part.
    """
    if ranks.group is not None:
        dist.all_reduce(torch.zeros(1, device=device), group=ranks.group)


def close_groups() -> None:
    """Leave the groups, if any were made."""
    if dist.is_initialized():
        dist.destroy_process_group()
