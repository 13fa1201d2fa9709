"""The video VAE of a checkpoint against diffusers' pipeline, normalisation included."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_video_vae
from cosmos3_core.vae.video import VideoVAE


@pytest.fixture(scope="module")
def vae(tiny_nano: Path) -> VideoVAE:
    return load_video_vae(CheckpointLayout.open(tiny_nano), device=torch.device("cpu"))


def pipeline_decode(pipeline: Any, latents: Tensor) -> Tensor:
    """What the pipeline does between its last step and its pixels."""
    inv_std = pipeline._vae_latents_inv_std.view(1, -1, 1, 1, 1)
    with torch.no_grad():
        return pipeline.vae.decode(latents / inv_std + pipeline._vae_latents_mean.view(1, -1, 1, 1, 1)).sample


@pytest.mark.parametrize("shape", [(1, 4, 4), (3, 5, 4), (6, 3, 7)], ids=str)
def test_decode(
    shape: tuple[int, int, int], vae: VideoVAE, tiny_nano: Path, diffusers_pipeline: Callable[[Path], Any]
) -> None:
    latents = torch.randn((1, 48, *shape), generator=torch.Generator().manual_seed(0))
    theirs = pipeline_decode(diffusers_pipeline(tiny_nano).pipeline, latents)
    assert torch.equal(torch.cat(list(vae.decode(latents)), dim=2), theirs)
    for chunk_latents in (2, 4):
        chunked = torch.cat(list(vae.decode(latents, chunk_latents=chunk_latents)), dim=2)
        assert (chunked - theirs).abs().max() <= 1e-5


@pytest.mark.parametrize("shape", [(1, 64, 48), (9, 80, 64), (13, 48, 112)], ids=str)
def test_encode(
    shape: tuple[int, int, int],
    vae: VideoVAE,
    tiny_nano: Path,
    diffusers_pipeline: Callable[[Path], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
) -> None:
    pixels = torch.rand((1, 3, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        theirs = diffusers_pipeline(tiny_nano).pipeline._encode_video(pixels)
    assert relative_difference(vae.encode(pixels), theirs) <= 1e-5
