"""A user's request, and the same with every gap filled.

A :class:`GenerationRequest` may leave out most fields. :func:`cosmos3_core.resolve.resolve` checks it against a
checkpoint and turns it into a :class:`ResolvedRequest`, which leaves out none. Importing this loads neither torch nor
numpy: the command line reads the fields for its help.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cosmos3_core.conditioning.canvas import ACTION_TIERS, SIDE_MULTIPLE
from cosmos3_core.conditioning.modes import ACTIONS_ONLY, IMAGE_FIELD, MODES, VIDEO_FIELD, ActionRole, Mode
from cosmos3_core.embodiments import EMBODIMENTS
from cosmos3_core.field_spec import FieldSpec, ValueKind, spec_field, spec_of
from cosmos3_core.media.file_kinds import DEFAULT_CRF, DEFAULT_QUALITY, IMAGE_KINDS, MAX_CRF, MAX_QUALITY
from cosmos3_core.presets import LIMITS, SCHEDULES

if TYPE_CHECKING:
    from torch import Tensor

    from cosmos3_core.actions import ActionTrack
    from cosmos3_core.conditioning.picture import PictureCondition
    from cosmos3_core.media.source import ImageSource, VideoSource
    from cosmos3_core.media.writer import ClipFormat
    from cosmos3_core.prompts import PromptFormat

SHIPPED = "shipped"
NATIVE_BEHAVIOUR = "native"
DIFFUSERS_BEHAVIOUR = "diffusers"
BEHAVIOURS = (NATIVE_BEHAVIOUR, DIFFUSERS_BEHAVIOUR)
SCHEDULE_NAMES = (*SCHEDULES, SHIPPED)
NEGATIVE_METADATA = ("same", "none", "inverse")
KEEP = ("first", "last")
VIEW_POINTS = ("ego_view", "third_person_view", "wrist_view", "concat_view")
NUM_TIMESTEPS = 1000
"""Noise levels that a model was trained on."""


def _has_actions(mode: Mode) -> bool:
    return mode.has_actions


def _has_no_actions(mode: Mode) -> bool:
    return not mode.has_actions


def _takes_actions(mode: Mode) -> bool:
    return mode.actions is ActionRole.GIVEN


def _takes_image(mode: Mode) -> bool:
    return IMAGE_FIELD in mode.media


def _takes_video(mode: Mode) -> bool:
    return VIDEO_FIELD in mode.media


def _chooses_frames(mode: Mode) -> bool:
    return mode.chooses_frames


_SIDE: dict[str, Any] = {
    "low": SIDE_MULTIPLE,
    "high": LIMITS.max_side_pixels,
    "multiple_of": SIDE_MULTIPLE,
    "unit": "pixels",
    "is_for": _has_no_actions,
    "otherwise": "the given picture and resolution_tier decide",
}


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A request for one generation. ``None`` takes the preset of the checkpoint and the mode.

    Each field carries a :class:`~cosmos3_core.field_spec.FieldSpec`: its description, its inclusive bounds and the
    modes that read it; :data:`FIELDS` has them by name.
    """

    prompt: str = spec_field(
        ValueKind.TEXT,
        "plain text, or a JSON object as a string; may be empty for dynamics",
        default="",
    )
    mode: str | None = spec_field(
        ValueKind.TEXT,
        "by default an image or a video is continued, and one frame makes an image; modes with actions must be named",
        choices=tuple(MODES),
    )
    image: ImageSource | None = spec_field(
        ValueKind.IMAGE,
        "the picture to begin with: a path, a file's bytes, a PIL image, or an array [Y, X, 3]",
        is_compared=False,
        is_for=_takes_image,
    )
    video: VideoSource | None = spec_field(
        ValueKind.VIDEO,
        "the clip to continue, or to find the actions of: a path, a file's bytes, an array [F, Y, X, 3], or frames",
        is_compared=False,
        is_for=_takes_video,
    )
    generate_sound: bool = spec_field(ValueKind.FLAG, "generate a sound track as well", default=False)
    actions: Any = spec_field(
        ValueKind.ROWS,
        "what forward_dynamics carries out: rows of numbers [steps, width]",
        is_compared=False,
        is_for=_takes_actions,
    )
    action_chunk_size: int | None = spec_field(
        ValueKind.INTEGER,
        "actions, one between two frames; the last given action is repeated, or those behind are cut off",
        low=1,
        high=LIMITS.max_actions,
        unit="actions",
        is_for=_has_actions,
    )
    domain_name: str | None = spec_field(
        ValueKind.TEXT,
        f"embodiment of the actions: {', '.join(EMBODIMENTS)}",
        is_for=_has_actions,
    )
    domain_id: int | None = spec_field(
        ValueKind.INTEGER,
        "embodiment of the actions by number, below the number that the checkpoint has",
        low=0,
        high=1023,
        is_for=_has_actions,
    )
    raw_action_dim: int | None = spec_field(
        ValueKind.INTEGER,
        "numbers in an action; by default the embodiment's",
        low=1,
        high=1024,
        is_for=_has_actions,
    )
    resolution_tier: int | None = spec_field(
        ValueKind.INTEGER,
        "tier of the canvas that the given picture is fitted into",
        choices=tuple(ACTION_TIERS),
        is_for=_has_actions,
    )
    view_point: str | None = spec_field(ValueKind.TEXT, "where the camera is", choices=VIEW_POINTS, is_for=_has_actions)
    condition_frame_indexes_vision: Sequence[int] | int | None = spec_field(
        ValueKind.INTEGERS,
        "latent frames that the given video fixes; by default 0 and 1",
        low=0,
        is_for=_chooses_frames,
    )
    condition_video_keep: str | None = spec_field(
        ValueKind.TEXT, "which frames of a longer video are used", choices=KEEP, is_for=_chooses_frames
    )
    negative_prompt: str | None = spec_field(
        ValueKind.TEXT,
        "what to steer away from; by default a structured text, none if empty",
    )
    # 50 s at 24 fps, four times the longest clip NVIDIA documents (300 frames).
    num_frames: int | None = spec_field(
        ValueKind.INTEGER, "pixel frames, rounded up to 1 + 4k; 1 makes an image", low=1, high=1201, unit="frames"
    )
    height: int | None = spec_field(ValueKind.INTEGER, "rows of the result, given together with width", **_SIDE)
    width: int | None = spec_field(ValueKind.INTEGER, "columns of the result, given together with height", **_SIDE)
    fps: float | None = spec_field(ValueKind.NUMBER, "frames per second", low=1.0, high=120.0, unit="frames/s")
    num_inference_steps: int | None = spec_field(
        ValueKind.INTEGER, "denoising steps", low=1, high=NUM_TIMESTEPS, unit="steps"
    )
    # As in vLLM-Omni's API.
    guidance_scale: float | None = spec_field(
        ValueKind.NUMBER, "classifier-free guidance; 1 turns it off", low=0.0, high=20.0
    )
    guidance_interval: Sequence[float] | None = spec_field(
        ValueKind.NUMBERS,
        "lowest and highest timestep that guidance is for; by default all",
        low=0.0,
        high=NUM_TIMESTEPS,
        num_items=2,
        unit="timesteps",
    )
    flow_shift: float | None = spec_field(
        ValueKind.NUMBER, "shift of the native and linear schedules towards noise", low=0.001, high=100.0
    )
    schedule: str | None = spec_field(
        ValueKind.TEXT, "schedule of the noise levels; shipped: the checkpoint's own", choices=SCHEDULE_NAMES
    )
    seed: int = spec_field(ValueKind.INTEGER, "seed of the initial noise", default=42, low=0, high=2**63 - 1)
    use_system_prompt: bool | None = spec_field(ValueKind.FLAG, "put the training system prompt first")
    append_metadata: bool = spec_field(
        ValueKind.FLAG, "add duration, frame rate and resolution to the prompt", default=True
    )
    negative_metadata: str | None = spec_field(
        ValueKind.TEXT, "what the negative prompt says of duration and resolution", choices=NEGATIVE_METADATA
    )
    output: str | None = spec_field(
        ValueKind.TEXT,
        "kind of the file: wav with sound, png, jpeg or webp of one frame; or actions alone",
        choices=("mp4", "wav", *IMAGE_KINDS, ACTIONS_ONLY),
    )
    output_quality: int | None = spec_field(
        ValueKind.INTEGER, f"quality of jpeg and webp, 0 is smallest; {DEFAULT_QUALITY}", low=0, high=MAX_QUALITY
    )
    crf: float | None = spec_field(
        ValueKind.NUMBER, f"H.264 quality of mp4, 0 is best; {DEFAULT_CRF}", low=0.0, high=MAX_CRF
    )
    lossless: bool = spec_field(
        ValueKind.FLAG,
        "store the yuv420p planes of mp4 exactly; large, and few players open it; not with crf",
        default=False,
    )
    noise: dict[str, Tensor] | None = spec_field(
        ValueKind.TENSORS,
        "modality -> initial noise instead of the seed's; video: [1, C, T, H, W] fp32",
        is_compared=False,
    )
    compat: str = spec_field(
        ValueKind.TEXT,
        "whose prompts and schedule to follow where a field is left out: diffusers means its 0.42.1 pipeline",
        default=NATIVE_BEHAVIOUR,
        choices=BEHAVIOURS,
    )

    def packed(self) -> GenerationRequest:
        """Return the request with its image or video as bytes or frames, for another process; only this reads files.

        Raises:
            RequestError: the file cannot be read, or is larger than its bound.
        """
        from cosmos3_core.media.source import pack_image, pack_video

        image = None if self.image is None else pack_image(IMAGE_FIELD, self.image)
        video = None if self.video is None else pack_video(VIDEO_FIELD, self.video)
        return self if image is None and video is None else replace(self, image=image, video=video)


FIELDS: Mapping[str, FieldSpec] = MappingProxyType({it.name: spec_of(it) for it in fields(GenerationRequest)})
"""Name of a field of :class:`GenerationRequest` -> its bounds and description."""


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """One generation with every field decided; :class:`GenerationRequest` describes the fields that both have.

    Attributes:
        mode: name of the mode.
        negative_prompt: None takes the default of :mod:`cosmos3_core.prompts`.
        num_frames: pixel frames of the result; fewer than a chunk of actions has if it ends inside a latent frame.
        height, width: pixels of the result.
        prompt_format: how the model reads the two prompts.
        schedule: name of a schedule, never ``shipped``.
        file: format of the result's file; None for actions alone.
        picture: the part of the given image or video that is encoded; None without one.
        action: the actions; None without any.
        num_sound_latents: number of sound latents, which decode to slightly more than the file's sound; 0 without.
        notes: changes that resolving made, for the user to read.
    """

    mode: str
    prompt: str
    negative_prompt: str | None
    num_frames: int
    height: int
    width: int
    prompt_format: PromptFormat
    fps: float
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    flow_shift: float
    schedule: str
    seed: int
    file: ClipFormat | None
    picture: PictureCondition | None = None
    action: ActionTrack | None = None
    num_sound_latents: int = 0
    noise: dict[str, Tensor] | None = field(default=None, compare=False)
    notes: tuple[str, ...] = ()

    @property
    def has_generated_actions(self) -> bool:
        """Whether actions are part of the result."""
        return self.action is not None and self.action.given is None

    @property
    def has_pictures(self) -> bool:
        """Whether pictures have to be decoded."""
        return self.file is not None and self.file.has_pictures
