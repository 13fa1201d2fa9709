"""What a user asks for, and the same with every gap filled.

:class:`GenerationRequest` is what arrives: most fields may be left out. :func:`cosmos3_core.resolve.resolve` checks it
against a checkpoint and makes a :class:`ResolvedRequest` of it, in which nothing is optional. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cosmos3_core.actions import ActionTrack
from cosmos3_core.conditioning.modes import ACTIONS_ONLY, IMAGE, VIDEO
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.errors import RequestError
from cosmos3_core.media.image import DEFAULT_QUALITY
from cosmos3_core.media.mp4 import DEFAULT_CRF
from cosmos3_core.media.source import (
    ImageSource,
    VideoSource,
    pack_image,
    pack_video,
)
from cosmos3_core.media.writer import ClipFormat, SoundFormat
from cosmos3_core.sampler.schedule import SCHEDULES

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = "shipped"
NATIVE_BEHAVIOUR = "native"
DIFFUSERS_BEHAVIOUR = "diffusers"
BEHAVIOURS = (NATIVE_BEHAVIOUR, DIFFUSERS_BEHAVIOUR)
SCHEDULE_NAMES = (*SCHEDULES, SHIPPED)
NEGATIVE_METADATA = ("same", "none", "inverse")
KEEP = ("first", "last")
VIEW_POINTS = ("ego_view", "third_person_view", "wrist_view", "concat_view")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One generation, as asked for. ``None`` means: the preset of the checkpoint and the mode.

    Attributes:
        prompt: plain text, or a JSON object as a string; may be empty for dynamics.
        mode: a name of :data:`cosmos3_core.conditioning.modes.MODES`; None tells it from the fields: an image or a
            video continues it, one frame makes an image. Modes with actions have to be named.
        image: to begin with: a path, a file's bytes, a PIL image, an array [Y, X, 3].
        video: to begin with, or to find the actions of: a path, a file's bytes, an array [F, Y, X, 3], frames in a
            list.
        generate_sound: a sound track as well.
        actions: what forward dynamics is to carry out: rows of numbers [steps, width].
        action_chunk_size: actions; of given ones the last is repeated, or those behind are cut off.
        domain_name, domain_id: of the embodiment, see :mod:`cosmos3_core.embodiments`; one of them will do.
        raw_action_dim: numbers in an action; None = the embodiment's.
        resolution_tier: of the canvas for the given picture of modes with actions: 256, 480, 704 or 720.
        view_point: of their camera: ``ego_view``, ``third_person_view``, ``wrist_view`` or ``concat_view``.
        condition_frame_indexes_vision: latent frames that a given video fixes; (0, 1).
        condition_video_keep: which of its frames are used where it is longer: ``first`` or ``last``.
        negative_prompt: None = the structured default; "" = empty.
        num_frames: pixel frames; 1 makes an image; rounded up to 1 + k * (temporal compression).
        height, width: pixels, multiples of the spatial compression (16); not for modes with actions.
        fps: frames per second of the result.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 turns it off.
        guidance_interval: lowest and highest timestep, of 1000, that guidance is for; None = all.
        flow_shift: of the native and linear schedules.
        schedule: ``native``, ``linear``, ``karras``, or ``shipped`` for whatever the checkpoint's scheduler says.
        seed: of the initial noise.
        use_system_prompt: put the training system prompt first.
        append_metadata: add duration, frame rate and resolution to the prompt.
        negative_metadata: on the negative prompt: ``same`` as on the positive, ``none`` or ``inverse``.
        output: ``mp4``, ``wav`` (with sound), ``png``, ``jpeg`` or ``webp`` (images), or ``actions`` alone; None =
            mp4 or png, and actions alone for inverse dynamics, whose pictures are the given ones.
        output_quality: of jpeg and webp, 0 (smallest) to 100 (best); 90.
        crf: of mp4, H.264's quality, 0 (best) to 51; 18.
        lossless: of mp4: its yuv420p planes are stored exactly; large, and few players open it. Not with ``crf``.
        noise: modality -> initial noise to start from instead of drawing it; ``{"video": [1, C, T, H, W] fp32}``.
        compat: ``diffusers`` gives that pipeline's prompts and schedule (0.42.1) wherever a field is None.
    """

    prompt: str = ""
    mode: str | None = None
    image: ImageSource | None = field(default=None, compare=False, repr=False)
    video: VideoSource | None = field(default=None, compare=False, repr=False)
    generate_sound: bool = False
    actions: Any = field(default=None, compare=False, repr=False)
    action_chunk_size: int | None = None
    domain_name: str | None = None
    domain_id: int | None = None
    raw_action_dim: int | None = None
    resolution_tier: int | None = None
    view_point: str | None = None
    condition_frame_indexes_vision: Sequence[int] | int | None = None
    condition_video_keep: str | None = None
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    guidance_interval: Sequence[float] | None = None
    flow_shift: float | None = None
    schedule: str | None = None
    seed: int = 42
    use_system_prompt: bool | None = None
    append_metadata: bool = True
    negative_metadata: str | None = None
    output: str | None = None
    output_quality: int | None = None
    crf: float | None = None
    lossless: bool = False
    noise: dict[str, Tensor] | None = field(default=None, compare=False)
    compat: str = NATIVE_BEHAVIOUR

    def packed(self) -> GenerationRequest:
        """The same with its image or video as bytes or frames, to travel: files are read here and nowhere else.

        Raises:
            RequestError: it cannot be read, or is larger than allowed.
        """
        image = None if self.image is None else pack_image(IMAGE, self.image)
        video = None if self.video is None else pack_video(VIDEO, self.video)
        return self if image is None and video is None else replace(self, image=image, video=video)


@dataclass(frozen=True)
class SoundTrack:
    """The sound of a resolved request.

    Attributes:
        num_latents: that are generated; they decode to a little more than the pictures' time.
        track: what goes into the file, which ends with the pictures.
    """

    num_latents: int
    track: SoundFormat


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """One generation with every field decided; see :class:`GenerationRequest` for their meaning.

    Attributes:
        mode: its name.
        negative_prompt: None still means the default, which the processor knows.
        num_frames: of the result; a chunk of actions that ends between two latent frames has frames for the rest cut.
        height, width: pixels of the result.
        prompt_size: rows and columns that the prompt speaks of: those of the canvas where there is one.
        schedule: a real schedule's name; ``shipped`` is resolved.
        output: ``actions``, or the kind of the file.
        output_quality: of the file, where it is a jpeg or webp.
        crf, lossless: of the file, where it is an mp4.
        picture: what of the given image or video is encoded; None where there is none.
        action: the actions; None where there are none.
        sound: the sound; None where there is none.
        notes: what was changed on the way, for the user to read.
    """

    mode: str
    prompt: str
    negative_prompt: str | None
    num_frames: int
    height: int
    width: int
    prompt_size: tuple[int, int]
    fps: float
    num_inference_steps: int
    guidance_scale: float
    guidance_interval: tuple[float, float] | None
    flow_shift: float
    schedule: str
    seed: int
    use_system_prompt: bool
    append_metadata: bool
    negative_metadata: str
    output: str
    output_quality: int = DEFAULT_QUALITY
    crf: float = DEFAULT_CRF
    lossless: bool = False
    picture: PictureCondition | None = None
    action: ActionTrack | None = None
    sound: SoundTrack | None = None
    noise: dict[str, Tensor] | None = field(default=None, compare=False)
    compat: str = NATIVE_BEHAVIOUR
    notes: tuple[str, ...] = ()

    @property
    def has_generated_actions(self) -> bool:
        """Whether actions are part of the result."""
        return self.action is not None and self.action.given is None

    @property
    def has_file(self) -> bool:
        """Whether pictures or sound are part of the result."""
        return self.output != ACTIONS_ONLY

    @property
    def has_pictures(self) -> bool:
        """Whether pictures have to be decoded."""
        return self.output not in (ACTIONS_ONLY, "wav")

    def clip_format(self) -> ClipFormat:
        """The file that this request becomes.

        Raises:
            RequestError: it becomes none.
        """
        if not self.has_file:
            raise RequestError("output", self.output, "a kind of file")
        return ClipFormat(
            kind=self.output,
            height=self.height,
            width=self.width,
            fps=self.fps,
            crf=self.crf,
            lossless=self.lossless,
            sound=None if self.sound is None else self.sound.track,
            quality=self.output_quality,
        )
