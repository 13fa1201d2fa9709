"""The modes, as data: what a request brings, which latent frames that makes clean, what is generated beside them.

A new mode is a row here and one in :mod:`cosmos3_core.presets`: neither the denoising loop nor any stage knows a mode
by name. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

ACTIONS_ONLY = "actions"
"""The output that decodes no picture."""

IMAGE, VIDEO = "image", "video"
"""What media may be: the request's field of that name."""


class Resizing(Enum):
    """How given pictures come to the size of the generated ones; see :mod:`cosmos3_core.conditioning.resize`."""

    CROP = "crop"
    STRETCH = "stretch"
    PAD = "pad"


class ActionRole(Enum):
    """Whether actions are part of a request."""

    NONE = "none"
    GIVEN = "given"
    GENERATED = "generated"


CleanFrames = Callable[[int, tuple[int, ...]], tuple[int, ...]]
"""(number of latent frames, those that the request chose) -> latent frames that are given, ascending."""


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
        name: that requests, presets and ``/v1/models`` call it by.
        media: fields of which a request brings exactly one; none for those from text alone.
        clean_frames: which latent frames the media gives.
        resizing: how the media comes to size; None without media.
        actions: whether they are given, generated, or not part of it.
        has_sound: a sound track is generated with the pictures.
        is_image: the result is a single picture.
        needs_prompt: False where an empty prompt says enough.
        chooses_frames: a request says which latent frames are given.
        output: the default one; None: a file of the kind that the result is.

    Raises:
        ValueError: a row that contradicts itself.
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
    output: str | None = None

    def __post_init__(self) -> None:
        if (self.resizing is None) != (not self.media):
            raise ValueError(f"{self.name}: media and resizing go together")
        if self.resizing is Resizing.PAD and not self.has_actions:
            raise ValueError(f"{self.name}: only modes with actions have a tier, which says how to pad")

    @property
    def has_actions(self) -> bool:
        """Whether actions are part of it."""
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
    Mode(IMAGE_TO_VIDEO, (IMAGE,), _first_frame, Resizing.CROP),
    Mode(VIDEO_TO_VIDEO, (VIDEO,), _choose_frames, Resizing.STRETCH, chooses_frames=True),
)
_ACTING = (
    Mode(FORWARD_DYNAMICS, (IMAGE, VIDEO), _first_frame, Resizing.PAD, ActionRole.GIVEN, needs_prompt=False),
    Mode(
        INVERSE_DYNAMICS,
        (VIDEO,),
        _all_frames,
        Resizing.PAD,
        ActionRole.GENERATED,
        needs_prompt=False,
        output=ACTIONS_ONLY,  # the pictures are the given ones over again
    ),
    Mode(POLICY, (IMAGE, VIDEO), _first_frame, Resizing.PAD, ActionRole.GENERATED),
)
_ALL = (
    Mode(TEXT_TO_IMAGE, is_image=True),
    *_SILENT,
    *(replace(mode, name=mode.name + WITH_SOUND, has_sound=True) for mode in _SILENT),
    *_ACTING,
)

MODES: dict[str, Mode] = {mode.name: mode for mode in _ALL}
