"""What rank processes do in the tests of layouts, on CPUs and on GPUs. Needs torch, no pytest."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from logging.handlers import QueueHandler
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_transformer
from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.parallel.apply import branch_share, parallelize
from cosmos3_core.parallel.groups import Groups
from cosmos3_core.parallel.layout import Layout
from cosmos3_core.shapes import Geometry, LatentShape
from tests.parallel.gauge import Gauge

LAYOUTS = [
    Layout(tp, cfg, sp)
    for tp, cfg, sp in (
        *((1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 1), (2, 2, 1)),
        *((1, 1, 2), (1, 1, 3), (1, 1, 4), (1, 2, 2), (2, 1, 2)),
    )
]
# 3 x 3 x 5 tokens: 45, which 2 does not divide and 3 does; 2 x 2 x 5: 20, which 3 does not.
REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {"latent_shape": (3, 5, 9), "guidance_scale": 6.0, "num_inference_steps": 4},
    "unguided": {"latent_shape": (3, 5, 9), "guidance_scale": 1.0, "num_inference_steps": 3},
    "indivisible": {"latent_shape": (2, 4, 10), "guidance_scale": 3.0, "num_inference_steps": 3},
    "unguided image": {"latent_shape": (1, 4, 6), "guidance_scale": 1.0, "num_inference_steps": 2},
    # What the modes are made of, in sums that neither 3 nor 4 divides: 45 + 7 + 1, 45 + 13, 20 + 9, 45 + 5.
    "continued, sound, one action": {
        "latent_shape": (3, 5, 9),
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "clean_frames": (0, 1),
        "num_sound_latents": 7,
        "action": ActionLatents(1, 7, 10),
    },
    "image, sound, guided in between": {
        "latent_shape": (3, 5, 9),
        "guidance_scale": 3.0,
        "num_inference_steps": 3,
        "clean_frames": (0,),
        "num_sound_latents": 13,
        "guidance_interval": (900.0, 960.0),
    },
    "actions given": {
        "latent_shape": (2, 4, 10),
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
        "clean_frames": (0,),
        "action": ActionLatents(9, 1, 2, tuple((0.1 * row, -0.5) for row in range(9))),
    },
    "actions found": {
        "latent_shape": (3, 5, 9),
        "guidance_scale": 3.0,
        "num_inference_steps": 2,
        "clean_frames": (0, 1, 2),
        "action": ActionLatents(5, 20, 10),
    },
}

TWICE = ("guided", "continued, sound, one action")
"""Requests that are run again, for equal bits."""

# Of one frame with two rows of latents, so that there can be any number.
NUM_TOKENS = [4, 7, 16, 20, 24, 33, 45, 46, 64, 65, 66, 96, 100, 129, 192, 200, 384, 390, 768, 771]


def token_counts(layout: Layout) -> list[int]:
    """Return the :data:`NUM_TOKENS` that a layout is tried with: all where bits are compared, else without the largest
    ones, which take half of the time."""
    return NUM_TOKENS if layout == Layout() or layout.sp > layout.tp else NUM_TOKENS[:-4]


def small_request(fields: dict[str, Any]) -> DenoiseRequest:
    """One of :data:`REQUESTS`, or another with these fields; frames that are given are noise of another seed."""
    shape = LatentShape(*fields["latent_shape"])
    shaped = {**fields, "latent_shape": shape}
    if "clean_frames" in fields:
        generator = torch.Generator().manual_seed(9)
        clean_shape = (1, 48, len(fields["clean_frames"]), shape.height, shape.width)
        shaped["clean_latents"] = torch.randn(clean_shape, generator=generator)
    return DenoiseRequest((5, 6, 7, 8), (3, 4), fps=24.0, schedule="native", flow_shift=10.0, seed=1, **shaped)


def modalities(fields: dict[str, Any]) -> list[str]:
    """The modalities of one of :data:`REQUESTS`."""
    return ["video", *(["sound"] if "num_sound_latents" in fields else []), *(["action"] if "action" in fields else [])]


RESULTS = [f"{name}/{modality}" for name, fields in REQUESTS.items() for modality in modalities(fields)]
"""Of :func:`final_latents`, each once."""


def share_of(num_tokens: int, layout: Layout) -> int:
    """How many of the generated tokens a rank works on, padding included."""
    return -(-num_tokens // layout.sp)


def is_kept_to_the_bit(num_tokens: int, layout: Layout) -> bool:
    """Whether one thread computes every token alike, alone and in its share.

    A row of a product does not depend on how many there are, but for MKL's kernels for one to three rows. Products of
    weights have a rank's share of rows; torch's attention on CPUs works on blocks of queries of the size below, and
    what is left behind the last full one is a block of its own. Eight rows, for a margin.
    """
    share = share_of(num_tokens, layout)
    for rows in (num_tokens, share, num_tokens - (layout.sp - 1) * share):
        block = 256 if rows >= 768 else 64 if rows >= 192 else 32
        if rows < 8 or 0 < rows % block < 8:
            return False
    return True


def is_request_kept_to_the_bit(fields: dict[str, Any], layout: Layout) -> bool:
    """:func:`is_kept_to_the_bit` for one of :data:`REQUESTS`: every modality goes in through a product of its own."""
    video = Geometry().token_grid(LatentShape(*fields["latent_shape"])).num_tokens
    counts = [video, fields.get("num_sound_latents", 0), fields["action"].num_actions if "action" in fields else 0]
    share, first, rows = share_of(sum(counts), layout), 0, list(counts)
    for count in counts:
        bounds = [min(max(rank * share - first, 0), count) for rank in range(layout.sp + 1)]
        rows += [stop - start for start, stop in zip(bounds, bounds[1:], strict=False)]
        first += count
    return all(n == 0 or n >= 8 for n in rows) and is_kept_to_the_bit(sum(counts), layout)


def load_share(groups: Groups, device: torch.device, checkpoint: Path, dtype: torch.dtype | None = None) -> Denoiser:
    """A rank's share of the transformer, with the collectives in place."""
    files = CheckpointLayout.open(checkpoint)
    transformer = load_transformer(files, device=device, dtype=dtype, shard=groups.layout.shard(groups.rank))
    parallelize(transformer, groups)
    return Denoiser(transformer, files.geometry, files.scheduler, branch_share=branch_share(groups))


def final_latents(denoiser: Denoiser) -> dict[str, Tensor]:
    """Run every request, some twice: a name of :data:`RESULTS` + ``/first`` or ``/again``; and ``prefills``, their
    number."""
    results = {}
    for name, fields in REQUESTS.items():
        for attempt in ("first", "again") if name in TWICE else ("first",):
            state = denoiser.run(denoiser.prepare(small_request(fields)))
            for modality, latents in state.latents.items():
                results[f"{name}/{modality}/{attempt}"] = latents.float().cpu()
    return {**results, "prefills": torch.tensor(denoiser.text_cache.num_prefills)}


@dataclass(frozen=True)
class Step:
    """One guided step.

    Attributes:
        velocity: of a forward pass of this rank's first branch; None where it has none.
        products, queries, received: see :class:`Gauge`; of the step.
    """

    velocity: Tensor | None
    products: dict[tuple[int, int, int], int]
    queries: dict[int, int]
    received: dict[str, int]


@dataclass(frozen=True)
class RankResult:
    """The results of one rank.

    Attributes:
        latents: see :func:`final_latents`.
        steps: one for each of :func:`token_counts`.
        unguided: a step without guidance.
        warnings: lines that the rank logged in all of that, as warnings.
    """

    latents: dict[str, Tensor]
    steps: dict[int, Step]
    unguided: Step
    warnings: list[str]


def latents_and_steps(groups: Groups, device: torch.device, checkpoint: Path) -> RankResult:
    """Run everything that the CPU tests need of a layout."""
    log = QueueHandler(SimpleQueue())
    logger = logging.getLogger("cosmos3_core")
    logger.addHandler(log)
    denoiser = load_share(groups, device, checkpoint)
    latents = final_latents(denoiser)
    steps = {num_tokens: _one_step(denoiser, num_tokens, 6.0) for num_tokens in token_counts(groups.layout)}
    unguided = _one_step(denoiser, NUM_TOKENS[0], 1.0)
    logger.removeHandler(log)
    records = [log.queue.get() for _ in range(log.queue.qsize())]
    warnings = [record.getMessage() for record in records if record.levelno >= logging.WARNING]
    return RankResult(latents, steps, unguided, warnings)


def _one_step(denoiser: Denoiser, num_tokens: int, guidance_scale: float) -> Step:
    fields = {"latent_shape": (1, 2, 2 * num_tokens), "guidance_scale": guidance_scale, "num_inference_steps": 2}
    plan = denoiser.prepare(small_request(fields))
    state = denoiser.start(plan)
    forward = {}
    with torch.no_grad():
        for branch in plan.branches[:1]:
            forward = denoiser.transformer.velocity(state.latents, plan.noise_masks, 500, branch.text, branch.rope)
    with Gauge() as gauge:
        denoiser.step(plan, state)
    return Step(forward.get("video"), dict(gauge.products), dict(gauge.queries), dict(gauge.received))
