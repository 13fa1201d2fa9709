"""One rank of a gang: a process that holds its share of a model and serves the leader's calls.

Plain classes; :mod:`cluster.gang` turns them into actors. Calls come one at a time and in order. The contract of a
gang's ranks: an error that is the request's fault is raised alike on every rank, before any rank works. Any other error
on one rank, out of memory included, fails a gang of several as a whole, and the gang is rebuilt.
"""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.errors import OutOfMemory
from cluster.logs import RankLog, log_to_stderr

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RankSpec(ABC):
    """Settings from which a rank loads its share of a model.

    Attributes:
        checkpoint: directory in the published layout; the same path on every node.
        device: torch device string.
        dtype: name of the weights' dtype, such as "bfloat16"; None keeps the stored one.
        num_threads: torch's CPU threads in the rank's process.
        collective_timeout_s: for meeting the other ranks and for every exchange with them.
    """

    checkpoint: str
    device: str
    dtype: str | None
    num_threads: int
    collective_timeout_s: float = field(default=600.0, kw_only=True)

    @property
    @abstractmethod
    def num_ranks(self) -> int:
        """Rank actors in a gang."""

    @property
    @abstractmethod
    def rank_class(self) -> type[Rank]:
        """The class of the rank actors."""

    @property
    @abstractmethod
    def warm_up(self) -> list[tuple[str, tuple[Any, ...]]]:
        """Methods and arguments of a small piece of work; a gang is up after it."""


@dataclass(frozen=True)
class RankInfo:
    """Where a rank lives."""

    rank: int
    pid: int
    node_id: str


@dataclass(frozen=True)
class Loaded:
    """Report of a rank that has loaded.

    Attributes:
        ops: operator -> implementation chosen for the device.
    """

    seconds: float
    ops: dict[str, str]


class Rank(ABC):
    """Base of all kinds of ranks: describe, meet the others, load. ``rank`` is its number in the gang."""

    def __init__(self, rank: int, spec: RankSpec) -> None:
        self._rank = rank
        self._spec = spec
        self._store: Any = None
        self._loaded_model: Any = None  # set by load()
        self._log = RankLog(logger)

    def log_to_stderr(self) -> None:
        """Log as JSON from now on, with the rank in every line; see :mod:`cluster.logs`."""
        log_to_stderr(gang=type(self).__name__, rank=self._rank)

    def describe(self) -> RankInfo:
        """Return where this rank runs; an answer means that its process is up."""
        import ray

        return RankInfo(self._rank, os.getpid(), ray.get_runtime_context().get_node_id())

    def host(self) -> tuple[str, int]:
        """Open the ranks' rendezvous on a free port; return (address, port). Only rank 0 is called."""
        import ray

        from cosmos3_core.parallel.groups import host_store

        address = ray.util.get_node_ip_address()
        self._store = host_store(address, self._spec.num_ranks, self._spec.collective_timeout_s)
        return address, self._store.port

    def join(self, address: str, port: int) -> None:
        """Meet the other ranks and make the process groups. Every rank calls it at the same time."""
        from cosmos3_core.parallel.groups import join_store

        spec = self._spec
        if self._store is None:
            self._store = join_store(address, port, spec.num_ranks, spec.collective_timeout_s)
        self._make_groups(self._store)

    @abstractmethod
    def _make_groups(self, store: Any) -> None:
        """Make this rank's process groups."""

    @abstractmethod
    def load(self) -> Loaded:
        """Load the weights; raise CheckpointError or RequestError if checkpoint or device cannot be used."""

    @cached_property
    def _device(self) -> torch.device:
        from cosmos3_core.device import resolve_device

        return resolve_device(self._spec.device)

    @property
    def _dtype(self) -> torch.dtype | None:
        from cosmos3_core.device import DTYPES

        return DTYPES[self._spec.dtype] if self._spec.dtype else None

    @property
    def _model(self) -> Any:
        if self._loaded_model is None:
            raise RuntimeError("the leader called a rank before load()")
        return self._loaded_model


def run_within_memory(device: torch.device, work: Callable[[], T], forget: Callable[[], object] = lambda: None) -> T:
    """Return the result of ``work``; if memory runs out, call ``forget``, free the memory and raise OutOfMemory."""
    from cosmos3_core.device import forget_unused_memory, is_out_of_memory, read_peak_bytes

    try:
        return work()
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        peak_gib = read_peak_bytes(device) / 2**30
        what = f"{(str(error).splitlines() or ['an allocation failed'])[0]} (most held so far: {peak_gib:.2f} GiB)"
    # After the except block: the error's traceback would keep the failed work's tensors alive.
    forget()
    forget_unused_memory(device)
    raise OutOfMemory(what)
