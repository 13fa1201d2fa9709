"""Opening checkpoint directories: what is read, and the message for each kind of damage."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cosmos3_core.checkpoint.configs import TransformerConfig
from cosmos3_core.checkpoint.layout import CheckpointLayout, read_negative_prompt, recognize_variant
from cosmos3_core.errors import CapabilityError, CheckpointError, CorruptFileError, MissingFileError
from cosmos3_core.shapes import Geometry

INDEX: dict[str, Any] = {
    "_class_name": "Cosmos3OmniDiffusersPipeline",
    "_diffusers_version": "0.37.1",
    "transformer": ["diffusers", "Cosmos3OmniTransformer"],
    "vae": ["diffusers", "AutoencoderKLWan"],
    "text_tokenizer": ["transformers", "Qwen2TokenizerFast"],
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
    "sound_tokenizer": ["diffusers", "Cosmos3AVAEAudioTokenizer"],
    "vision_encoder": ["transformers", "Qwen3VLVisionModel"],
}
CONFIGS: dict[str, dict[str, Any]] = {
    "transformer/config.json": {"sound_gen": True, "action_gen": True, "rope_scaling": {"mrope_section": [24, 20, 20]}},
    "vae/config.json": {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48},
    "sound_tokenizer/config.json": {},
    "scheduler/scheduler_config.json": {"_class_name": "UniPCMultistepScheduler", "use_karras_sigmas": True},
    "text_tokenizer/tokenizer.json": {},
}


def write_json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1), encoding="utf-8")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A checkpoint like Nano's: everything but weights and the vision encoder."""
    root = tmp_path / "Cosmos3-Nano"
    write_json(root / "model_index.json", INDEX)
    for name, config in CONFIGS.items():
        write_json(root / name, config)
    return root


def edit(root: Path, name: str, **changes: object) -> None:
    path = root / name
    write_json(path, json.loads(path.read_text(encoding="utf-8")) | changes)


def test_a_whole_checkpoint_is_read(root: Path) -> None:
    layout = CheckpointLayout.open(root)
    assert (layout.name, layout.variant, layout.directory) == ("Cosmos3-Nano", "nano", root)
    assert layout.components == ("transformer", "vae", "text_tokenizer", "scheduler", "sound_tokenizer")
    assert layout.component_dir("vae") == root / "vae"
    assert layout.geometry == Geometry(temporal=4, spatial=16, channels=48, patch=2)
    assert layout.scheduler.use_karras_sigmas
    assert layout.audio is not None
    assert layout.audio.vocoder_input_dim == layout.transformer.sound_dim
    assert layout.has_sound
    assert layout.has_action


def test_flags_have_the_defaults_of_an_older_index(root: Path) -> None:
    layout = CheckpointLayout.open(root)
    assert layout.default_use_system_prompt is True
    assert layout.use_native_flow_schedule is False
    assert layout.native_flow_shift is None
    assert layout.negative_prompt is None


def test_flags_are_read_from_a_newer_index(root: Path) -> None:
    edit(
        root,
        "model_index.json",
        _class_name="Cosmos3OmniPipeline",
        default_use_system_prompt=False,
        use_native_flow_schedule=True,
        native_flow_shift=3,
    )
    layout = CheckpointLayout.open(root)
    assert layout.default_use_system_prompt is False
    assert layout.use_native_flow_schedule is True
    assert layout.native_flow_shift == 3.0


@pytest.mark.parametrize(
    ("key", "value"),
    [("default_use_system_prompt", "no"), ("use_native_flow_schedule", 1), ("native_flow_shift", "3"), ("vae", "x")],
)
def test_a_flag_or_entry_of_the_wrong_type_is_named(root: Path, key: str, value: object) -> None:
    edit(root, "model_index.json", **{key: value})
    with pytest.raises(CorruptFileError, match=rf"model_index\.json: {key} is {value!r}"):
        CheckpointLayout.open(root)


def test_the_negative_prompt_is_what_the_model_was_shown(root: Path) -> None:
    prompt = {"quality": "blurry", "motion": ["jittery", "frozen"], "text": "\u5b57"}
    write_json(root / "assets" / "negative_prompt.json", prompt)  # with line breaks, as published
    assert CheckpointLayout.open(root).negative_prompt == json.dumps(prompt)
    assert read_negative_prompt(root) == json.dumps(prompt)


def test_a_layout_travels_between_processes(root: Path) -> None:
    layout = CheckpointLayout.open(root)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert hash(layout) == hash(CheckpointLayout.open(root))


def test_the_directory_is_absolute(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    assert CheckpointLayout.open(".").directory == root


def test_a_cached_download_is_named_after_its_repository(root: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--nvidia--Cosmos3-Super" / "snapshots" / "0123abcd"
    snapshot.parent.mkdir(parents=True)
    root.rename(snapshot)
    assert CheckpointLayout.open(snapshot).name == "Cosmos3-Super"


@pytest.mark.parametrize("entry", [[None, None], None, "absent"])
def test_sound_needs_its_component(root: Path, entry: object) -> None:
    index = {**INDEX, "sound_tokenizer": entry}
    if entry == "absent":
        del index["sound_tokenizer"]
    write_json(root / "model_index.json", index)
    (root / "sound_tokenizer" / "config.json").unlink()
    layout = CheckpointLayout.open(root)
    assert not layout.has_sound
    assert layout.audio is None
    with pytest.raises(MissingFileError, match="has no component 'sound_tokenizer'.*It has transformer, vae"):
        layout.component_dir("sound_tokenizer")


def test_sound_and_action_need_the_transformers_flags(root: Path) -> None:
    edit(root, "transformer/config.json", sound_gen=False, action_gen=False)
    layout = CheckpointLayout.open(root)
    assert not layout.has_sound
    assert not layout.has_action


@pytest.mark.parametrize(
    ("changes", "backbone", "variant"),
    [
        ({}, None, "nano"),
        ({"num_hidden_layers": 64, "hidden_size": 5120, "num_attention_heads": 64}, None, "super"),
        ({"num_hidden_layers": 64}, None, "super"),
        ({"hidden_size": 5120}, None, "super"),
        ({"num_attention_heads": 48}, None, "super"),  # a small Super: 1.5 times as wide as the model
        ({"num_attention_heads": 40}, None, "nano"),  # a small Nano may be built uneven
        ({"hidden_act": "relu2", "hidden_size": 2048, "num_attention_heads": 16}, None, "edge"),
        ({}, "cosmos3_edge_nemotron_dense", "edge"),
        ({}, "qwen3_vl", "nano"),
    ],
)
def test_a_variant_is_recognized_by_shape(changes: dict[str, Any], backbone: str | None, variant: str) -> None:
    assert recognize_variant(dataclasses.replace(TransformerConfig(), **changes), backbone) == variant


def test_the_backbone_is_read_from_the_transformers_config(root: Path) -> None:
    edit(root, "transformer/config.json", backbone_type="cosmos3_edge_nemotron_dense")
    assert CheckpointLayout.open(root).variant == "edge"


def test_a_hub_name_gets_the_command_that_downloads_it() -> None:
    with pytest.raises(MissingFileError, match=r"nor such a repository .*cache\. `cosmos3 download"):
        CheckpointLayout.open("nvidia/Cosmos3-Nano")


def test_a_missing_directory_gets_the_commands_that_make_one(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"nowhere: no such directory.*`cosmos3 tiny-checkpoint DIR`"):
        CheckpointLayout.open(tmp_path / "nowhere")


def test_a_file_is_not_a_directory(root: Path) -> None:
    with pytest.raises(MissingFileError, match=r"model_index\.json: is a file, not a directory"):
        CheckpointLayout.open(root / "model_index.json")


def test_a_components_own_directory_is_not_a_checkpoint(root: Path) -> None:
    with pytest.raises(MissingFileError, match=r"transformer/model_index\.json: .*Give the directory that holds"):
        CheckpointLayout.open(root / "transformer")


def test_another_pipeline_is_refused_with_both_accepted_names(root: Path) -> None:
    edit(root, "model_index.json", _class_name="WanPipeline")
    with pytest.raises(
        CheckpointError,
        match=r"model_index\.json.*'WanPipeline', not Cosmos3OmniPipeline or Cosmos3OmniDiffusersPipeline",
    ):
        CheckpointLayout.open(root)


@pytest.mark.parametrize("component", ["transformer", "vae", "text_tokenizer", "scheduler"])
def test_a_needed_component_must_be_listed(root: Path, component: str) -> None:
    edit(root, "model_index.json", **{component: [None, None]})
    with pytest.raises(MissingFileError, match=rf"model_index\.json: lists no component '{component}'"):
        CheckpointLayout.open(root)


@pytest.mark.parametrize("component", ["vae", "sound_tokenizer"])
def test_a_listed_component_must_exist(root: Path, component: str) -> None:
    (root / component).rename(root / "elsewhere")
    with pytest.raises(MissingFileError, match=rf"{component}: no such directory.*Download {component}/") as caught:
        CheckpointLayout.open(root)
    assert ("[null, null]" in str(caught.value)) == (component == "sound_tokenizer")


def test_the_tokenizer_file_must_exist(root: Path) -> None:
    (root / "text_tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(MissingFileError, match=r"tokenizer\.json: no such file\. Download the whole text_tokenizer/"):
        CheckpointLayout.open(root)


@pytest.mark.parametrize("name", sorted(CONFIGS.keys() - {"text_tokenizer/tokenizer.json"}))
def test_a_missing_config_is_named(root: Path, name: str) -> None:
    (root / name).unlink()
    with pytest.raises(MissingFileError, match=name):
        CheckpointLayout.open(root)


def test_configs_must_agree_on_latent_channels(root: Path) -> None:
    edit(root, "vae/config.json", z_dim=16, latents_mean=[0.0] * 16, latents_std=[1.0] * 16)
    with pytest.raises(CorruptFileError, match=r"transformer/config\.json: latent_channel=48, .* z_dim=16"):
        CheckpointLayout.open(root)


def test_configs_must_agree_on_sound_channels(root: Path) -> None:
    edit(root, "sound_tokenizer/config.json", vocoder_input_dim=32)
    with pytest.raises(CorruptFileError, match=r"sound_dim=64, .* vocoder_input_dim=32"):
        CheckpointLayout.open(root)


def test_a_distilled_scheduler_is_refused(root: Path) -> None:
    edit(root, "scheduler/scheduler_config.json", _class_name="FlowMatchEulerDiscreteScheduler")
    with pytest.raises(CapabilityError, match="FlowMatchEulerDiscreteScheduler"):
        CheckpointLayout.open(root)


def test_no_torch_is_needed() -> None:
    code = "import sys, cosmos3_core.checkpoint.layout; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
