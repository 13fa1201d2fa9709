"""The audio VAE's decoder by its own promises: published names, windows that lose nothing, lazy, bounded in memory.

Against diffusers it is compared in ``tests/parity/test_audio.py``.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cosmos3_core.checkpoint.components import check_weights
from cosmos3_core.checkpoint.configs import AudioVAEConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_audio_vae
from cosmos3_core.checkpoint.tensors import audio_vae_tensors
from cosmos3_core.errors import CapabilityError, MissingFileError, RequestError, TensorMismatchError
from cosmos3_core.vae.audio import AudioVAE
from tests.live_bytes import peak_bytes

CPU = torch.device("cpu")
# As published; odd strides, whose reach is not the same on both sides of a sample; a single stride, where it is far.
SHAPES: list[dict[str, Any]] = [
    {},
    {"dec_c_mults": (2, 3), "dec_strides": (3, 5), "hop_size": 15},
    {"dec_c_mults": (1,), "dec_strides": (2,), "hop_size": 2},
]


def small_config(**changes: Any) -> AudioVAEConfig:
    return dataclasses.replace(AudioVAEConfig(dec_dim=2, vocoder_input_dim=6), **changes)


def small_vae(**changes: Any) -> AudioVAE:
    torch.manual_seed(0)
    vae = AudioVAE(small_config(**changes))
    for name, parameter in vae.named_parameters():
        if name.endswith(("alpha", "beta", "bias")):
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
        elif name.endswith("weight_g"):
            # Such that hardly a sample leaves [-1, 1]: what is cut off would hide differences.
            torch.nn.init.uniform_(parameter, 0.4, 0.6)
        elif name.endswith("weight_v"):
            torch.nn.init.normal_(parameter)
    return vae.requires_grad_(False)


def random_latents(num_latents: int) -> Tensor:
    return torch.randn((6, num_latents), generator=torch.Generator().manual_seed(1))


def whole(vae: AudioVAE, latents: Tensor, **chunks: int) -> Tensor:
    return torch.cat(list(vae.decode(latents, **chunks)), dim=1)


def test_parameters_are_the_published_decoder() -> None:
    """The full-size model, on meta: names and shapes."""
    with torch.device("meta"):
        vae = AudioVAE(AudioVAEConfig())
    expected = {name: x for name, x in audio_vae_tensors(AudioVAEConfig()).items() if not name.startswith("encoder.")}
    assert {name: tuple(x.shape) for name, x in vae.state_dict().items()} == expected
    assert len(list(vae.parameters())) == len(expected), "the product of the weight norm is not held"
    assert (vae.sampling_rate, vae.hop_size, vae.num_channels) == (48000, 1920, 2)


# Windows


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("num_latents", [1, 2, 45])
def test_a_latent_becomes_a_hop_of_samples(shape: dict[str, Any], num_latents: int) -> None:
    vae = small_vae(**shape)
    waveform = whole(vae, random_latents(num_latents))
    assert waveform.shape == (2, num_latents * vae.hop_size)
    assert waveform.dtype == torch.float32
    assert waveform.abs().max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("chunk_latents", [1, 7, 44])
def test_chunks_equal_the_whole(shape: dict[str, Any], chunk_latents: int) -> None:
    vae = small_vae(**shape)
    latents = random_latents(45)
    expected = whole(vae, latents)
    assert expected.std() > 0.05, "a sound this quiet would prove little"
    chunks = list(vae.decode(latents, chunk_latents=chunk_latents))
    assert all(chunk.shape[1] == chunk_latents * vae.hop_size for chunk in chunks[:-1])
    chunked = torch.cat(chunks, dim=1)
    assert (chunked - expected).norm() <= 1e-5 * expected.norm()
    vae.halo_latents = (0, 0)
    assert (whole(vae, latents, chunk_latents=chunk_latents) - expected).norm() > 1e-3 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_halo_is_what_is_needed_and_no_more(shape: dict[str, Any]) -> None:
    # In fp64, where what the rim of a window adds stands out from rounding.
    vae = small_vae(**shape).double()
    num_before, num_behind = vae.halo_latents
    # `stop` leaves one latent to spare behind the halo.
    start, stop = num_before + 1, num_before + 3
    latents = random_latents(stop + num_behind + 1).double()[None]
    expected = vae.decoder(latents)[..., start * vae.hop_size : stop * vae.hop_size]

    def error(before: int, behind: int) -> float:
        samples = vae.decoder(latents[..., start - before : stop + behind])
        kept = samples[..., before * vae.hop_size : (before + stop - start) * vae.hop_size]
        return float((kept - expected).abs().max())

    assert error(num_before, num_behind) <= 1e-14
    assert error(num_before - 1, num_behind) > 1e-11
    assert error(num_before, num_behind - 1) > 1e-11


def test_a_sound_that_fits_into_a_chunk_is_decoded_whole() -> None:
    vae = small_vae()
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    latents = random_latents(30)
    for chunk_latents in ({}, {"chunk_latents": 30}):
        assert len(list(vae.decode(latents, **chunk_latents))) == 1
    assert seen == [30, 30]


def test_a_chunk_is_computed_when_it_is_asked_for() -> None:
    vae = small_vae()
    num_before, num_behind = vae.halo_latents
    seen: list[int] = []
    vae.decoder.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[2]))
    chunks = vae.decode(random_latents(60), chunk_latents=20)
    assert seen == []
    for windows in itertools.accumulate(([20 + num_behind], [num_before + 20 + num_behind], [num_before + 20])):
        next(chunks)
        assert seen == windows
    assert next(chunks, None) is None


def test_peak_memory_does_not_grow_with_the_sound() -> None:
    vae = small_vae(dec_c_mults=(1, 2), dec_strides=(4, 6), hop_size=24)
    kept_bytes = 2 * 20 * 24 * 4

    def drain(latents: Tensor) -> None:
        for chunk in vae.decode(latents, chunk_latents=20):
            assert chunk.untyped_storage().nbytes() == kept_bytes, "a chunk that keeps its window alive"

    short, long = random_latents(100), random_latents(400)
    assert peak_bytes(lambda: drain(long)) == peak_bytes(lambda: drain(short))


# Wrong input


@pytest.mark.parametrize("shape", [(6,), (1, 6, 3), (5, 3), (6, 0)])
def test_wrong_latents_are_refused_at_the_call(shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError, match=r"latents_CT must be \(6, latents\), at least 1"):
        small_vae().decode(torch.zeros(shape))


def test_a_chunk_has_at_least_one_latent() -> None:
    with pytest.raises(RequestError, match="chunk_latents must be 1 or more latents .got 0"):
        small_vae().decode(random_latents(2), chunk_latents=0)


# Loading


@pytest.fixture
def copy(tiny_nano: Path, tmp_path: Path) -> Path:
    """A checkpoint that may be changed."""
    return shutil.copytree(tiny_nano, tmp_path / "nano")


def rewrite(checkpoint: Path, change: dict[str, Tensor | None]) -> None:
    """Replace tensors of the sound tokenizer; None removes one."""
    (path,) = (checkpoint / "sound_tokenizer").glob("*.safetensors")
    tensors = {**load_file(path), **change}
    save_file({name: x for name, x in tensors.items() if x is not None}, path)


def list_stored_names(checkpoint: Path) -> list[str]:
    (path,) = (checkpoint / "sound_tokenizer").glob("*.safetensors")
    return list(load_file(path))


def test_an_encoder_may_be_missing_or_of_any_shape(tiny_nano: Path, copy: Path) -> None:
    latents = torch.randn((64, 3), generator=torch.Generator().manual_seed(0))
    expected = whole(load_audio_vae(CheckpointLayout.open(tiny_nano), device=CPU), latents)
    encoder = [name for name in list_stored_names(copy) if name.startswith("encoder.")]
    assert encoder
    for change in ({encoder[0]: torch.zeros(3, 2)}, dict.fromkeys(encoder)):
        rewrite(copy, change)
        layout = CheckpointLayout.open(copy)
        check_weights(layout)
        assert torch.equal(whole(load_audio_vae(layout, device=CPU), latents), expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("decoder.conv1.weight_g", None),
        ("decoder.conv2.weight_v", torch.zeros(2, 4, 5)),
        ("decoder.conv2.bias", torch.zeros(2)),
    ],
)
def test_a_decoder_that_is_not_the_configs_is_refused(copy: Path, name: str, value: Tensor | None) -> None:
    rewrite(copy, {name: value})
    layout = CheckpointLayout.open(copy)
    for read in (check_weights, lambda layout: load_audio_vae(layout, device=CPU)):
        with pytest.raises(TensorMismatchError, match=name):
            read(layout)


def test_missing_weights_are_named(copy: Path) -> None:
    for path in (copy / "sound_tokenizer").glob("*.safetensors"):
        path.unlink()
    layout = CheckpointLayout.open(copy)
    for read in (check_weights, lambda layout: load_audio_vae(layout, device=CPU)):
        with pytest.raises(MissingFileError, match="sound_tokenizer"):
            read(layout)


def test_a_checkpoint_without_sound_says_what_it_lacks(tiny_edge: Path, copy: Path) -> None:
    index = json.loads((copy / "model_index.json").read_text())
    (copy / "model_index.json").write_text(json.dumps({**index, "sound_tokenizer": [None, None]}))
    for checkpoint, lacking in ((tiny_edge, "no sound heads in the transformer"), (copy, "no sound_tokenizer/")):
        layout = CheckpointLayout.open(checkpoint)
        check_weights(layout)
        with pytest.raises(CapabilityError, match=f"modality must be video .got 'sound'.* has {lacking}"):
            load_audio_vae(layout, device=CPU)


def test_the_stored_dtype_is_kept_unless_another_is_asked_for(tiny_nano: Path) -> None:
    layout = CheckpointLayout.open(tiny_nano)
    for dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        vae = load_audio_vae(layout, device=CPU, dtype=dtype)
        assert {parameter.dtype for parameter in vae.parameters()} == {expected}
        assert not vae.training
        assert not any(parameter.requires_grad for parameter in vae.parameters())
        assert next(vae.decode(torch.zeros(64, 1))).dtype == torch.float32
