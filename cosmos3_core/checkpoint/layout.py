"""The layout of a checkpoint directory: its small JSON files, read once and checked before any weight is.

No torch here: the HTTP edge opens the layout too.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cosmos3_core.checkpoint.configs import (
    AudioVAEConfig,
    SchedulerConfig,
    TransformerConfig,
    VideoVAEConfig,
    geometry,
    read_json_object,
)
from cosmos3_core.checkpoint.hub import DOWNLOAD_HINT, find_cached, find_snapshot
from cosmos3_core.errors import CheckpointError, CorruptFileError, MissingFileError
from cosmos3_core.shapes import Geometry

FAMILY = "cosmos3"
"""The model family that this package runs."""

ModelVariant = Literal["nano", "super", "edge"]
"""The published models of the family."""

PIPELINE_CLASSES = ("Cosmos3OmniPipeline", "Cosmos3OmniDiffusersPipeline")
"""Accepted ``_class_name`` values of model_index.json; the second is the older one, of Nano and Super."""

_REQUIRED = ("transformer", "vae", "text_tokenizer", "scheduler")
_OPTIONAL = ("sound_tokenizer", "vision_encoder")
# Key of the presets -> published model.
_PUBLISHED = {
    "nano": "Cosmos3-Nano",
    "super": "Cosmos3-Super",
    "edge": "Cosmos3-Edge",
    "nano-policy-droid": "Cosmos3-Nano-Policy-DROID",
}
_OWNER = "nvidia/"
_NEVER_READ = ("vision_encoder",)  # the reasoner's; generation does not read it, so a download may leave it out


@dataclass(frozen=True)
class CheckpointLayout:
    """A checkpoint directory whose small files are read and consistent. Picklable.

    Attributes:
        directory: absolute path of the checkpoint.
        name: the directory's name, or the repository's name in the Hugging Face cache.
        variant: "nano", "super" or "edge"; see :func:`recognize_variant`.
        components: components that the checkpoint has, in the order of this module's tables.
        transformer: ``transformer/config.json``.
        vae: ``vae/config.json``.
        scheduler: ``scheduler/scheduler_config.json``.
        audio: ``sound_tokenizer/config.json``; None without sound.
        default_use_system_prompt: whether prompts get the system prompt by default.
        use_native_flow_schedule: whether the flow schedule is that of NVIDIA's own sampler.
        native_flow_shift: the shift of that schedule; None if the checkpoint does not state it.
        negative_prompt: the recommended negative prompt as the model reads it; None if the checkpoint has none.
    """

    directory: Path
    name: str
    variant: ModelVariant
    components: tuple[str, ...]
    transformer: TransformerConfig
    vae: VideoVAEConfig
    scheduler: SchedulerConfig
    audio: AudioVAEConfig | None
    default_use_system_prompt: bool = True
    use_native_flow_schedule: bool = False
    native_flow_shift: float | None = None
    negative_prompt: str | None = None

    @classmethod
    def open(cls, directory: str | os.PathLike[str]) -> CheckpointLayout:
        """Read and check a checkpoint's small files.

        Args:
            directory: the directory that holds model_index.json; a repository of the Hugging Face hub that lies in the
                local cache, as ``OWNER/NAME``, ``OWNER/NAME@REVISION`` or ``NAME``; or its folder there.

        Raises:
            MissingFileError: the directory or repository, a file or a component is missing.
            CorruptFileError: a file is damaged, or two configs contradict each other.
            CheckpointError: the checkpoint is another pipeline's.
            CapabilityError: this version does not support its scheduler or VAE.
        """
        root = _local_directory(directory)
        index_path = root / "model_index.json"
        if not index_path.is_file():
            raise MissingFileError(
                index_path, "no such file", "Give the directory that holds model_index.json, transformer/ and vae/."
            )
        index = read_json_object(index_path)
        _check_pipeline_class(index_path, index)
        components = _present_components(root, index_path, index)
        _check_tokenizer(root / "text_tokenizer")

        transformer_path = root / "transformer" / "config.json"
        transformer = TransformerConfig.read(transformer_path)
        vae = VideoVAEConfig.read(root / "vae" / "config.json")
        audio = None
        if transformer.sound_gen and "sound_tokenizer" in components:
            audio = AudioVAEConfig.read(root / "sound_tokenizer" / "config.json")
        _check_agreement(transformer_path, transformer, vae, audio)

        return cls(
            directory=root,
            name=_checkpoint_name(root),
            variant=recognize_variant(transformer, read_json_object(transformer_path).get("backbone_type")),
            components=components,
            transformer=transformer,
            vae=vae,
            scheduler=SchedulerConfig.read(root / "scheduler" / "scheduler_config.json"),
            audio=audio,
            default_use_system_prompt=_flag(index_path, index, "default_use_system_prompt", default=True),
            use_native_flow_schedule=_flag(index_path, index, "use_native_flow_schedule", default=False),
            native_flow_shift=_positive_number(index_path, index, "native_flow_shift"),
            negative_prompt=read_negative_prompt(root),
        )

    @property
    def geometry(self) -> Geometry:
        """The checkpoint's compression factors for video."""
        return geometry(self.transformer, self.vae)

    @property
    def has_sound(self) -> bool:
        """Whether the checkpoint can make sound: it has the transformer heads and the sound tokenizer."""
        return self.audio is not None

    @property
    def has_action(self) -> bool:
        """Whether the transformer has the action heads."""
        return self.transformer.action_gen

    @property
    def preset_kind(self) -> str:
        """Key in :data:`cosmos3_core.presets.PRESETS`: the variant, or the name of a fine-tuned model.

        The files of Cosmos3-Nano-Policy-DROID are those of Nano: only its name tells them apart.
        """
        return "nano-policy-droid" if self.variant == "nano" and "policy-droid" in self.name.lower() else self.variant

    @property
    def model_names(self) -> tuple[str, ...]:
        """Names by which clients know the model: the checkpoint's, and those of the published one that it resembles."""
        published = _PUBLISHED[self.preset_kind]
        return tuple(dict.fromkeys((self.name, *(f"{_OWNER}{name}" for name in (self.name, published)), published)))

    def component_dir(self, component: str) -> Path:
        """Return the directory of a component, such as "vae".

        Raises:
            MissingFileError: the checkpoint lacks it.
        """
        if component not in self.components:
            raise MissingFileError(
                self.directory, f"has no component {component!r}", f"It has {', '.join(self.components)}."
            )
        return self.directory / component


def recognize_variant(transformer: TransformerConfig, backbone_type: object = None) -> ModelVariant:
    """Return the published model that a config resembles, which chooses the presets.

    No file states the variant, so the shapes decide. Edge: squared-ReLU MLPs, or a ``backbone_type`` of Edge. Super: 64
    layers, width 5120, or attention at least 1.5 times as wide as the model (64 heads x 128 over 5120 is 1.6; tiny
    copies keep that proportion). Nano: the rest.
    """
    if transformer.hidden_act == "relu2" or (isinstance(backbone_type, str) and "edge" in backbone_type):
        return "edge"
    attention_width = transformer.num_attention_heads * transformer.head_dim
    has_wide_attention = 2 * attention_width >= 3 * transformer.hidden_size
    if transformer.num_hidden_layers >= 64 or transformer.hidden_size >= 5120 or has_wide_attention:
        return "super"
    return "nano"


def read_negative_prompt(directory: Path) -> str | None:
    """Read the recommended negative prompt of the checkpoint in ``directory``; None if it has none.

    ``assets/negative_prompt.json`` holds a JSON object. The model was trained on ``json.dumps`` of it, without the
    file's line breaks.

    Raises:
        CorruptFileError: the file is not a JSON object.
    """
    path = directory / "assets" / "negative_prompt.json"
    return json.dumps(read_json_object(path)) if path.is_file() else None


def _local_directory(given: str | os.PathLike[str]) -> Path:
    path = Path(given).expanduser()
    if path.is_dir():
        # Absolute: other processes, with other working directories, open it too.
        return Path(os.path.abspath(find_snapshot(path) or path))
    if path.exists():
        raise MissingFileError(path, "is a file, not a directory", "Give the directory that holds model_index.json.")
    if cached := find_cached(str(given)):
        return cached
    raise MissingFileError(path, "no such directory, nor such a repository in the hub's local cache", DOWNLOAD_HINT)


def _checkpoint_name(root: Path) -> str:
    """Return the directory's name; in the Hugging Face cache (models--OWNER--NAME/snapshots) the repository's."""
    repository = root.parent.parent.name
    if root.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rsplit("--", 1)[-1]
    return root.name


def _check_pipeline_class(path: Path, index: dict[str, Any]) -> None:
    class_name = index.get("_class_name")
    if class_name not in PIPELINE_CLASSES:
        raise CheckpointError(
            path,
            f"_class_name is {class_name!r}, not {' or '.join(PIPELINE_CLASSES)}",
            "This is not a Cosmos3 checkpoint in the diffusers layout.",
        )


def _present_components(root: Path, index_path: Path, index: dict[str, Any]) -> tuple[str, ...]:
    """Return the components that the index lists, each with its directory."""
    present = tuple(name for name in (*_REQUIRED, *_OPTIONAL) if _is_listed(index_path, name, index.get(name)))
    for name in _REQUIRED:
        if name not in present:
            raise MissingFileError(
                index_path, f"lists no component {name!r}", "Generation needs it; the checkpoint is not complete."
            )
    for name in present:
        if name not in _NEVER_READ and not (root / name).is_dir():
            hint = f"Download {name}/ of the checkpoint as well"
            if name in _OPTIONAL:
                hint += f', or set "{name}": [null, null] in model_index.json to do without'
            raise MissingFileError(root / name, "no such directory, though model_index.json lists it", f"{hint}.")
    return tuple(name for name in present if (root / name).is_dir())


def _is_listed(index_path: Path, name: str, entry: object) -> bool:
    """Return whether the index lists a component as [library, class]; no entry, or [null, null], means no."""
    if entry is None or entry == [None, None]:
        return False
    if isinstance(entry, list) and len(entry) == 2 and all(isinstance(part, str) for part in entry):
        return True
    raise CorruptFileError(index_path, f"{name} is {entry!r}, neither [library, class] nor [null, null]")


def _check_tokenizer(directory: Path) -> None:
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise MissingFileError(
            path,
            "no such file",
            f"Download the whole {directory.name}/ of the checkpoint; prompts cannot be read without it.",
        )


def _check_agreement(
    path: Path, transformer: TransformerConfig, vae: VideoVAEConfig, audio: AudioVAEConfig | None
) -> None:
    """Refuse latents whose channels differ between the transformer and the VAE that decodes them."""
    if transformer.latent_channel != vae.z_dim:
        raise CorruptFileError(
            path, f"latent_channel={transformer.latent_channel}, but the vae's config has z_dim={vae.z_dim}"
        )
    if audio is not None and transformer.sound_dim != audio.vocoder_input_dim:
        raise CorruptFileError(
            path,
            f"sound_dim={transformer.sound_dim}, but the sound_tokenizer's config has "
            f"vocoder_input_dim={audio.vocoder_input_dim}",
        )


def _flag(path: Path, index: dict[str, Any], key: str, *, default: bool) -> bool:
    value = index.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise CorruptFileError(path, f"{key} is {value!r}, not true or false")
    return value


def _positive_number(path: Path, index: dict[str, Any], key: str) -> float | None:
    value = index.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise CorruptFileError(path, f"{key} is {value!r}, not a number above 0")
    return float(value)
