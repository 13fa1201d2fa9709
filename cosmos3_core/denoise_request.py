"""A tokenized request in the form that the transformer takes, a value that can cross processes. No torch here."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cosmos3_core import checks
from cosmos3_core.actions import ActionTrack
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS, SCHEDULES
from cosmos3_core.request import FIELDS, ResolvedRequest
from cosmos3_core.sampler.guidance import needs_two_branches
from cosmos3_core.shapes import Geometry, LatentShape

if TYPE_CHECKING:
    from torch import Tensor

# Four times the usual 25 latents per second.
_MAX_SOUND_LATENTS = math.ceil(LIMITS.max_sound_s * 100)


@dataclass(frozen=True)
class ActionLatents:
    """Actions in the form that the transformer takes.

    Attributes:
        num_actions: number of actions.
        domain_id: row of the action projections.
        width: numbers in an action; the model's other numbers stay zero.
        given: ``num_actions`` rows of ``width``; None where they are generated.
    """

    num_actions: int
    domain_id: int
    width: int
    given: tuple[tuple[float, ...], ...] | None = None

    @classmethod
    def of(cls, track: ActionTrack | None) -> ActionLatents | None:
        """Take the actions of a resolved request."""
        return None if track is None else cls(track.chunk_size, track.domain_id, track.width, track.given)


@dataclass(frozen=True)
class DenoiseRequest:
    """Everything that decides the final latents, except the checkpoint.

    Attributes:
        text_ids: the prompt's token ids.
        negative_text_ids: the unconditional branch's; not read without guidance.
        latent_shape: latent frames, rows, columns.
        fps: pixel frames per second.
        num_inference_steps, guidance_scale, schedule, flow_shift, seed, guidance_interval: see
            :class:`cosmos3_core.GenerationRequest`.
        clean_frames: latent frames that are given, ascending.
        clean_latents: those frames, [1, C, len(clean_frames), rows, columns]; the VAE's, so they may be added later.
        num_sound_latents: 0 for none.
        action: None for none.
        noise: modality -> initial noise instead of the seed's.

    Raises:
        RequestError: a field is out of bounds.
    """

    text_ids: tuple[int, ...]
    negative_text_ids: tuple[int, ...]
    latent_shape: LatentShape
    fps: float
    num_inference_steps: int
    guidance_scale: float
    schedule: str
    flow_shift: float
    seed: int
    guidance_interval: tuple[float, float] | None = None
    clean_frames: tuple[int, ...] = ()
    clean_latents: Tensor | None = field(default=None, compare=False, repr=False)
    num_sound_latents: int = 0
    action: ActionLatents | None = None
    noise: Mapping[str, Tensor] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if len(self.latent_shape) != 3 or not all(isinstance(n, int) and n >= 1 for n in self.latent_shape):
            raise RequestError(
                "video_shape", tuple(self.latent_shape), "latent (frames, rows, columns), each at least 1"
            )
        for name in ("fps", "num_inference_steps", "guidance_scale", "flow_shift", "seed"):
            FIELDS[name].check(name, getattr(self, name))
        checks.choice("schedule", self.schedule, SCHEDULES)
        if self.clean_frames and not 0 <= min(self.clean_frames) <= max(self.clean_frames) < self.latent_shape[0]:
            raise RequestError("clean_frames", self.clean_frames, f"latent frames below {self.latent_shape[0]}")
        checks.integer("num_sound_latents", self.num_sound_latents, 0, _MAX_SOUND_LATENTS)
        if self.noise is not None:
            _check_noise(self.noise)

    @classmethod
    def of(
        cls, request: ResolvedRequest, text_ids: Sequence[int], negative_text_ids: Sequence[int], geometry: Geometry
    ) -> DenoiseRequest:
        """Build the request from a resolved one and the token ids of its two prompts, without clean latents."""
        return cls(
            text_ids=tuple(text_ids),
            negative_text_ids=tuple(negative_text_ids),
            latent_shape=geometry.latent_shape(request.num_frames, request.height, request.width),
            fps=request.fps,
            num_inference_steps=request.num_inference_steps,
            guidance_scale=request.guidance_scale,
            schedule=request.schedule,
            flow_shift=request.flow_shift,
            seed=request.seed,
            guidance_interval=request.guidance_interval,
            clean_frames=request.picture.clean_frames if request.picture is not None else (),
            num_sound_latents=request.num_sound_latents,
            action=ActionLatents.of(request.action),
            noise=request.noise,
        )

    @property
    def prompts(self) -> tuple[tuple[int, ...], ...]:
        """Token ids of the guidance branches that run, the conditional one first."""
        if needs_two_branches(self.guidance_scale):
            return self.text_ids, self.negative_text_ids
        return (self.text_ids,)

    @property
    def fingerprint(self) -> str:
        """Hash that identifies the request, the same in any process; given noise counts by its values."""
        noise = {name: _hash_of(x) for name, x in (self.noise or {}).items()}
        clean = None if self.clean_latents is None else _hash_of(self.clean_latents)
        action = None if self.action is None else dataclasses.astuple(self.action)
        parts = [
            self.text_ids,
            self.negative_text_ids if needs_two_branches(self.guidance_scale) else (),
            [*self.latent_shape, float(self.fps), self.num_inference_steps, float(self.guidance_scale)],
            [self.schedule, float(self.flow_shift), self.seed, noise],
            [self.guidance_interval, self.clean_frames, clean, self.num_sound_latents, action],
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_of(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().float().numpy().tobytes()).hexdigest()


def _check_noise(noise: Mapping[str, Tensor]) -> None:
    import torch

    if not isinstance(noise, Mapping):
        raise RequestError("noise", type(noise).__name__, "a mapping of modality to tensor")
    for name, tensor in noise.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise RequestError(
                f"noise.{name}", getattr(tensor, "dtype", type(tensor).__name__), "a floating point tensor"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise RequestError(f"noise.{name}", "NaN or infinite values", "finite numbers")
