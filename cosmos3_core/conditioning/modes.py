"""The modes as data: the media of a request, the latent frames that they fix, and the results.

A new mode is a row here and one in :mod:`cosmos3_core.presets`: neither the denoising loop nor any stage knows a mode
by name. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

from cosmos3_core.media.file_kinds import IMAGE_KINDS

ACTIONS_ONLY = "actions"
"""The output without pictures."""

MEDIA_FIELDS = IMAGE_FIELD, VIDEO_FIELD = "image", "video"
"""The request's fields of media."""


class Resizing(Enum):
    """How given pictures are resized to the generated ones; see :mod:`cosmos3_core.conditioning.resize`."""

    CROP = "crop"
    STRETCH = "stretch"
    PAD = "pad"


class ActionRole(Enum):
    """The role of actions in a mode."""

    NONE = "none"
    GIVEN = "given"
    GENERATED = "generated"


CleanFrames = Callable[[int, tuple[int, ...]], tuple[int, ...]]
"""(number of latent frames, frames that the request chose) -> latent frames that media fix, ascending."""


def _no_frame(num_latent_frames: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
    return ()


def _first_frame(num_latent_frames: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
    return (0,)


def _choose_frames(num_latent_frames: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
    return chosen


def _all_frames(num_latent_frames: int, chosen: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(range(num_latent_frames))


@dataclass(frozen=True)
class Mode:
    """One mode: the media it takes, the frames they fix, and the results it makes.

    Attributes:
        name: its name in requests, presets and ``/v1/models``.
        media: fields of which a request has exactly one; none for modes from text alone.
        clean_frames: chooses the latent frames that the media fix.
        resizing: how the media are resized; None without media.
        actions: whether actions are given, generated, or not part of it.
        has_sound: whether a sound track is generated with the pictures.
        is_image: whether the result is a single picture.
        needs_prompt: False if the prompt may be empty.
        chooses_frames: whether a request chooses the latent frames that its media fix.
        outputs: kinds of output to choose from, the default one first.

    Raises:
        ValueError: the row contradicts itself.
    """

    name: str
    media: tuple[str, ...] = ()
    clean_frames: CleanFrames = _no_frame
    resizing: Resizing | None = None
    actions: ActionRole = ActionRole.NONE
    has_sound: bool = False
    is_image: bool = False
    needs_prompt: bool = True
    chooses_frames: bool = False
    outputs: tuple[str, ...] = ("mp4",)

    def __post_init__(self) -> None:
        if (self.resizing is None) != (not self.media):
            raise ValueError(f"{self.name}: media and resizing go together")
        if self.resizing is Resizing.PAD and not self.has_actions:
            raise ValueError(f"{self.name}: only modes with actions have a tier, which says how to pad")

    @property
    def has_actions(self) -> bool:
        """Whether actions are given or generated."""
        return self.actions is not ActionRole.NONE


TEXT_TO_IMAGE = "text_to_image"
TEXT_TO_VIDEO = "text_to_video"
IMAGE_TO_VIDEO = "image_to_video"
VIDEO_TO_VIDEO = "video_to_video"
FORWARD_DYNAMICS = "forward_dynamics"
INVERSE_DYNAMICS = "inverse_dynamics"
POLICY = "policy"
WITH_SOUND = "_with_sound"

_SILENT = (
    Mode(TEXT_TO_VIDEO),
    Mode(IMAGE_TO_VIDEO, (IMAGE_FIELD,), _first_frame, Resizing.CROP),
    Mode(VIDEO_TO_VIDEO, (VIDEO_FIELD,), _choose_frames, Resizing.STRETCH, chooses_frames=True),
)
_ACTING = (
    Mode(FORWARD_DYNAMICS, MEDIA_FIELDS, _first_frame, Resizing.PAD, ActionRole.GIVEN, needs_prompt=False),
    Mode(
        INVERSE_DYNAMICS,
        (VIDEO_FIELD,),
        _all_frames,
        Resizing.PAD,
        ActionRole.GENERATED,
        needs_prompt=False,
        outputs=(ACTIONS_ONLY, "mp4"),  # the pictures repeat the given ones
    ),
    Mode(POLICY, MEDIA_FIELDS, _first_frame, Resizing.PAD, ActionRole.GENERATED, outputs=("mp4", ACTIONS_ONLY)),
)
_ALL = (
    Mode(TEXT_TO_IMAGE, is_image=True, outputs=IMAGE_KINDS),
    *_SILENT,
    *(replace(mode, name=mode.name + WITH_SOUND, has_sound=True, outputs=("mp4", "wav")) for mode in _SILENT),
    *_ACTING,
)

MODES: dict[str, Mode] = {mode.name: mode for mode in _ALL}
