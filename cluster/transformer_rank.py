"""One rank of a transformer gang: steps requests through its share of the transformer."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cluster.envelope import TensorEnvelope
from cluster.errors import PreviewFailed
from cluster.events import StepDone
from cluster.layer_gate import LayerGate
from cluster.logs import LogOrigin
from cluster.rank import Loaded, Rank, RankSpec, run_within_memory
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.preview import PreviewMap, pick_evenly
from cosmos3_core.prompt_ledger import PromptOrders, RequestMemory
from cosmos3_core.shapes import LatentShape

if TYPE_CHECKING:
    from cosmos3_core.denoiser import DenoisePlan, Denoiser
    from cosmos3_core.parallel.groups import Groups
    from cosmos3_core.sampler.state import DenoiseState

_WARM_UP = DenoiseRequest(
    text_ids=(1, 2),
    negative_text_ids=(2,),
    latent_shape=LatentShape(2, 2, 2),
    fps=24.0,
    num_inference_steps=2,
    guidance_scale=2.0,
    schedule="native",
    flow_shift=10.0,
    seed=0,
)


# Of a longer step each layer is awaited, not just queued on the device: only then can it be abandoned between two.
_AWAIT_LAYERS_ABOVE_S = 2.0


@dataclass(frozen=True)
class TransformerSpec(RankSpec):
    """Settings from which a rank of a transformer gang loads its share: ``layout`` spreads the model over the ranks."""

    layout: Layout = field(default_factory=Layout)

    @property
    def num_ranks(self) -> int:
        return self.layout.num_ranks

    @property
    def rank_class(self) -> type[Rank]:
        return TransformerRank

    @property
    def warm_up(self) -> list[tuple[str, tuple[Any, ...]]]:
        return [
            ("begin", ("warm up", _WARM_UP, PromptOrders())),
            ("step", ("warm up", 2)),
            ("read_state", ("warm up",)),
            ("end", ("warm up",)),
        ]


@dataclass(frozen=True)
class TransformerLoaded(Loaded):
    """Report of a transformer rank that has loaded, with the memory that requests hold on it."""

    request_memory: RequestMemory


@dataclass(frozen=True)
class StepReport:
    """Report of a quantum: its steps, and the seconds that they took together."""

    steps: tuple[StepDone, ...]
    seconds: float


class TransformerRank(Rank):
    """Steps requests through this rank's share of the transformer."""

    def __init__(self, rank: int, spec: TransformerSpec) -> None:
        super().__init__(rank, spec)
        self._layout = spec.layout
        self._groups: Groups | None = None
        self._jobs: dict[str, tuple[DenoisePlan, DenoiseState]] = {}
        self._gate = LayerGate()
        self._awaits_layers = False

    def _make_groups(self, store: Any) -> None:
        from cosmos3_core.device import collective_backend
        from cosmos3_core.parallel.groups import init_groups

        backend, timeout_s = collective_backend(self._device), self._spec.collective_timeout_s
        self._groups = init_groups(self._layout, self._rank, backend=backend, timeout_s=timeout_s, store=store)

    def load(self) -> TransformerLoaded:
        """Load this rank's share of the transformer."""
        import torch

        from cosmos3_core.checkpoint.layout import CheckpointLayout
        from cosmos3_core.checkpoint.load import load_transformer
        from cosmos3_core.denoiser import Denoiser
        from cosmos3_core.ops.registry import names_of
        from cosmos3_core.parallel.apply import branch_share, parallelize
        from cosmos3_core.parallel.groups import ALONE

        start_s = time.perf_counter()
        torch.set_num_threads(self._spec.num_threads)
        layout = CheckpointLayout.open(self._spec.checkpoint)
        groups = self._groups if self._groups is not None else ALONE
        transformer = load_transformer(
            layout, device=self._device, dtype=self._dtype, shard=groups.layout.shard(groups.rank)
        )
        parallelize(transformer, groups)
        denoiser = self._loaded_model = Denoiser(
            transformer, layout.geometry, layout.scheduler, branch_share=branch_share(groups)
        )
        for layer in transformer.generation.layers:
            layer.register_forward_pre_hook(self._enter_layer)
        seconds = time.perf_counter() - start_s
        return TransformerLoaded(seconds, names_of(transformer.ops), denoiser.request_memory)

    def begin(
        self,
        try_id: str,
        request: DenoiseRequest,
        orders: PromptOrders,
        saved: TensorEnvelope | None = None,
        clean: TensorEnvelope | None = None,
        origin: LogOrigin | None = None,
    ) -> None:
        """Prefill a request's prompts and make its first state, or resume from a saved one.

        Args:
            try_id: its name in later calls.
            orders: which prompts to keep, which to drop.
            saved: returned by :meth:`read_state` on this gang or another.
            clean: latents of the frames that the request gives, fp32 [1, C, frames, H, W].

        Raises:
            RequestError: the request's fault; nothing of it is kept.
            StateError: the saved state is another request's, or damaged.
            OutOfMemory: it does not fit; nothing of it is kept.
        """
        from cosmos3_core.sampler.state import DenoiseState

        denoiser: Denoiser = self._model

        def begin() -> tuple[DenoisePlan, DenoiseState]:
            plan = denoiser.prepare(replace(request, clean_latents=None if clean is None else clean.tensor()), orders)
            if saved is None:
                return plan, denoiser.start(plan)
            return plan, denoiser.resume(plan, DenoiseState.from_bytes(saved.data.tobytes()))

        with self._log.begin(try_id, origin):
            self._jobs[try_id] = run_within_memory(self._device, begin, lambda: self.end(try_id))

    def _enter_layer(self, *_: object) -> None:
        from cosmos3_core.device import synchronize

        if self._awaits_layers:
            synchronize(self._device)
        self._gate.enter_layer()

    def call_gate(self, method: str, *arguments: Any) -> Any:
        """Call a method of the gate between layers, beside a step that runs in another thread."""
        return getattr(self._gate, method)(*arguments)

    def step(self, try_id: str, num_steps: int) -> StepReport:
        """Run up to ``num_steps`` steps of a request; on OutOfMemory nothing of it is kept.

        Raise StepAbandoned if the leader has all ranks leave a step: the request is as before the call.
        """
        from cosmos3_core.device import synchronize

        start_s = time.perf_counter()
        denoiser: Denoiser = self._model
        done: list[tuple[int, int, float]] = []

        def step() -> tuple[DenoisePlan, DenoiseState]:
            plan, state = self._jobs[try_id]
            for _ in range(min(num_steps, plan.num_steps - state.step_index)):
                self._gate.begin_step(denoiser.count_layers(plan, state))
                try:
                    state = denoiser.step(plan, state)
                finally:
                    self._gate.end_step()
                done.append((state.step_index, plan.num_steps, plan.solver.schedule.sigmas[state.step_index]))
            synchronize(denoiser.transformer.device)  # a quantum is over when its steps are done, not queued
            return plan, state

        with self._log.resume(try_id, "step"):
            self._jobs[try_id] = run_within_memory(self._device, step, lambda: self.end(try_id))
        seconds = time.perf_counter() - start_s
        self._awaits_layers = seconds > _AWAIT_LAYERS_ABOVE_S * len(done)
        return StepReport(tuple(StepDone(*it, seconds / len(done), os.getpid()) for it in done), seconds)

    def read_state(self, try_id: str) -> TensorEnvelope:
        """Return a request's state, as bytes for :meth:`begin`."""
        import numpy as np

        _, state = self._jobs[try_id]
        return TensorEnvelope.of_array(np.frombuffer(state.to_bytes(), np.uint8))

    def preview(self, try_id: str, preview_map: PreviewMap, max_frames: int) -> TensorEnvelope:
        """Predict the pictures of a request from its last step: uint8 RGB [frames, H, W, 3].

        One pixel for each latent position, of at most ``max_frames`` latent frames, evenly spaced. Every rank holds the
        whole prediction, so one rank suffices.

        Raises:
            PreviewFailed: on any error; the request is as it was.
        """
        try:
            _, state = self._jobs[try_id]
            x0_BCTHW = state.solver["video"].x0[0]
            frames = pick_evenly(x0_BCTHW.shape[2], max_frames)
            return TensorEnvelope.of_tensor(preview_map.colours(x0_BCTHW[:, :, frames]))
        except Exception as error:  # noqa: BLE001 - a rank that raises anything else fails its gang, with all requests
            raise PreviewFailed(f"{type(error).__name__}: {error}") from None

    def latents(self, try_id: str) -> dict[str, TensorEnvelope]:
        """Return the latents as they are now, modality -> fp32; see :meth:`cosmos3_core.engine.Engine.denoise`."""
        _, state = self._jobs[try_id]
        return {name: TensorEnvelope.of_tensor(latents) for name, latents in state.latents.items()}

    def end(self, try_id: str) -> None:
        """Forget a request, if it is there."""
        self._jobs.pop(try_id, None)
        self._log.end(try_id)
