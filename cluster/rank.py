"""One rank of a gang: a process that holds its share of the transformer and does what the leader says.

A plain class; :mod:`cluster.gang` turns it into an actor. Calls come one at a time and in order. The contract of all
ranks of a gang: an error that is the request's fault is raised, alike on every rank, by :meth:`Rank.begin`, before any
rank works; whatever else goes wrong on one rank, out of memory among it, fails a gang of several as a whole, which is
then rebuilt.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from cluster.envelope import TensorEnvelope
from cluster.errors import OutOfMemory, PreviewFailed
from cosmos3_core.admission import PromptOrders, RequestMemory
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.preview import PreviewMap, evenly

if TYPE_CHECKING:
    from cosmos3_core.denoiser import DenoisePlan, Denoiser
    from cosmos3_core.parallel.groups import Groups
    from cosmos3_core.sampler.state import DenoiseState

T = TypeVar("T")


@dataclass(frozen=True)
class RankSpec:
    """What a rank has to load, and how.

    Attributes:
        checkpoint: directory in the published layout; the same path on every node.
        device: torch device string.
        dtype: name of the weights' dtype, "bfloat16" say; None keeps what is stored.
        num_threads: torch's CPU threads in the rank's process.
        layout: how the model spreads over the gang's ranks.
        collective_timeout_s: for meeting the other ranks, and for every exchange with them.
    """

    checkpoint: str
    device: str
    dtype: str | None
    num_threads: int
    layout: Layout = field(default_factory=Layout)
    collective_timeout_s: float = 600.0


@dataclass(frozen=True)
class RankInfo:
    """Where a rank lives."""

    rank: int
    pid: int
    node_id: str


@dataclass(frozen=True)
class Loaded:
    """What came of loading.

    Attributes:
        seconds: it took.
        request_memory: what requests hold of this rank's memory.
        ops: operator -> implementation that was chosen for the device.
    """

    seconds: float
    request_memory: RequestMemory
    ops: dict[str, str]


@dataclass(frozen=True)
class Step:
    """A step that was done.

    Attributes:
        step: steps done so far, this one included.
        num_steps: of the request.
        sigma: noise level that is left.
        pid: of the rank.
    """

    step: int
    num_steps: int
    sigma: float
    pid: int


@dataclass(frozen=True)
class StepReport:
    """What came of a quantum: its steps, and the seconds that they took together."""

    steps: tuple[Step, ...]
    seconds: float


class Rank:
    """See the module.

    Args:
        rank: its number in the gang.
        spec: what to load.
    """

    def __init__(self, rank: int, spec: RankSpec) -> None:
        self._rank = rank
        self._spec = spec
        self._groups: Groups | None = None
        self._store: Any = None
        self._denoiser: Denoiser | None = None
        self._jobs: dict[str, tuple[DenoisePlan, DenoiseState]] = {}

    def describe(self) -> RankInfo:
        """Where this rank runs; answering means that its process is up."""
        import ray

        return RankInfo(self._rank, os.getpid(), ray.get_runtime_context().get_node_id())

    def host(self) -> tuple[str, int]:
        """Rank 0's: open the ranks' meeting place on a free port and hold it; returns (address, port)."""
        import ray

        from cosmos3_core.parallel.groups import host_store

        address = ray.util.get_node_ip_address()
        self._store = host_store(address, self._spec.layout.num_ranks, self._spec.collective_timeout_s)
        return address, self._store.port

    def join(self, address: str, port: int) -> None:
        """Meet the other ranks and make the process groups. Every rank calls it at the same time."""
        from cosmos3_core.device import collective_backend, resolve_device
        from cosmos3_core.parallel.groups import init_groups, join_store

        spec = self._spec
        if self._store is None:
            self._store = join_store(address, port, spec.layout.num_ranks, spec.collective_timeout_s)
        self._groups = init_groups(
            spec.layout,
            self._rank,
            backend=collective_backend(resolve_device(spec.device)),
            timeout_s=spec.collective_timeout_s,
            store=self._store,
        )

    def load(self) -> Loaded:
        """Load the transformer.

        Raises:
            CheckpointError, RequestError: the checkpoint or the device cannot be used.
        """
        import torch

        from cosmos3_core.checkpoint.layout import CheckpointLayout
        from cosmos3_core.checkpoint.load import load_transformer
        from cosmos3_core.denoiser import Denoiser
        from cosmos3_core.device import DTYPES, resolve_device
        from cosmos3_core.ops.registry import names_of
        from cosmos3_core.parallel.apply import branch_share, parallelize
        from cosmos3_core.parallel.groups import ALONE

        start_s = time.perf_counter()
        torch.set_num_threads(self._spec.num_threads)
        layout = CheckpointLayout.open(self._spec.checkpoint)
        groups = self._groups if self._groups is not None else ALONE
        transformer = load_transformer(
            layout,
            device=resolve_device(self._spec.device),
            dtype=DTYPES[self._spec.dtype] if self._spec.dtype else None,
            shard=groups.layout.shard(groups.rank),
        )
        parallelize(transformer, groups)
        self._denoiser = Denoiser(
            transformer,
            layout.geometry,
            layout.scheduler,
            branch_share=branch_share(groups),
        )
        return Loaded(time.perf_counter() - start_s, self._denoiser.request_memory, names_of(transformer.ops))

    def begin(
        self,
        job_id: str,
        request: DenoiseRequest,
        orders: PromptOrders,
        saved: TensorEnvelope | None = None,
        clean: TensorEnvelope | None = None,
    ) -> None:
        """Prefill a request's prompts and make its first state, or take up a saved one.

        Args:
            job_id: its name in later calls.
            request: what is asked for.
            orders: which prompts to keep, which to drop.
            saved: what :meth:`save` gave, on this gang or another.
            clean: latents of the frames that the request gives, fp32 [1, C, frames, H, W].

        Raises:
            RequestError: the request's fault; nothing of it is kept.
            StateError: the saved state is another request's, or damaged.
            OutOfMemory: it does not fit; nothing of it is kept.
        """
        from cosmos3_core.sampler.state import DenoiseState

        denoiser = self._loaded()

        def begin() -> tuple[DenoisePlan, DenoiseState]:
            plan = denoiser.prepare(request.with_clean_latents(None if clean is None else clean.tensor()), orders)
            if saved is None:
                return plan, denoiser.start(plan)
            return plan, denoiser.resume(plan, DenoiseState.from_bytes(saved.data.tobytes()))

        self._jobs[job_id] = self._if_it_fits(job_id, begin)

    def step(self, job_id: str, num_steps: int) -> StepReport:
        """Run up to ``num_steps`` steps of a request.

        Raises:
            OutOfMemory: they do not fit; nothing of the request is kept.
        """
        from cosmos3_core.device import synchronize

        start_s = time.perf_counter()
        denoiser = self._loaded()
        steps = []

        def step() -> tuple[DenoisePlan, DenoiseState]:
            plan, state = self._jobs[job_id]
            for _ in range(min(num_steps, plan.num_steps - state.step_index)):
                state = denoiser.step(plan, state)
                sigma = plan.solver.schedule.sigmas[state.step_index]
                steps.append(Step(state.step_index, plan.num_steps, sigma, os.getpid()))
            synchronize(denoiser.transformer.device)  # a quantum is over when its steps are done, not queued
            return plan, state

        self._jobs[job_id] = self._if_it_fits(job_id, step)
        return StepReport(tuple(steps), time.perf_counter() - start_s)

    def save(self, job_id: str) -> TensorEnvelope:
        """A request's state, as bytes for :meth:`begin`."""
        import numpy as np

        _, state = self._jobs[job_id]
        return TensorEnvelope.of_array(np.frombuffer(state.to_bytes(), np.uint8))

    def preview(self, job_id: str, preview_map: PreviewMap, max_frames: int) -> TensorEnvelope:
        """What the pictures of a request are going to be, by its last step: uint8 RGB [frames, H, W, 3].

        A pixel is a latent position; of the latent frames up to ``max_frames``, evenly. Every rank holds the whole
        prediction, so one can be asked alone.

        Raises:
            PreviewFailed: whatever went wrong; the request is as it was.
        """
        try:
            _, state = self._jobs[job_id]
            x0_BCTHW = state.solver["video"].x0[0]
            frames = evenly(x0_BCTHW.shape[2], max_frames)
            return TensorEnvelope.of_tensor(preview_map.colours(x0_BCTHW[:, :, frames]))
        except Exception as error:  # noqa: BLE001 - a rank that raises anything else fails its gang, with all requests
            raise PreviewFailed(f"{type(error).__name__}: {error}") from None

    def latents(self, job_id: str) -> dict[str, TensorEnvelope]:
        """The latents as they are now, modality -> fp32; see :meth:`cosmos3_core.engine.Engine.denoise`."""
        _, state = self._jobs[job_id]
        return {name: TensorEnvelope.of_tensor(latents) for name, latents in state.latents.items()}

    def end(self, job_id: str) -> None:
        """Forget a request; one that is not there is fine."""
        self._jobs.pop(job_id, None)

    def _if_it_fits(self, job_id: str, work: Callable[[], T]) -> T:
        """What ``work`` returns.

        Raises:
            OutOfMemory: it did not fit; the request is forgotten.
        """
        from cosmos3_core.device import forget_unused_memory, is_out_of_memory

        try:
            return work()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            what = str(error).splitlines()[0]
        # Only here: as long as the error is there, its traceback holds all that the failed work had in its hands.
        self._jobs.pop(job_id, None)
        forget_unused_memory(self._loaded().transformer.device)
        raise OutOfMemory(what)

    def _loaded(self) -> Denoiser:
        if self._denoiser is None:
            raise RuntimeError("the leader called a rank before load()")
        return self._denoiser
