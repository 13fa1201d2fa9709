"""Reading a checkpoint's JSON files: defaults, types, contradictions, and messages that name file and key."""

import dataclasses
import json

import pytest

from cosmos3_core.checkpoint.configs import (
    AudioVAEConfig,
    SchedulerConfig,
    TransformerConfig,
    VideoVAEConfig,
    geometry,
    read_json_object,
)
from cosmos3_core.errors import CapabilityError, CheckpointError, CorruptFileError, MissingFileError
from cosmos3_core.shapes import Geometry

STATISTICS = {"latents_mean": [0.0] * 48, "latents_std": [1.0] * 48}


@pytest.fixture
def write(tmp_path):
    """Writes a config.json of the given keys and returns its path."""

    def write_config(**keys):
        path = tmp_path / "config.json"
        path.write_text(json.dumps(keys), encoding="utf-8")
        return path

    return write_config


# --- the file itself -------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(
        MissingFileError, match="config.json: no such file. The directory is not a complete checkpoint."
    ):
        read_json_object(tmp_path / "config.json")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"{", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[1, 2]", "a JSON list, not an object"),
        (b'"text"', "a JSON str, not an object"),
        (b"\xff\xfe\x00", "not a text file"),
    ],
)
def test_a_file_that_is_no_json_object_is_named(tmp_path, content, problem):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CorruptFileError, match=problem) as caught:
        read_json_object(path)
    assert str(caught.value).startswith(f"{path}: ")


# --- defaults and unknown keys ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "required"),
    [(TransformerConfig, {}), (VideoVAEConfig, STATISTICS), (AudioVAEConfig, {}), (SchedulerConfig, {})],
)
def test_absent_keys_take_the_defaults_and_unknown_ones_are_ignored(write, config, required):
    path = write(_class_name="UniPCMultistepScheduler", _diffusers_version="0.42.1", training_leftover=[1], **required)
    expected = dataclasses.replace(config(), **{key: tuple(value) for key, value in required.items()})
    assert config.read(path) == expected


def test_the_defaults_are_nanos():
    config = TransformerConfig()
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (4096, 36, 32)
    assert (config.num_key_value_heads, config.head_dim, config.rope_axes_dim) == (8, 128, (24, 20, 20))
    assert not config.sound_gen
    assert not config.action_gen


def test_null_means_absent(write):
    assert TransformerConfig.read(write(hidden_size=None, rope_axes_dim=None)) == TransformerConfig()


def test_given_keys_are_taken_and_lists_become_tuples(write):
    config = TransformerConfig.read(write(hidden_size=64, rope_axes_dim=[32, 16, 16], sound_gen=True))
    assert (config.hidden_size, config.rope_axes_dim, config.sound_gen) == (64, (32, 16, 16), True)
    assert hash(config) == hash(dataclasses.replace(config))


def test_a_whole_number_will_do_for_a_real_one(write):
    theta = TransformerConfig.read(write(rope_theta=5_000_000)).rope_theta
    assert theta == 5e6
    assert type(theta) is float
    std = VideoVAEConfig.read(write(latents_mean=[0] * 48, latents_std=[1] * 48)).latents_std
    assert {type(value) for value in std} == {float}


# --- types -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "key", "value", "expected"),
    [
        (TransformerConfig, "hidden_size", "4096", "int"),
        (TransformerConfig, "hidden_size", 4096.0, "int"),
        (TransformerConfig, "hidden_size", True, "int"),
        (TransformerConfig, "rms_norm_eps", "1e-6", "float"),
        (TransformerConfig, "rms_norm_eps", False, "float"),
        (TransformerConfig, "attention_bias", 0, "bool"),
        (TransformerConfig, "hidden_act", 1, "str"),
        (TransformerConfig, "rope_axes_dim", 24, "list of int"),
        (TransformerConfig, "rope_axes_dim", [24, 20, "20"], "list of int"),
        (VideoVAEConfig, "temperal_downsample", [0, 1, 1], "list of bool"),
        (VideoVAEConfig, "latents_mean", ["0"], "list of float"),
        (AudioVAEConfig, "dec_strides", [2, 4.5], "list of int"),
        (SchedulerConfig, "flow_shift", [5], "float"),
    ],
)
def test_a_wrong_type_names_file_key_value_and_type(write, config, key, value, expected):
    path = write(**{key: value})
    with pytest.raises(CorruptFileError) as caught:
        config.read(path)
    assert str(caught.value) == f"{path}: {key} is {value!r}, not a {expected}."


# --- rope_scaling ----------------------------------------------------------------------------------------------------


def test_rope_axes_fall_back_to_the_mrope_section(write):
    path = write(rope_scaling={"rope_type": "default", "mrope_section": [32, 16, 16]})
    assert TransformerConfig.read(path).rope_axes_dim == (32, 16, 16)


def test_rope_axes_win_over_the_mrope_section(write):
    path = write(rope_axes_dim=[24, 20, 20], rope_scaling={"mrope_section": [32, 16, 16]})
    assert TransformerConfig.read(path).rope_axes_dim == (24, 20, 20)


@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, "none"])
def test_a_scaling_without_sections_leaves_the_default(write, scaling):
    assert TransformerConfig.read(write(rope_scaling=scaling)).rope_axes_dim == (24, 20, 20)


# --- contradictions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', known are 'silu' and 'relu2'"),
        ({"num_attention_heads": 30}, "num_attention_heads=30 is not a multiple of num_key_value_heads=8"),
        ({"head_dim": 64}, r"rope_axes_dim=\[24, 20, 20\] does not add up to half of head_dim=64"),
        ({"rope_axes_dim": [32, 32]}, r"rope_axes_dim=\[32, 32\] does not add up"),
        ({"patch_latent_dim": 48}, "patch_latent_dim=48 is not latent_channel=48 x latent_patch_size=2 squared"),
    ],
)
def test_a_transformer_that_contradicts_itself(write, keys, problem):
    with pytest.raises(CorruptFileError, match=problem):
        TransformerConfig.read(write(**keys))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({}, "latents_mean has 0 values, z_dim is 48"),
        ({**STATISTICS, "latents_std": [1.0] * 16}, "latents_std has 16 values, z_dim is 48"),
        ({**STATISTICS, "dim_mult": [1, 2, 4]}, "temperal_downsample needs 2 values, has 3"),
    ],
)
def test_a_video_vae_that_contradicts_itself(write, keys, problem):
    with pytest.raises(CorruptFileError, match=problem):
        VideoVAEConfig.read(write(**keys))


@pytest.mark.parametrize(
    ("keys", "factors"),
    [
        ({"scale_factor_spatial": 8}, "4, 16"),
        ({"temperal_downsample": [False, False, True]}, "2, 16"),
    ],
)
def test_other_factors_than_the_layers_are_a_missing_capability(write, keys, factors):
    with pytest.raises(CapabilityError, match=rf"\({factors}\) for these layers"):
        VideoVAEConfig.read(write(**STATISTICS, **keys))


@pytest.mark.parametrize("keys", [{"is_residual": False}, {"attn_scales": [0.5]}])
def test_another_wan_layout_is_a_missing_capability(write, keys):
    with pytest.raises(CapabilityError, match="the Wan 2.2 residual VAE"):
        VideoVAEConfig.read(write(**STATISTICS, **keys))


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"hop_size": 960}, r"hop_size=960 is not the product of dec_strides=\[2, 4, 5, 6, 8\]"),
        ({"dec_c_mults": [1, 2, 4]}, "dec_c_mults has 3 values, dec_strides 5"),
        ({"dec_c_mults": [], "dec_strides": []}, "dec_c_mults has 0 values, dec_strides 0"),
        ({"dec_c_mults": [1, 2, 4, 8, 0]}, "not all above 0"),
        ({"dec_strides": [2, 4, 5, -6, -8]}, "not all above 0"),
        ({"dec_dim": 0}, "dec_dim is 0, not a finite number above 0"),
        ({"dec_out_channels": -2}, "dec_out_channels is -2"),
        ({"vocoder_input_dim": 0}, "vocoder_input_dim is 0"),
        ({"sampling_rate": 0}, "sampling_rate is 0"),
    ],
)
def test_an_audio_vae_that_contradicts_itself(write, keys, problem):
    with pytest.raises(CorruptFileError, match=problem):
        AudioVAEConfig.read(write(**keys))


def test_an_audio_stride_of_one_is_a_missing_capability(write):
    with pytest.raises(CapabilityError, match="dec_strides must be strides of 2 or more"):
        AudioVAEConfig.read(write(dec_c_mults=[1], dec_strides=[1]))


def test_the_hop_follows_from_the_strides_where_it_is_not_given(write):
    assert AudioVAEConfig.read(write(dec_c_mults=[1, 2], dec_strides=[3, 4])).hop_size == 12
    assert AudioVAEConfig.read(write(dec_c_mults=[1, 2], dec_strides=[3, 4], hop_size=None)).hop_size == 12


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model_type", "autoencoder_v1"),
        ("dec_type", "vocos"),
        ("dec_use_snake", False),
        ("dec_final_tanh", True),
        ("dec_anti_aliasing", True),
        ("dec_use_nearest_upsample", True),
        ("dec_use_tanh_at_final", True),
        ("activation", "snake"),
        ("snake_logscale", False),
        ("anti_aliasing", True),
        ("bottleneck_type", "fsq"),
        ("causal", True),
        ("padding_mode", "reflect"),
        ("latent_mean", 0.5),
        ("latent_std", [1.0, 2.0]),
    ],
)
def test_another_audio_decoder_is_a_missing_capability(write, key, value):
    with pytest.raises(CapabilityError, match=rf"sound_tokenizer\.{key} must be .*got .*config.json"):
        AudioVAEConfig.read(write(**{key: value}))


@pytest.mark.parametrize("bottleneck", [{"type": "fsq"}, "fsq"])
def test_another_bottleneck_is_a_missing_capability(write, bottleneck):
    with pytest.raises(CapabilityError, match=r"sound_tokenizer\.bottleneck\.type must be 'vae' \(got 'fsq'"):
        AudioVAEConfig.read(write(bottleneck=bottleneck))


@pytest.mark.parametrize("bottleneck", [None, {}, {"type": "vae", "training_leftover": 1}])
def test_the_published_bottleneck_passes(write, bottleneck):
    assert AudioVAEConfig.read(write(bottleneck=bottleneck)) == AudioVAEConfig()


@pytest.mark.parametrize("name", ["UniPCMultistepScheduler", "Cosmos3EdgeUniPCMultistepScheduler"])
def test_known_schedulers(write, name):
    assert SchedulerConfig.read(write(_class_name=name, flow_shift=10)).flow_shift == 10.0


@pytest.mark.parametrize(
    "keys",
    [
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"solver_order": 3},
        {"solver_type": "bh1"},
        {"prediction_type": "epsilon"},
        {"use_flow_sigmas": False},
    ],
)
def test_another_scheduler_is_a_missing_capability(write, keys):
    with pytest.raises(CapabilityError, match=r"scheduler must be UniPCMultistepScheduler of order 2"):
        SchedulerConfig.read(write(**keys))


def test_checkpoint_errors_are_caught_as_one(write):
    with pytest.raises(CheckpointError):
        TransformerConfig.read(write(hidden_size="large"))


# --- geometry --------------------------------------------------------------------------------------------------------


def test_geometry_comes_from_the_files(write):
    transformer = TransformerConfig.read(write(latent_patch_size=1, patch_latent_dim=48))
    layers = {"dim_mult": [1, 2, 4, 4, 4], "temperal_downsample": [False, True, True, True]}
    vae = VideoVAEConfig.read(write(**STATISTICS, **layers, scale_factor_temporal=8, scale_factor_spatial=32))
    assert geometry(transformer, vae) == Geometry(temporal=8, spatial=32, channels=48, patch=1)
    assert geometry(TransformerConfig(), VideoVAEConfig()) == Geometry()
