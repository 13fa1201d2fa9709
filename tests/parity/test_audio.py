"""The audio VAE of a checkpoint against diffusers' Cosmos3AVAEAudioTokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Cosmos3AVAEAudioTokenizer
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_audio_vae
from cosmos3_core.vae.audio import AudioVAE

CPU = torch.device("cpu")
# Latents: one, two, fewer than the halo, a few windows of them, and those of the 189 frames that are the default.
LENGTHS = [1, 2, 7, 40, 197]


@pytest.fixture(scope="module", params=["nano", "super"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(f"tiny_{request.param}")


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> Callable[[torch.dtype], Any]:
    return lambda dtype: Cosmos3AVAEAudioTokenizer.from_pretrained(checkpoint / "sound_tokenizer", torch_dtype=dtype)


def random_latents(num_latents: int) -> Tensor:
    return torch.randn((64, num_latents), generator=torch.Generator().manual_seed(num_latents))


def whole(vae: AudioVAE, latents: Tensor, **chunks: int) -> Tensor:
    return torch.cat(list(vae.decode(latents, **chunks)), dim=1)


def test_decode(
    checkpoint: Path,
    reference: Callable[[torch.dtype], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
) -> None:
    vae, tokenizer = load_audio_vae(CheckpointLayout.open(checkpoint), device=CPU), reference(torch.float32)
    for num_latents in LENGTHS:
        latents = random_latents(num_latents)
        with torch.no_grad():
            theirs = tokenizer.decode(latents)
        assert theirs.shape == (2, num_latents * 1920)
        assert theirs.std() > 0.05, "a sound this quiet would prove little"
        assert (theirs.abs() == 1).float().mean() < 0.01, "a sound this loud would prove little"
        assert relative_difference(whole(vae, latents), theirs) <= 1e-5
        assert relative_difference(whole(vae, latents, chunk_latents=16), theirs) <= 1e-5


def test_decode_in_bfloat16(
    checkpoint: Path,
    reference: Callable[[torch.dtype], Any],
    relative_difference: Callable[[Tensor, Tensor], float],
) -> None:
    layout = CheckpointLayout.open(checkpoint)
    vae, tokenizer = load_audio_vae(layout, device=CPU, dtype=torch.bfloat16), reference(torch.bfloat16)
    exact = load_audio_vae(layout, device=CPU)
    for num_latents in LENGTHS[:-1]:
        latents = random_latents(num_latents)
        with torch.no_grad():
            theirs = tokenizer.decode(latents.bfloat16()).float()
        ours = whole(vae, latents)
        # Rounding where diffusers rounds, so nearer to it than either is to fp32.
        assert relative_difference(ours, theirs) <= 2e-3
        assert relative_difference(ours, whole(exact, latents)) > 2e-3
