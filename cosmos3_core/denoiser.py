"""Denoising, one step at a time: prompts and a shape in, latents out.

:meth:`Denoiser.prepare` turns a request into a :class:`DenoisePlan` (prompts prefilled, schedule and positions
computed); :meth:`Denoiser.start` and :meth:`Denoiser.step` move a :class:`DenoiseState` through it. Plans and states
are values: requests can be interleaved, and any process that prepares the same request can resume a state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cosmos3_core.checkpoint.configs import SchedulerConfig
from cosmos3_core.conditioning.initial import initial_states
from cosmos3_core.conditioning.state import LatentState
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import RequestError, StateError
from cosmos3_core.model.rope import RopeTable, after_text, rope_table
from cosmos3_core.model.text_cache import TextCache
from cosmos3_core.model.towers import TextKV
from cosmos3_core.model.transformer import Cosmos3Transformer
from cosmos3_core.parallel.collectives import BranchShare
from cosmos3_core.prompt_ledger import PromptLedger, PromptOrders, RequestMemory
from cosmos3_core.sampler.guidance import guide
from cosmos3_core.sampler.schedule import make_schedule
from cosmos3_core.sampler.state import DenoiseState
from cosmos3_core.sampler.unipc import SolverState, UniPC
from cosmos3_core.shapes import Geometry

DEFAULT_TEXT_CACHE_BYTES = 4 * 2**30

# fp32 tensors of one latent's size that a request holds: sample, corrected sample, two x0 predictions, initial latents.
_STATE_TENSORS = 5


@dataclass(frozen=True)
class Branch:
    """One side of guidance: a prompt, and the positions of the generated tokens after it."""

    text: TextKV
    rope: RopeTable


@dataclass(frozen=True)
class DenoisePlan:
    """Everything that stays the same over the steps of one request, on the transformer's device.

    Attributes:
        num_branches: 2 where guidance needs the unconditional branch, else 1.
        branches: the branches that run here, the conditional one first.
        guidance_scale: weight of guidance.
        guidance_interval: lowest and highest timestep with guidance; None: all.
        solver: solver for the request's schedule.
        initial: modality -> its start, in the order of the tokens.
        partly_fixed: modalities with values that denoising leaves unchanged.
        domain_id: the embodiment's, with actions.
        fingerprint: hash that identifies request and model.
    """

    num_branches: int
    branches: tuple[Branch, ...]
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    solver: UniPC
    initial: Mapping[str, LatentState]
    partly_fixed: tuple[str, ...]
    domain_id: int | None
    fingerprint: str

    @property
    def num_steps(self) -> int:
        return len(self.solver.schedule.timesteps)

    @property
    def noise_masks(self) -> dict[str, Tensor]:
        """modality -> 1 where a latent frame is noisy, 0 where it is a clean condition; [T] fp32."""
        return {name: state.noise_mask for name, state in self.initial.items()}

    def num_branches_at(self, timestep: int) -> int:
        """Return how many branches run at a timestep: one outside the guidance interval."""
        low, high = self.guidance_interval or (timestep, timestep)
        return self.num_branches if low <= timestep <= high else 1


@dataclass(frozen=True)
class StepEvent:
    """A finished denoising step.

    Attributes:
        step: number of finished steps, from 1.
        num_steps: number of steps of the request.
        sigma: noise level after the step; 0 after the last one.
        state: state of the request after the step.
    """

    step: int
    num_steps: int
    sigma: float
    state: DenoiseState


class Denoiser:
    """Steps requests through the transformer. Keeps nothing of a request but its prompts, in a bounded cache.

    Args:
        transformer: loaded, on its device.
        geometry, scheduler: the checkpoint's.
        branch_share: splits the guidance branches over ranks; None runs both here.
    """

    def __init__(
        self,
        transformer: Cosmos3Transformer,
        geometry: Geometry,
        scheduler: SchedulerConfig,
        *,
        text_cache_bytes: int = DEFAULT_TEXT_CACHE_BYTES,
        branch_share: BranchShare | None = None,
    ) -> None:
        self.transformer = transformer
        self.geometry = geometry
        self.scheduler = scheduler
        self._branch_share = branch_share
        self.text_cache = TextCache(transformer.prefill)
        self._ledger = PromptLedger(text_cache_bytes, self.request_memory.bytes_per_text_token)

    @property
    def request_memory(self) -> RequestMemory:
        """The memory that a request holds on this rank, by its shape."""
        config, size = self.transformer.config, self.transformer.dtype.itemsize
        return RequestMemory(
            bytes_per_latent=_STATE_TENSORS * config.latent_channel * 4,
            bytes_per_sound_latent=_STATE_TENSORS * config.sound_dim * 4,
            bytes_per_action=_STATE_TENSORS * config.action_dim * 4,
            bytes_per_token=2 * config.head_dim * size,  # half a head of cosines, half of sines, for both branches
            bytes_per_text_token=2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * size,
            patch_size=config.latent_patch_size,
        )

    def forget_prompts(self) -> None:
        """Empty the prompt cache: the next request prefills."""
        self.text_cache.drop(self._ledger.forget())

    @torch.no_grad()
    def prepare(self, request: DenoiseRequest, orders: PromptOrders | None = None) -> DenoisePlan:
        """Prefill the prompts and compute everything that stays the same from step to step.

        Args:
            orders: prompts to keep and to drop, decided once for all ranks; None decides here.

        Raises:
            RequestError: token ids are outside the vocabulary, given latents or noise have another shape, or the
                schedule is unknown.
            CapabilityError: the transformer has no weights for the sound or actions.
        """
        schedule = make_schedule(
            request.schedule, request.num_inference_steps, flow_shift=request.flow_shift, config=self.scheduler
        )
        initial = initial_states(request, geometry=self.geometry, config=self.transformer.config)
        prompts = request.prompts
        # Every rank checks both prompts, even one that another rank runs, so that all raise the same error.
        for name, prompt in zip(("text_ids", "negative_text_ids"), prompts, strict=False):
            self._check_ids(name, prompt)
        # A rank with a share of the branches prefills its own prompt only.
        share, num_latent_frames = self._branch_share, request.latent_shape.num_frames
        own = range(len(prompts)) if share is None else share.own_branches(len(prompts), num_latent_frames)
        if orders is None:
            orders = self._ledger.admit(prompts)
        texts = self.text_cache.fetch([prompts[index] for index in own], orders)
        # In each branch the generated tokens follow its own text.
        config, device, dtype = self.transformer.config, self.transformer.device, self.transformer.dtype
        positions = torch.cat([state.positions for state in initial.values()], dim=1)
        moved = [after_text(positions, text.num_tokens, config) for text in texts]
        ropes = [rope_table(places, config, device=device, dtype=dtype) for places in moved]
        return DenoisePlan(
            num_branches=len(prompts),
            branches=tuple(map(Branch, texts, ropes)),
            guidance_scale=request.guidance_scale,
            guidance_interval=request.guidance_interval,
            solver=UniPC(schedule),
            initial={name: state.to(device) for name, state in initial.items()},
            partly_fixed=tuple(name for name, state in initial.items() if state.is_partly_fixed),
            domain_id=None if request.action is None else request.action.domain_id,
            fingerprint=self._fingerprint(request),
        )

    def start(self, plan: DenoisePlan) -> DenoiseState:
        """Return the state before the first step."""
        solver = {name: SolverState(state.latent) for name, state in plan.initial.items()}
        return DenoiseState(0, solver, plan.fingerprint)

    def resume(self, plan: DenoisePlan, state: DenoiseState) -> DenoiseState:
        """Move a saved state to this transformer's device, from any process.

        Raises:
            StateError: the state belongs to another request or model, or has no step left.
        """
        _check_state(plan, state)
        return state.to(self.transformer.device)

    @torch.no_grad()
    def step(self, plan: DenoisePlan, state: DenoiseState) -> DenoiseState:
        """Run one denoising step; leaves the given state unchanged.

        Raises:
            StateError: the state belongs to another request, or has no step left.
        """
        _check_state(plan, state)
        velocity = self._guide_velocity(plan, state)
        solver = {name: plan.solver.step(state.solver[name], state.step_index, velocity[name]) for name in plan.initial}
        for name in plan.partly_fixed:
            # A clean frame's velocity is zero; that of an unused number of an action may be anything.
            solver[name] = replace(solver[name], sample=plan.initial[name].restore(solver[name].sample))
        return DenoiseState(state.step_index + 1, solver, state.fingerprint)

    def count_layers(self, plan: DenoisePlan, state: DenoiseState) -> int:
        """Return how many layers of the generation tower the next step runs here, over all its forward passes."""
        num_branches = plan.num_branches_at(plan.solver.schedule.timesteps[state.step_index])
        return len(self._own_branches(plan, num_branches)) * len(self.transformer.generation.layers)

    def run(
        self, plan: DenoisePlan, state: DenoiseState | None = None, on_step: Callable[[StepEvent], None] | None = None
    ) -> DenoiseState:
        """Step from a state, or from the start, to the end of the schedule.

        Args:
            state: a state of the request on any device; None begins at the start.
            on_step: called after every step; an exception that it raises ends the run.

        Raises:
            StateError: the state belongs to another request.
        """
        state = self.start(plan) if state is None else state.to(self.transformer.device)
        while state.step_index < plan.num_steps:
            state = self.step(plan, state)
            if on_step is not None:
                sigma = plan.solver.schedule.sigmas[state.step_index]
                on_step(StepEvent(state.step_index, plan.num_steps, sigma, state))
        return state

    def _guide_velocity(self, plan: DenoisePlan, state: DenoiseState) -> dict[str, Tensor]:
        timestep = plan.solver.schedule.timesteps[state.step_index]
        # In the order of the positions, the same on all ranks: a saved state does not keep it.
        latents = {name: state.latents[name] for name in plan.initial}
        num_branches, share = plan.num_branches_at(timestep), self._branch_share
        predictions = [
            self.transformer.velocity(latents, plan.noise_masks, timestep, branch.text, branch.rope, plan.domain_id)
            for branch in self._own_branches(plan, num_branches)
        ]
        if share is not None:
            own = {name: velocity.float() for name, velocity in predictions[0].items()} if predictions else None
            predictions = share.exchange(own, latents, num_branches)
        if num_branches == 1:
            return {name: velocity.float() for name, velocity in predictions[0].items()}
        conditional, unconditional = predictions
        return {name: guide(conditional[name], unconditional[name], plan.guidance_scale) for name in conditional}

    def _own_branches(self, plan: DenoisePlan, num_branches: int) -> tuple[Branch, ...]:
        """Return the branches that run here at a step; a rank with the unconditional one may have none."""
        share = self._branch_share
        return plan.branches[:num_branches] if share is None or share.index < num_branches else ()

    def _fingerprint(self, request: DenoiseRequest) -> str:
        """Hash the request and the fields of the config that no split changes: the same on every rank."""
        config = self.transformer.config
        model = (config.hidden_size, config.num_hidden_layers, config.head_dim, config.vocab_size, config.rope_theta)
        return hashlib.sha256(f"{model} {request.fingerprint}".encode()).hexdigest()

    def _check_ids(self, name: str, text_ids: tuple[int, ...]) -> None:
        last = self.transformer.config.vocab_size - 1
        if not text_ids or min(text_ids) < 0 or max(text_ids) > last:
            given = f"ids {min(text_ids)} to {max(text_ids)}" if text_ids else "no ids"
            raise RequestError(name, given, f"at least one, each from 0 to {last}")


def _check_state(plan: DenoisePlan, state: DenoiseState) -> None:
    if state.fingerprint != plan.fingerprint:
        raise StateError(
            "this denoise state belongs to another request or model: prompts, shape, schedule or seed differ"
        )
    if not 0 <= state.step_index < plan.num_steps:
        raise StateError(f"no step {state.step_index} in a schedule of {plan.num_steps} steps")
