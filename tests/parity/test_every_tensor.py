"""Parity would prove little if some tensor did not matter: each one, changed by 10%, changes the result."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.checkpoint.load import load_audio_vae, load_transformer, load_video_vae
from cosmos3_core.denoise_request import ActionLatents, DenoiseRequest
from cosmos3_core.denoiser import Denoiser
from cosmos3_core.model.weights import find_unused_tensors
from cosmos3_core.shapes import LatentShape

CPU = torch.device("cpu")
# Far above what rounding moves (about 1e-7), far below what any tensor that matters does.
NOTICEABLE = 1e-5

# Published, but behind the last keys and values that generation reads of the understanding tower.
NEVER_READ = ("lm_head.weight", "norm.weight")


def last_layer_rest(num_layers: int) -> tuple[str, ...]:
    """Tensors of the understanding tower's last layer that only its own output would need."""
    layer = f"layers.{num_layers - 1}"
    attention = ("self_attn.to_q.weight", "self_attn.to_out.weight", "self_attn.norm_q.weight")
    return tuple(f"{layer}.{name}" for name in (*attention, "post_attention_layernorm.weight", "mlp."))


class Perturbed:
    """A private copy of a checkpoint in which one tensor at a time is changed on disk."""

    def __init__(self, checkpoint: Path, component: str, directory: Path) -> None:
        self.root = directory / "checkpoint"
        shutil.copytree(checkpoint, self.root)
        self.files = sorted((self.root / component).glob("*.safetensors"))
        # Copies: what load_file gives lies in the file, which is about to change.
        self.tensors = {path: {name: x.clone() for name, x in load_file(path).items()} for path in self.files}
        self.names = {name: path for path, tensors in self.tensors.items() for name in tensors}

    def change(self, name: str, rows: list[int] | None = None) -> None:
        """Multiply each element of tensor ``name``, or of some rows of it, by 1 + 0.1 x standard normal noise; the rest
        stays as shipped."""
        shipped = self.tensors[self.names[name]][name]
        noise = torch.randn(shipped.shape, generator=torch.Generator().manual_seed(0))
        changed = shipped * (1 + 0.1 * noise)
        if rows is not None:
            others = [row for row in range(len(shipped)) if row not in rows]
            changed[others] = shipped[others]
        self._write(name, changed)

    def restore(self, name: str) -> None:
        self._write(name, self.tensors[self.names[name]][name])

    def _write(self, name: str, values: Tensor) -> None:
        """Overwrite the bytes of one tensor in its file."""
        with self.names[name].open("r+b") as file:
            (num_bytes,) = struct.unpack("<Q", file.read(8))
            start, stop = json.loads(file.read(num_bytes))[name]["data_offsets"]
            data = values.contiguous().numpy().tobytes()
            assert len(data) == stop - start
            file.seek(8 + num_bytes + start)
            file.write(data)


def unnoticed(perturbed: Perturbed, names: list[str], result: Callable[[], Tensor]) -> list[str]:
    """The names whose change leaves the result alone."""
    shipped = result()
    missed = []
    for name in names:
        perturbed.change(name)
        if (result() - shipped).norm() / shipped.norm() < NOTICEABLE:
            missed.append(name)
        perturbed.restore(name)
    assert torch.equal(result(), shipped), "a restored checkpoint gives the shipped result"
    return missed


def everything(layout: CheckpointLayout, domain_id: int, given: bool = False) -> DenoiseRequest:
    """A request with all that the transformer of a checkpoint has to do with; actions of all the numbers it knows."""
    num_actions, width = 2, layout.transformer.action_dim
    rows = torch.randn(num_actions, width, generator=torch.Generator().manual_seed(1)).tolist() if given else None
    return DenoiseRequest(
        text_ids=tuple(range(layout.transformer.vocab_size)),  # every row of the embedding
        negative_text_ids=(7, 5),
        latent_shape=LatentShape(2, 3, 3),
        fps=16.0,
        num_inference_steps=2,
        guidance_scale=3.0,
        schedule="native",
        flow_shift=3.0,
        seed=0,
        num_sound_latents=2 if layout.transformer.sound_gen else 0,
        action=ActionLatents(num_actions, domain_id, width, rows and tuple(map(tuple, rows))),
    )


def final_latents(layout: CheckpointLayout, job: DenoiseRequest) -> dict[str, Tensor]:
    denoiser = Denoiser(load_transformer(layout, device=CPU), layout.geometry, layout.scheduler)
    return denoiser.run(denoiser.prepare(job)).latents


def flat(latents: dict[str, Tensor]) -> Tensor:
    return torch.cat([modality.flatten() for modality in latents.values()])


@pytest.mark.parametrize("variant", ["nano", "super", "edge"])
def test_every_transformer_tensor_matters(variant: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    perturbed = Perturbed(request.getfixturevalue(f"tiny_{variant}"), "transformer", tmp_path)
    layout = CheckpointLayout.open(perturbed.root)
    job = everything(layout, domain_id=7)
    assert list(final_latents(layout, job)) == ["video", *(["sound"] if variant != "edge" else []), "action"]

    missed = unnoticed(perturbed, sorted(perturbed.names), lambda: flat(final_latents(layout, job)))
    rest = last_layer_rest(layout.transformer.num_hidden_layers)
    explained = [name for name in perturbed.names if name.startswith(rest) or name in NEVER_READ]
    assert sorted(missed) == sorted(explained)
    assert sorted(explained) == sorted(find_unused_tensors(layout.transformer))


DOMAIN_TENSORS = tuple(f"action_proj_{way}.{kind}.weight" for way in ("in", "out") for kind in ("fc", "bias"))


@pytest.mark.parametrize("domain_id", [0, 7, 31])
@pytest.mark.parametrize("variant", ["nano", "edge"])
def test_an_embodiment_has_the_weights_of_its_domain_alone(
    variant: str, domain_id: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    perturbed = Perturbed(request.getfixturevalue(f"tiny_{variant}"), "transformer", tmp_path)
    layout = CheckpointLayout.open(perturbed.root)
    num_domains = layout.transformer.num_embodiment_domains
    others = [row for row in range(num_domains) if row != domain_id]
    job = everything(layout, domain_id)
    shipped = final_latents(layout, job)
    for name in DOMAIN_TENSORS:
        assert len(perturbed.tensors[perturbed.names[name]][name]) == num_domains == 32
        perturbed.change(name, rows=others)
        changed = final_latents(layout, job)
        assert all(torch.equal(changed[modality], shipped[modality]) for modality in shipped)
        perturbed.change(name, rows=[domain_id])
        changed = final_latents(layout, job)
        for modality in shipped:  # the tokens see each other
            assert (changed[modality] - shipped[modality]).norm() / shipped[modality].norm() > NOTICEABLE
        perturbed.restore(name)


def test_given_actions_go_in_and_never_come_out(tiny_nano: Path, tmp_path: Path) -> None:
    perturbed = Perturbed(tiny_nano, "transformer", tmp_path)
    layout = CheckpointLayout.open(perturbed.root)
    job = everything(layout, domain_id=7, given=True)
    names = [*DOMAIN_TENSORS, "action_modality_embed"]
    missed = unnoticed(perturbed, names, lambda: flat(final_latents(layout, job)))
    assert missed == [name for name in DOMAIN_TENSORS if name.startswith("action_proj_out.")]


def test_every_video_decoder_tensor_matters(tiny_nano: Path, tmp_path: Path) -> None:
    perturbed = Perturbed(tiny_nano, "vae", tmp_path)
    layout = CheckpointLayout.open(perturbed.root)
    latents = torch.randn((1, 48, 2, 2, 2), generator=torch.Generator().manual_seed(0))

    def pixels() -> Tensor:
        vae = load_video_vae(layout, device=CPU, with_encoder=False)
        return torch.cat(list(vae.decode(latents)), dim=2)

    names = [name for name in sorted(perturbed.names) if not name.startswith(("encoder.", "quant_conv."))]
    assert len(names) > 90
    assert unnoticed(perturbed, names, pixels) == []


def test_every_other_component_is_listed(tiny_nano: Path) -> None:
    """No component has weights that the tests here leave out."""
    with_weights = {path.parent.name for path in tiny_nano.rglob("*.safetensors")}
    assert with_weights == {"transformer", "vae", "sound_tokenizer"}
    names = load_file(tiny_nano / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(name.startswith(("encoder.", "quant_conv.", "decoder.", "post_quant_conv.")) for name in names)


def test_every_video_encoder_tensor_matters(tiny_nano: Path, tmp_path: Path) -> None:
    perturbed = Perturbed(tiny_nano, "vae", tmp_path)
    layout = CheckpointLayout.open(perturbed.root)
    pixels = torch.rand((1, 3, 5, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1

    def latents() -> Tensor:
        return load_video_vae(layout, device=CPU).encode(pixels)

    names = [name for name in sorted(perturbed.names) if name.startswith(("encoder.", "quant_conv."))]
    assert len(names) > 80
    assert unnoticed(perturbed, names, latents) == []


def test_every_audio_decoder_tensor_matters(tiny_nano: Path, tmp_path: Path) -> None:
    perturbed = Perturbed(tiny_nano, "sound_tokenizer", tmp_path)
    layout = CheckpointLayout.open(perturbed.root)
    latents = torch.randn((64, 2), generator=torch.Generator().manual_seed(0))

    def waveform() -> Tensor:
        return torch.cat(list(load_audio_vae(layout, device=CPU).decode(latents)), dim=1)

    decoder = [name for name in perturbed.names if name.startswith("decoder.")]
    assert len(decoder) > 150
    assert unnoticed(perturbed, decoder, waveform) == []
    encoder = [name for name in perturbed.names if name.startswith("encoder.")]
    assert len(encoder) + len(decoder) == len(perturbed.names)
    shipped = waveform()
    for name in encoder:
        perturbed.change(name)
    assert torch.equal(waveform(), shipped)
