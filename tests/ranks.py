"""Rank processes for tests: started once, taken through layout after layout. Needs torch and nothing else."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from cosmos3_core.device import collective_backend, local_device
from cosmos3_core.parallel.groups import Groups, close_groups, init_groups
from cosmos3_core.parallel.layout import Layout

Work = Callable[..., Any]
_TIMEOUT_S = 200.0
# Imported once, by the process that all ranks of a session are forked from.
_PRELOADED = ["torch.distributed", "tests.parallel.gang_work", "tests.parallel.strip_work"]


def run_layouts(work: Work, layouts: Sequence[Layout], *arguments: Any, device: str = "cpu") -> list[list[Any]]:
    """What every rank of every layout returns: ``results[layout][rank]``.

    Args:
        work: ``work(groups, device, *arguments)``, a function of a module that other processes can import, as
            are the types of what it returns.
        layouts: one after the other; each takes the first ``num_ranks`` of as many processes as the largest needs.
        device: "cpu" with gloo, or "cuda" with NCCL and a GPU a rank.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the rank that failed first.
    """
    num_processes = max(layout.num_ranks for layout in layouts)
    with tempfile.TemporaryDirectory(prefix="cosmos3-ranks-") as directory:
        multiprocessing.set_forkserver_preload(_PRELOADED)
        start_method = "forkserver" if device == "cpu" else "spawn"
        given = (directory, device, work, list(layouts), arguments)
        mp.start_processes(_process, given, nprocs=num_processes, start_method=start_method)
        return [
            [torch.load(Path(directory, f"{index}-{rank}.pt"), weights_only=False) for rank in range(layout.num_ranks)]
            for index, layout in enumerate(layouts)
        ]


def _process(
    rank: int, directory: str, device: str, work: Work, layouts: list[Layout], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)  # equality to the bit asks for it, and ranks share the cores
    mine = local_device(device, rank)
    for index, layout in enumerate(layouts):
        if rank < layout.num_ranks:
            groups = _join(layout, rank, f"{directory}/{index}.store", mine)
            torch.save(work(groups, mine, *arguments), f"{directory}/{index}-{rank}.pt")
            close_groups()


def _join(layout: Layout, rank: int, file: str, device: torch.device) -> Groups:
    store = dist.FileStore(file, layout.num_ranks)
    return init_groups(layout, rank, backend=collective_backend(device), timeout_s=_TIMEOUT_S, store=store)
