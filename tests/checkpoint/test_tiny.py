"""The tiny checkpoint: published layout, the same bytes every time, and a model worth testing with.

Whether each tensor matters to the result is the business of ``tests/parity/test_every_tensor.py``.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, Cosmos3AVAEAudioTokenizer, Cosmos3OmniPipeline, Cosmos3OmniTransformer
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2TokenizerFast

from cosmos3_core.checkpoint.configs import AudioVAEConfig, SchedulerConfig, TransformerConfig, VideoVAEConfig
from cosmos3_core.checkpoint.tensors import audio_vae_tensors, transformer_tensors, video_vae_tensors
from cosmos3_core.checkpoint.tiny import build_tiny_checkpoint, main
from cosmos3_core.checkpoint.tiny_variants import TINY_AUDIO_VAE, TINY_VARIANTS, tiny_video_vae
from cosmos3_core.errors import RequestError

VARIANTS = ["nano", "super", "edge"]
MAX_BYTES = 8_000_000

Pipelines = Callable[[str], Cosmos3OmniPipeline]


@pytest.fixture(scope="module")
def tiny(tiny_nano: Path, tiny_super: Path, tiny_edge: Path) -> dict[str, Path]:
    return {"nano": tiny_nano, "super": tiny_super, "edge": tiny_edge}


@pytest.fixture(scope="module")
def pipelines(tiny: dict[str, Path]) -> Pipelines:
    """Variant -> diffusers' pipeline on it, in float32."""

    @cache
    def load(variant: str) -> Cosmos3OmniPipeline:
        pipeline = Cosmos3OmniPipeline.from_pretrained(
            tiny[variant], safety_checker=None, enable_safety_checker=False, dtype=torch.float32
        )
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    return load


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def digests(directory: Path) -> dict[str, str]:
    files = sorted(path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_folders_and_files_are_the_published_ones(tiny: dict[str, Path]) -> None:
    def shards(num_shards: int) -> set[str]:
        numbers = range(1, num_shards + 1)
        return {f"transformer/diffusion_pytorch_model-{k:05d}-of-{num_shards:05d}.safetensors" for k in numbers}

    every_family = {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_tokenizer/chat_template.jinja",
        "text_tokenizer/tokenizer.json",
        "text_tokenizer/tokenizer_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors.index.json",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
        "vision_encoder/config.json",
    }
    qwen = {"text_tokenizer/merges.txt", "text_tokenizer/vocab.json"}
    sound = {"sound_tokenizer/config.json", "sound_tokenizer/diffusion_pytorch_model.safetensors"}
    assert set(digests(tiny["nano"])) == every_family | qwen | sound | shards(3)
    assert set(digests(tiny["super"])) == every_family | qwen | sound | shards(3)
    assert set(digests(tiny["edge"])) == every_family | {"assets/negative_prompt.json"} | shards(4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_it_is_tiny(variant: str, tiny: dict[str, Path]) -> None:
    assert sum(path.stat().st_size for path in tiny[variant].rglob("*")) < MAX_BYTES


def test_model_index_of_nano_is_the_legacy_one(tiny: dict[str, Path]) -> None:
    index = read_json(tiny["nano"] / "model_index.json")
    assert index == read_json(tiny["super"] / "model_index.json")
    assert index.pop("_diffusers_version")
    assert index == {
        "_class_name": "Cosmos3OmniDiffusersPipeline",
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"],
        "text_tokenizer": ["transformers", "Qwen2TokenizerFast"],
        "transformer": ["diffusers", "Cosmos3OmniTransformer"],
        "vae": ["diffusers", "AutoencoderKLWan"],
        "vision_encoder": ["transformers", "Qwen3VLVisionModel"],
    }


def test_model_index_of_edge_is_the_newer_one(tiny: dict[str, Path]) -> None:
    index = read_json(tiny["edge"] / "model_index.json")
    assert index["_class_name"] == "Cosmos3OmniPipeline"
    assert index["text_tokenizer"] == ["transformers", "PreTrainedTokenizerFast"]
    assert index["sound_tokenizer"] == [None, None]
    settings = ("default_use_system_prompt", "use_native_flow_schedule", "native_flow_shift")
    assert [index[name] for name in settings] == [False, True, 3.0]


def test_nano_transformer_config_has_the_published_keys(tiny: dict[str, Path]) -> None:
    keys = """
        _class_name _diffusers_version action_dim action_gen attention_bias attention_dropout base_fps dtype
        enable_fps_modulation freeze_und head_dim hidden_act hidden_size initializer_range intermediate_size
        joint_attn_implementation latent_channel latent_patch_size max_action_dim max_position_embeddings model_type
        num_attention_heads num_embodiment_domains num_hidden_layers num_key_value_heads patch_latent_dim
        position_embedding_type qk_norm qk_norm_for_diffusion qk_norm_for_text rms_norm_eps rope_scaling rope_theta
        sound_dim sound_gen sound_latent_fps temporal_compression_factor_sound timestep_scale
        unified_3d_mrope_reset_spatial_ids unified_3d_mrope_temporal_modality_margin use_cache use_moe
        video_temporal_causal vocab_size
    """.split()
    assert sorted(read_json(tiny["nano"] / "transformer" / "config.json")) == sorted(keys)


@pytest.mark.parametrize("variant", VARIANTS)
def test_configs_read_back(variant: str, tiny: dict[str, Path]) -> None:
    directory, expected = tiny[variant], TINY_VARIANTS[variant]
    assert TransformerConfig.read(directory / "transformer" / "config.json") == expected.transformer
    assert VideoVAEConfig.read(directory / "vae" / "config.json") == tiny_video_vae(0)
    assert SchedulerConfig.read(directory / "scheduler" / "scheduler_config.json") == expected.scheduler
    if variant != "edge":
        assert AudioVAEConfig.read(directory / "sound_tokenizer" / "config.json") == TINY_AUDIO_VAE


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_index_says_where_each_tensor_is(variant: str, tiny: dict[str, Path]) -> None:
    directory = tiny[variant] / "transformer"
    index = read_json(directory / "diffusion_pytorch_model.safetensors.index.json")
    shards = {name: load_file(directory / name) for name in set(index["weight_map"].values())}
    shapes = {name: tuple(shards[shard][name].shape) for name, shard in index["weight_map"].items()}
    assert shapes == transformer_tensors(TINY_VARIANTS[variant].transformer)
    assert sum(len(shard) for shard in shards.values()) == len(shapes)
    assert index["metadata"]["total_size"] == sum(
        tensor.nbytes for shard in shards.values() for tensor in shard.values()
    )


def test_vae_files_hold_the_published_tensors(tiny: dict[str, Path]) -> None:
    for folder, expected in (
        ("vae", video_vae_tensors(tiny_video_vae(0))),
        ("sound_tokenizer", audio_vae_tensors(TINY_AUDIO_VAE)),
    ):
        tensors = load_file(tiny["nano"] / folder / "diffusion_pytorch_model.safetensors")
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


# --- building --------------------------------------------------------------------------------------------------------


def test_other_processes_write_the_same_bytes(tiny: dict[str, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cosmos3_core.checkpoint.tiny"]
    processes = [
        # Another seed for str hashes: no order may depend on them.
        subprocess.Popen(
            [*command, str(tmp_path / variant), "--variant", variant, "--seed", "0"],
            env={**os.environ, "PYTHONHASHSEED": str(number)},
            stdout=subprocess.DEVNULL,
        )
        for number, variant in enumerate(("nano", "edge"), start=1)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert digests(tmp_path / "nano") == digests(tiny["nano"])
    assert digests(tmp_path / "edge") == digests(tiny["edge"])


def test_another_seed_changes_the_weights_alone(tiny: dict[str, Path], tmp_path: Path) -> None:
    first, other = digests(tiny["nano"]), digests(build_tiny_checkpoint(tmp_path / "nano", seed=1))
    changed = {name for name in first if first[name] != other[name]}
    assert changed == {name for name in first if name.endswith(".safetensors")} | {"vae/config.json"}


def test_bfloat16_on_disk(tiny: dict[str, Path], tmp_path: Path) -> None:
    directory = build_tiny_checkpoint(tmp_path / "nano", dtype="bfloat16")
    weights = "vae/diffusion_pytorch_model.safetensors"
    exact, rounded = load_file(tiny["nano"] / weights), load_file(directory / weights)
    assert all(torch.equal(rounded[name], tensor.bfloat16()) for name, tensor in exact.items())
    assert read_json(directory / "transformer" / "config.json")["dtype"] == "bfloat16"
    assert len(list((directory / "transformer").glob("*.safetensors"))) == 2


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    for directory in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(RequestError, match="a new or an empty directory"):
            build_tiny_checkpoint(directory)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_unknown_words_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="variant must be one of .'nano', 'super', 'edge'. .got 'pico'"):
        build_tiny_checkpoint(tmp_path / "new", "pico")
    with pytest.raises(RequestError, match="dtype must be one of .'float32', 'bfloat16'.*got 'fp8'"):
        build_tiny_checkpoint(tmp_path / "new", dtype="fp8")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("flag", ["--variant", "--family"])
def test_the_command_says_what_it_wrote_or_what_is_wrong(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main([str(tmp_path / "edge"), flag, "edge", "--dtype", "bfloat16"])
    assert "tiny edge, 3." in capsys.readouterr().out
    with pytest.raises(SystemExit) as exit_info:
        main([str(tmp_path / "edge")])
    assert exit_info.value.code == 2
    assert "choose another directory" in capsys.readouterr().err


# --- tokenizer -------------------------------------------------------------------------------------------------------

TEXTS = [
    "The robot picks up a red apple, doesn't it?",
    '{"time": "0:00-0:03", "fps": 24.0}',
    "  blanks \t and\r\n\nlines ",
    "Ein Boot treibt über den See. Ёлка и снег. ロボットがリンゴを取る 🤖🏽 👩‍👩‍👧",
    "zero \0, joiner \u200d, private \ue000, last \U0010ffff",
    "decomposed e\u0301 and \u1112\u1161\u11ab",
    "",
]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("text", TEXTS)
def test_any_text_tokenises_and_comes_back(text: str, variant: str, tiny: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[variant] / "text_tokenizer")
    ids = tokenizer(text).input_ids
    assert all(0 <= token < TINY_VARIANTS[variant].transformer.vocab_size for token in ids)
    assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("variant", "tokenizer_class", "end_of_turn", "start_of_vision"),
    [
        ("nano", Qwen2TokenizerFast, 462, 469),
        ("super", Qwen2TokenizerFast, 462, 469),
        ("edge", PreTrainedTokenizerFast, 11, 20),  # the published ids
    ],
)
def test_special_tokens(
    variant: str, tokenizer_class: Any, end_of_turn: int, start_of_vision: int, tiny: dict[str, Path]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[variant] / "text_tokenizer")
    assert isinstance(tokenizer, tokenizer_class)
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == end_of_turn
    assert tokenizer("<|im_end|><|vision_start|>").input_ids == [end_of_turn, start_of_vision]
    assert tokenizer.decode([end_of_turn, start_of_vision], skip_special_tokens=True) == ""


@pytest.mark.parametrize("variant", VARIANTS)
def test_chat_format_has_no_system_message_of_its_own(variant: str, tiny: dict[str, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny[variant] / "text_tokenizer")
    options = {"add_generation_prompt": True, "add_vision_id": False}
    user = {"role": "user", "content": "A cat."}
    parts = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "A cat."}]}
    expected = "<|im_start|>user\nA cat.<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.apply_chat_template([user], tokenize=False, **options) == expected
    assert tokenizer.apply_chat_template([parts], tokenize=False, **options) == expected
    system = {"role": "system", "content": "Be brief."}
    encoded = tokenizer.apply_chat_template([system, user], tokenize=True, return_dict=True, **options)
    assert tokenizer.decode(encoded.input_ids) == "<|im_start|>system\nBe brief.<|im_end|>\n" + expected


def test_qwen_files_agree_with_each_other(tiny: dict[str, Path]) -> None:
    directory = tiny["nano"] / "text_tokenizer"
    model = read_json(directory / "tokenizer.json")["model"]
    merges = (directory / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    assert read_json(directory / "vocab.json") == model["vocab"]
    assert merges == [" ".join(pair) for pair in model["merges"]]


# --- the model, run by diffusers -------------------------------------------------------------------------------------


def generate(pipeline: Cosmos3OmniPipeline, **changes: Any) -> Any:
    """A short clip; with output_type="np", float32 frames [F, Y, X, 3] in [0, 1]."""
    seed = changes.pop("seed", 0)
    arguments = {
        "prompt": "A robot arm picks up a red apple.",
        "num_frames": 9,
        "height": 64,
        "width": 96,
        "num_inference_steps": 6,
        "guidance_scale": 6.0,
        "output_type": "latent",
    }
    generator = torch.Generator().manual_seed(seed)
    return pipeline(**(arguments | changes), generator=generator, return_dict=False)[0]


def difference(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("variant", VARIANTS)
def test_diffusers_finds_every_tensor_and_no_other(variant: str, tiny: dict[str, Path]) -> None:
    parts: list[tuple[Any, str]] = [(Cosmos3OmniTransformer, "transformer"), (AutoencoderKLWan, "vae")]
    if variant != "edge":
        parts.append((Cosmos3AVAEAudioTokenizer, "sound_tokenizer"))
    for module_class, folder in parts:
        _, found = module_class.from_pretrained(
            tiny[variant], subfolder=folder, output_loading_info=True, dtype=torch.float32
        )
        problems = {kind: list(names) for kind, names in found.items() if names}
        assert not problems, (folder, problems)


@pytest.mark.parametrize("variant", VARIANTS)
def test_frames_are_neither_flat_nor_clipped(variant: str, pipelines: Pipelines) -> None:
    frames = generate(pipelines(variant), output_type="np")
    assert frames.shape == (9, 64, 96, 3)
    assert np.mean((frames <= 0) | (frames >= 1)) < 0.01
    assert all(255 * frame.std() > 10 for frame in frames)
    assert all(255 * np.abs(after - before).mean() > 5 for before, after in zip(frames, frames[1:], strict=False))


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_depend_on_everything_asked_for(variant: str, pipelines: Pipelines) -> None:
    pipeline = pipelines(variant)
    latents = generate(pipeline)
    for change, least in (
        ({"prompt": "Rain falls on the street."}, 0.2),
        ({"negative_prompt": "blurry"}, 0.05),
        ({"guidance_scale": 5.0}, 0.02),
        ({"num_inference_steps": 7}, 0.01),
        ({"use_system_prompt": not pipeline.config.default_use_system_prompt}, 0.1),
        ({"seed": 1}, 0.5),
    ):
        assert difference(generate(pipeline, **change), latents) > least, change


@pytest.mark.parametrize("variant", VARIANTS)
def test_rounding_errors_hardly_grow(variant: str, pipelines: Pipelines) -> None:
    noise = torch.randn(1, 48, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    nudged = noise * (1 + 1e-4 * torch.randn(noise.shape, generator=torch.Generator().manual_seed(1)))
    latents, others = (generate(pipelines(variant), latents=start, num_inference_steps=35) for start in (noise, nudged))
    assert difference(others, latents) < 4 * difference(nudged, noise)


@pytest.mark.parametrize("variant", ["nano", "super"])
def test_sound_is_neither_silent_nor_clipped(variant: str, pipelines: Pipelines) -> None:
    decode = pipelines(variant).decode_sound
    latents = torch.randn(64, 10, generator=torch.Generator().manual_seed(0))
    nudged = latents * (1 + 1e-4 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)))
    with torch.no_grad():
        samples, others = decode(latents), decode(nudged)
    assert samples.shape == (2, 19200)
    assert samples.std(dim=1).min() > 0.05
    assert (samples.abs() >= 1).float().mean() < 0.01
    assert difference(others, samples) < 4 * difference(nudged, latents)


def test_images_encode_to_ordinary_latents_that_tell_them_apart(pipelines: Pipelines) -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(1, 3, 1, 4, 6, generator=generator).repeat_interleave(16, 3) for _ in range(2))
    encode = pipelines("nano")._encode_video
    with torch.no_grad():
        z_one, z_other = (encode(2 * image.repeat_interleave(16, 4) - 1) for image in (one, other))
    assert 0.5 < z_one.std() < 2
    assert difference(z_other, z_one) > 0.2
