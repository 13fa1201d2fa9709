"""Parity would prove little if some tensor did not matter: each one, changed by 10%, changes the result."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
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


class Component:
    """A component as the loader makes it, in which one stored tensor at a time is changed.

    Where a stored tensor goes is found by loading a copy of the checkpoint whose tensors hold their own number and
    nothing else.

    Attributes:
        layout: of the checkpoint.
        module: what ``load`` made of it.
        stored: name -> tensor, as in the files.
        places: name -> the parameter that it fills and the mask of its elements there; what is not read has none.
    """

    def __init__(self, checkpoint: Path, name: str, directory: Path, load: Callable[[CheckpointLayout], Any]) -> None:
        self.layout = CheckpointLayout.open(checkpoint)
        self.module = load(self.layout)
        self.stored: dict[str, Tensor] = {}
        numbered = directory / "numbered"
        shutil.copytree(checkpoint, numbered)
        for path in sorted((numbered / name).glob("*.safetensors")):
            tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
            first = len(self.stored)
            numbers = {name: torch.full_like(x, first + number) for number, (name, x) in enumerate(tensors.items())}
            self.stored |= tensors
            save_file(numbers, path, metadata={"format": "pt"})

        names, parameters = list(self.stored), dict(self.module.named_parameters())
        self.places: dict[str, tuple[Tensor, Tensor]] = {}
        for parameter_name, numbers_in in load(CheckpointLayout.open(numbered)).named_parameters():
            for number in numbers_in.unique().int().tolist():
                assert names[number] not in self.places, "a tensor fills one parameter"
                self.places[names[number]] = (parameters[parameter_name], numbers_in == number)
        for name, (parameter, mask) in self.places.items():
            assert torch.equal(parameter[mask], self.stored[name].flatten())

    def change(self, name: str, rows: list[int] | None = None) -> None:
        """Multiply each element of tensor ``name``, or of some rows of it, by 1 + 0.1 x standard normal noise; the rest
        stays as stored."""
        stored = self.stored[name]
        noise = torch.randn(stored.shape, generator=torch.Generator().manual_seed(0))
        changed = stored * (1 + 0.1 * noise)
        if rows is not None:
            others = [row for row in range(len(stored)) if row not in rows]
            changed[others] = stored[others]
        self._fill(name, changed)

    def restore(self, name: str) -> None:
        self._fill(name, self.stored[name])

    def _fill(self, name: str, values: Tensor) -> None:
        if name in self.places:
            parameter, mask = self.places[name]
            parameter[mask] = values.flatten()


def find_unnoticed(component: Component, names: Iterable[str], result: Callable[[], Tensor]) -> list[str]:
    """The names whose change leaves the result alone."""
    stored = result()
    missed = []
    for name in names:
        component.change(name)
        if (result() - stored).norm() / stored.norm() < NOTICEABLE:
            missed.append(name)
        component.restore(name)
    assert torch.equal(result(), stored), "a restored component gives the stored one's result"
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


@pytest.fixture
def component(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., Component]:
    """Makes a component of the checkpoint of a variant."""
    return lambda variant, name, load, **options: Component(
        request.getfixturevalue(f"tiny_{variant}"), name, tmp_path, partial(load, device=CPU, **options)
    )


def final_latents(transformer: Component, job: DenoiseRequest) -> dict[str, Tensor]:
    # A denoiser of its own: one keeps what it has made of a prompt.
    denoiser = Denoiser(transformer.module, transformer.layout.geometry, transformer.layout.scheduler)
    return denoiser.run(denoiser.prepare(job)).latents


def flat(latents: dict[str, Tensor]) -> Tensor:
    return torch.cat([modality.flatten() for modality in latents.values()])


@pytest.mark.parametrize("variant", ["nano", "super", "edge"])
def test_every_transformer_tensor_matters(variant: str, component: Callable[..., Component]) -> None:
    transformer = component(variant, "transformer", load_transformer)
    job = everything(transformer.layout, domain_id=7)
    assert list(final_latents(transformer, job)) == ["video", *(["sound"] if variant != "edge" else []), "action"]

    missed = find_unnoticed(transformer, transformer.stored, lambda: flat(final_latents(transformer, job)))
    config = transformer.layout.transformer
    rest = last_layer_rest(config.num_hidden_layers)
    explained = [name for name in transformer.stored if name.startswith(rest) or name in NEVER_READ]
    assert sorted(missed) == sorted(explained) == sorted(find_unused_tensors(config))
    assert sorted(explained) == sorted(transformer.stored.keys() - transformer.places.keys())


DOMAIN_TENSORS = tuple(f"action_proj_{way}.{kind}.weight" for way in ("in", "out") for kind in ("fc", "bias"))


@pytest.mark.parametrize("variant", ["nano", "edge"])
def test_an_embodiment_has_the_weights_of_its_domain_alone(variant: str, component: Callable[..., Component]) -> None:
    transformer = component(variant, "transformer", load_transformer)
    num_domains = transformer.layout.transformer.num_embodiment_domains
    for domain_id in (0, 7, 31):
        others = [row for row in range(num_domains) if row != domain_id]
        job = everything(transformer.layout, domain_id)
        stored = final_latents(transformer, job)
        for name in DOMAIN_TENSORS:
            assert len(transformer.stored[name]) == num_domains == 32
            transformer.change(name, rows=others)
            changed = final_latents(transformer, job)
            assert all(torch.equal(changed[modality], stored[modality]) for modality in stored)
            transformer.change(name, rows=[domain_id])
            changed = final_latents(transformer, job)
            for modality in stored:  # the tokens see each other
                assert (changed[modality] - stored[modality]).norm() / stored[modality].norm() > NOTICEABLE
            transformer.restore(name)


def test_given_actions_go_in_and_never_come_out(component: Callable[..., Component]) -> None:
    transformer = component("nano", "transformer", load_transformer)
    job = everything(transformer.layout, domain_id=7, given=True)
    names = [*DOMAIN_TENSORS, "action_modality_embed"]
    missed = find_unnoticed(transformer, names, lambda: flat(final_latents(transformer, job)))
    assert missed == [name for name in DOMAIN_TENSORS if name.startswith("action_proj_out.")]


def test_every_video_decoder_tensor_matters(component: Callable[..., Component]) -> None:
    vae = component("nano", "vae", load_video_vae, with_encoder=False)
    latents = torch.randn((1, 48, 2, 2, 2), generator=torch.Generator().manual_seed(0))
    names = [name for name in vae.stored if not name.startswith(("encoder.", "quant_conv."))]
    assert len(names) > 90
    assert find_unnoticed(vae, names, lambda: torch.cat(list(vae.module.decode(latents)), dim=2)) == []


def test_every_other_component_is_listed(tiny_nano: Path) -> None:
    """No component has weights that the tests here leave out."""
    with_weights = {path.parent.name for path in tiny_nano.rglob("*.safetensors")}
    assert with_weights == {"transformer", "vae", "sound_tokenizer"}
    names = load_file(tiny_nano / "vae" / "diffusion_pytorch_model.safetensors")
    assert all(name.startswith(("encoder.", "quant_conv.", "decoder.", "post_quant_conv.")) for name in names)


def test_every_video_encoder_tensor_matters(component: Callable[..., Component]) -> None:
    vae = component("nano", "vae", load_video_vae)
    pixels = torch.rand((1, 3, 5, 32, 32), generator=torch.Generator().manual_seed(0)) * 2 - 1
    names = [name for name in vae.stored if name.startswith(("encoder.", "quant_conv."))]
    assert len(names) > 80
    assert find_unnoticed(vae, names, lambda: vae.module.encode(pixels)) == []


def test_every_audio_decoder_tensor_matters(component: Callable[..., Component]) -> None:
    vae = component("nano", "sound_tokenizer", load_audio_vae)
    latents = torch.randn((64, 2), generator=torch.Generator().manual_seed(0))
    decoder = [name for name in vae.stored if name.startswith("decoder.")]
    assert len(decoder) > 150
    assert find_unnoticed(vae, decoder, lambda: torch.cat(list(vae.module.decode(latents)), dim=1)) == []
    encoder = [name for name in vae.stored if name.startswith("encoder.")]
    assert len(encoder) + len(decoder) == len(vae.stored)
    assert not vae.places.keys() & set(encoder), "the encoder is not read"
