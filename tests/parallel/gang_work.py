"""What rank processes do in the tests of layouts, on CPUs and on GPUs. Needs torch, no pytest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_transformer
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.parallel.apply import branch_share, parallelize
from cosmos3_core.parallel.groups import Groups
from cosmos3_core.shapes import LatentShape

# 3 x 3 x 5 tokens: 45, which 2 does not divide and 3 does; 2 x 2 x 5: 20, which 3 does not.
REQUESTS: dict[str, dict[str, Any]] = {
    "guided": {"latent_shape": (3, 5, 9), "guidance_scale": 6.0, "num_inference_steps": 6},
    "unguided": {"latent_shape": (3, 5, 9), "guidance_scale": 1.0, "num_inference_steps": 3},
    "indivisible": {"latent_shape": (2, 4, 10), "guidance_scale": 3.0, "num_inference_steps": 3},
}


def small_request(fields: dict[str, Any]) -> DenoiseRequest:
    """One of :data:`REQUESTS`, or another with these fields."""
    shaped = {**fields, "latent_shape": LatentShape(*fields["latent_shape"])}
    return DenoiseRequest((5, 6, 7, 8), (3, 4), fps=24.0, schedule="native", flow_shift=10.0, seed=1, **shaped)


def sharded_denoiser(
    groups: Groups, device: torch.device, checkpoint: Path, dtype: torch.dtype | None = None
) -> Denoiser:
    """A rank's share of the transformer, with the collectives in place."""
    files = CheckpointLayout.open(checkpoint)
    transformer = load_transformer(files, device=device, dtype=dtype, shard=groups.layout.shard(groups.rank))
    parallelize(transformer, groups)
    return Denoiser(transformer, files.geometry, files.scheduler, branch_share=branch_share(groups))


def final_latents(
    groups: Groups, device: torch.device, checkpoint: Path, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Every request twice, ``name/first`` and ``name/again``, and how many ``prefills`` that took."""
    denoiser = sharded_denoiser(groups, device, checkpoint, dtype)
    results = {}
    for name, fields in REQUESTS.items():
        for attempt in ("first", "again"):
            state = denoiser.run(denoiser.prepare(small_request(fields)))
            results[f"{name}/{attempt}"] = state.latents["video"].float().cpu()
    return {**results, "prefills": torch.tensor(denoiser.text_cache.num_prefills)}
