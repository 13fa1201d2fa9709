"""The configuration files of a checkpoint, as frozen values.

Each ``read`` takes the JSON file's path, checks the type of every key it knows, ignores keys it does not (published
files carry training leftovers) and falls back to the defaults of diffusers 0.42.1 where a key is absent.
No torch here.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from cosmos3_core.errors import CapabilityError, CorruptFileError, MissingFileError
from cosmos3_core.shapes import Geometry

_Config = TypeVar("_Config")

# Half of this for prompts, the rest for clips.
_MIN_POSITIONS = 32_768

# Switches of diffusers' UniPC scheduler that change the mathematics, with the supported values.
_SCHEDULER_SWITCHES: dict[str, tuple[Any, ...]] = {
    "use_beta_sigmas": (False, None),
    "use_exponential_sigmas": (False, None),
    "use_dynamic_shifting": (False, None),
    "predict_x0": (True, None),
    "lower_order_final": (True, None),
    "disable_corrector": ([], None),
    "final_sigmas_type": ("zero", None),
    "thresholding": (False, None),
    "shift_terminal": (None,),
}

# The same for diffusers' audio VAE; "bottleneck.type" is a nested key.
_AUDIO_VAE_SWITCHES: dict[str, tuple[Any, ...]] = {
    "model_type": ("autoencoder_v2", None),
    "dec_type": ("oobleck", None),
    "dec_use_snake": (True, None),
    "dec_final_tanh": (False, None),
    "dec_anti_aliasing": (False, None),
    "dec_use_nearest_upsample": (False, None),
    "dec_use_tanh_at_final": (False, None),
    "activation": ("snakebeta", None),
    "snake_logscale": (True, None),
    "anti_aliasing": (False, None),
    "bottleneck_type": ("vae", None),
    "bottleneck.type": ("vae", None),
    "causal": (False, None),
    "padding_mode": ("zeros", None),
    "latent_mean": (None,),
    "latent_std": (None,),
}


def read_json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in ``path``.

    Raises:
        MissingFileError: the file does not exist.
        CorruptFileError: the file does not hold a JSON object.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise MissingFileError(path, "no such file", "The directory is not a complete checkpoint.") from None
    except UnicodeDecodeError as error:
        raise CorruptFileError(path, f"not a text file ({error.reason})") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CorruptFileError(path, f"not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise CorruptFileError(path, f"holds a JSON {type(value).__name__}, not an object")
    return value


def _build(cls: type[_Config], path: Path, raw: dict[str, Any]) -> _Config:
    """Build a config from its keys in ``raw``, each checked against the type of its default."""
    known: dict[str, Any] = {}
    for item in dataclasses.fields(cls):  # type: ignore[arg-type]
        if item.name not in raw or (raw[item.name] is None and item.default is not None):
            continue
        value, expected = raw[item.name], item.default
        if isinstance(expected, tuple):
            element = type(expected[0]) if expected else float
            is_list = isinstance(value, list | tuple)
            if not is_list or not all(_is_a(entry, element) for entry in value):
                raise CorruptFileError(path, f"{item.name} is {value!r}, not a list of {element.__name__}")
            value = tuple(element(entry) for entry in value)
        elif expected is not None and not _is_a(value, type(expected)):
            raise CorruptFileError(path, f"{item.name} is {value!r}, not a {type(expected).__name__}")
        elif isinstance(expected, float):
            value = float(value)
        known[item.name] = value
    return cls(**known)


def _check_positive(path: Path, config: Any, names: str) -> None:
    for name in names.split():
        value = getattr(config, name)
        if not 0 < value < math.inf:  # NaN fails the comparison
            raise CorruptFileError(path, f"{name} is {value!r}, not a finite number above 0")


def _check_switches(path: Path, component: str, raw: dict[str, Any], switches: dict[str, tuple[Any, ...]]) -> None:
    for switch, offered in switches.items():
        if raw.get(switch) not in offered:
            raise CapabilityError(f"{component}.{switch}", raw[switch], repr(offered[0]), f"given in {path}")


def _is_a(value: Any, kind: type) -> bool:
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, kind)


@dataclass(frozen=True)
class TransformerConfig:
    """``transformer/config.json``: both towers and their heads. Names are the file's own."""

    hidden_size: int = 4096
    num_hidden_layers: int = 36
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int = 128
    intermediate_size: int = 12288
    hidden_act: str = "silu"
    attention_bias: bool = False
    rms_norm_eps: float = 1e-6
    rope_theta: float = 5_000_000.0
    rope_axes_dim: tuple[int, ...] = (24, 20, 20)
    vocab_size: int = 151936
    max_position_embeddings: int = 262144
    qk_norm_for_text: bool = True
    use_und_k_norm_for_gen: bool = False
    latent_channel: int = 48
    latent_patch_size: int = 2
    patch_latent_dim: int = 192
    base_fps: float = 24.0
    enable_fps_modulation: bool = True
    unified_3d_mrope_reset_spatial_ids: bool = True
    unified_3d_mrope_temporal_modality_margin: int = 15000
    timestep_scale: float = 0.001
    action_gen: bool = False
    action_dim: int = 64
    num_embodiment_domains: int = 32
    sound_gen: bool = False
    sound_dim: int = 64
    sound_latent_fps: float = 25.0

    @classmethod
    def read(cls, path: Path) -> TransformerConfig:
        """Read and check the file.

        Raises:
            MissingFileError, CorruptFileError: see :func:`read_json_object`; also for sizes that contradict each other.
        """
        raw = read_json_object(path)
        scaling = raw.get("rope_scaling")
        if raw.get("rope_axes_dim") is None and isinstance(scaling, dict) and "mrope_section" in scaling:
            raw = {**raw, "rope_axes_dim": scaling["mrope_section"]}
        config = _build(cls, path, raw)
        config._check(path)
        return config

    def _check(self, path: Path) -> None:
        sizes = "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim intermediate_size"
        _check_positive(path, self, sizes)
        _check_positive(path, self, "vocab_size latent_channel latent_patch_size rms_norm_eps rope_theta base_fps")
        _check_positive(path, self, "timestep_scale")
        if self.max_position_embeddings < _MIN_POSITIONS:
            raise CorruptFileError(
                path, f"max_position_embeddings={self.max_position_embeddings} is below {_MIN_POSITIONS}"
            )
        if self.hidden_act not in ("silu", "relu2"):
            raise CorruptFileError(path, f"hidden_act is {self.hidden_act!r}, known are 'silu' and 'relu2'")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CorruptFileError(
                path,
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}",
            )
        if len(self.rope_axes_dim) != 3 or sum(self.rope_axes_dim) * 2 != self.head_dim:
            raise CorruptFileError(
                path, f"rope_axes_dim={list(self.rope_axes_dim)} does not add up to half of head_dim={self.head_dim}"
            )
        if self.patch_latent_dim != self.latent_channel * self.latent_patch_size**2:
            raise CorruptFileError(
                path,
                f"patch_latent_dim={self.patch_latent_dim} is not latent_channel={self.latent_channel} x "
                f"latent_patch_size={self.latent_patch_size} squared",
            )


@dataclass(frozen=True)
class VideoVAEConfig:
    """``vae/config.json`` (AutoencoderKLWan, the Wan 2.2 layout). Names are the file's own, spelling included."""

    base_dim: int = 160
    decoder_base_dim: int = 256
    z_dim: int = 48
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attn_scales: tuple[float, ...] = ()
    temperal_downsample: tuple[bool, ...] = (False, True, True)
    is_residual: bool = True
    in_channels: int = 12
    out_channels: int = 12
    patch_size: int = 2
    scale_factor_temporal: int = 4
    scale_factor_spatial: int = 16
    latents_mean: tuple[float, ...] = ()
    latents_std: tuple[float, ...] = ()

    @classmethod
    def read(cls, path: Path) -> VideoVAEConfig:
        """Read and check the file.

        Raises:
            MissingFileError, CorruptFileError: see :func:`read_json_object`; also for statistics of the wrong length.
            CapabilityError: a Wan layout other than 2.2's residual one, or other factors than its layers have.
        """
        config = _build(cls, path, read_json_object(path))
        if not config.is_residual or config.attn_scales:
            raise CapabilityError(
                "vae",
                {"is_residual": config.is_residual, "attn_scales": config.attn_scales},
                "the Wan 2.2 residual VAE",
            )
        for name in ("latents_mean", "latents_std"):
            if len(getattr(config, name)) != config.z_dim:
                raise CorruptFileError(path, f"{name} has {len(getattr(config, name))} values, z_dim is {config.z_dim}")
        if not all(0 < std < math.inf for std in config.latents_std) or not all(
            map(math.isfinite, config.latents_mean)
        ):
            raise CorruptFileError(path, "latents_mean and latents_std are not finite numbers, the latter above 0")
        if len(config.temperal_downsample) != len(config.dim_mult) - 1:
            raise CorruptFileError(
                path,
                f"temperal_downsample needs {len(config.dim_mult) - 1} values, has {len(config.temperal_downsample)}",
            )
        layers = config.geometry
        stated = (config.scale_factor_temporal, config.scale_factor_spatial)
        if (layers.temporal, layers.spatial) != stated:
            given = {"(scale_factor_temporal, scale_factor_spatial)": stated}
            raise CapabilityError("vae", given, f"{(layers.temporal, layers.spatial)} for these layers")
        return config

    @property
    def geometry(self) -> Geometry:
        """The compression factors of the layers."""
        temporal, spatial = 2 ** sum(self.temperal_downsample), self.patch_size * 2 ** len(self.temperal_downsample)
        return Geometry(temporal=temporal, spatial=spatial, channels=self.z_dim)


@dataclass(frozen=True)
class AudioVAEConfig:
    """``sound_tokenizer/config.json`` (Cosmos3AVAEAudioTokenizer). Names are the file's own."""

    sampling_rate: int = 48000
    stereo: bool = True
    input_channels: int = 1
    hop_size: int = 1920
    enc_dim: int = 192
    enc_num_blocks: int = 2
    enc_n_fft: int = 64
    enc_hop_length: int = 16
    enc_latent_dim: int = 128
    enc_c_mults: tuple[int, ...] = (1, 2, 4)
    enc_strides: tuple[int, ...] = (4, 5, 6)
    dec_dim: int = 320
    dec_c_mults: tuple[int, ...] = (1, 2, 4, 8, 16)
    dec_strides: tuple[int, ...] = (2, 4, 5, 6, 8)
    dec_out_channels: int = 2
    vocoder_input_dim: int = 64

    @classmethod
    def read(cls, path: Path) -> AudioVAEConfig:
        """Read and check the file.

        Raises:
            MissingFileError, CorruptFileError: see :func:`read_json_object`; also for sizes that contradict each other.
            CapabilityError: a decoder other than the published one.
        """
        raw = read_json_object(path)
        config = _build(cls, path, raw)
        bottleneck = raw.get("bottleneck")
        bottleneck_type = bottleneck.get("type") if isinstance(bottleneck, dict) else bottleneck
        _check_switches(path, "sound_tokenizer", {**raw, "bottleneck.type": bottleneck_type}, _AUDIO_VAE_SWITCHES)
        samples_per_latent = math.prod(config.dec_strides)
        if raw.get("hop_size") is None:
            config = dataclasses.replace(config, hop_size=samples_per_latent)
        config._check(path, samples_per_latent)
        return config

    def _check(self, path: Path, samples_per_latent: int) -> None:
        _check_positive(path, self, "sampling_rate dec_dim dec_out_channels vocoder_input_dim")
        if not self.dec_strides or len(self.dec_c_mults) != len(self.dec_strides):
            raise CorruptFileError(
                path, f"dec_c_mults has {len(self.dec_c_mults)} values, dec_strides {len(self.dec_strides)}"
            )
        if min(*self.dec_c_mults, *self.dec_strides) < 1:
            raise CorruptFileError(
                path,
                f"dec_c_mults={list(self.dec_c_mults)} and dec_strides={list(self.dec_strides)} are not all above 0",
            )
        # A stride of one would lose a sample: the end cannot make up for the trimmed front.
        if min(self.dec_strides) < 2:
            raise CapabilityError("sound_tokenizer.dec_strides", list(self.dec_strides), "strides of 2 or more")
        if samples_per_latent != self.hop_size:
            raise CorruptFileError(
                path, f"hop_size={self.hop_size} is not the product of dec_strides={list(self.dec_strides)}"
            )


@dataclass(frozen=True)
class SchedulerConfig:
    """``scheduler/scheduler_config.json``: the noise schedule that the checkpoint ships."""

    num_train_timesteps: int = 1000
    solver_order: int = 2
    solver_type: str = "bh2"
    prediction_type: str = "flow_prediction"
    use_flow_sigmas: bool = True
    use_karras_sigmas: bool = False
    flow_shift: float = 1.0
    sigma_min: float = 0.147
    sigma_max: float = 200.0

    @classmethod
    def read(cls, path: Path) -> SchedulerConfig:
        """Read and check the file.

        Raises:
            MissingFileError, CorruptFileError: see :func:`read_json_object`.
            CapabilityError: a scheduler other than UniPC of order 2 on flow predictions (distilled checkpoints).
        """
        raw = read_json_object(path)
        name = raw.get("_class_name", "UniPCMultistepScheduler")
        config = _build(cls, path, raw)
        _check_positive(path, config, "num_train_timesteps flow_shift sigma_min sigma_max")
        _check_switches(path, "scheduler", raw, _SCHEDULER_SWITCHES)
        is_unipc = name in ("UniPCMultistepScheduler", "Cosmos3EdgeUniPCMultistepScheduler")
        solver = (config.solver_order, config.solver_type, config.prediction_type, config.use_flow_sigmas)
        if not is_unipc or solver != (2, "bh2", "flow_prediction", True):
            raise CapabilityError(
                "scheduler",
                f"{name}, order {solver[0]} {solver[1]}, {solver[2]}",
                "UniPCMultistepScheduler of order 2 (bh2) on flow predictions",
                f"distilled checkpoints are not supported yet ({path})",
            )
        return config


def geometry(transformer: TransformerConfig, vae: VideoVAEConfig) -> Geometry:
    """Return the compression factors of a checkpoint."""
    return dataclasses.replace(vae.geometry, patch=transformer.latent_patch_size)
