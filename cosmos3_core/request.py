"""What a user asks for, and the same with every gap filled.

:class:`GenerationRequest` is what arrives: most fields may be left out. :func:`resolve` checks it against a checkpoint
and returns a :class:`ResolvedRequest` in which nothing is optional, or raises the error that says what to do. All of
that happens before anything large is allocated. No torch here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cosmos3_core import checks
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import RequestError
from cosmos3_core.media.writer import ClipFormat
from cosmos3_core.presets import LIMITS, PRESETS, TEXT_TO_IMAGE, TEXT_TO_VIDEO
from cosmos3_core.sampler.schedule import SCHEDULES

if TYPE_CHECKING:
    from torch import Tensor

SHIPPED = "shipped"
NATIVE_BEHAVIOUR = "native"
DIFFUSERS_BEHAVIOUR = "diffusers"
BEHAVIOURS = (NATIVE_BEHAVIOUR, DIFFUSERS_BEHAVIOUR)
SCHEDULE_NAMES = (*SCHEDULES, SHIPPED)
NEGATIVE_METADATA = ("same", "none", "inverse")


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """One generation, as asked for. ``None`` means: the preset of the checkpoint's family and the mode.

    Attributes:
        prompt: plain text, or a JSON object as a string.
        negative_prompt: None = the structured default; "" = empty.
        num_frames: pixel frames; 1 makes an image; rounded up to 1 + k * (temporal compression).
        height, width: pixels, multiples of the spatial compression (16).
        fps: frames per second of the result.
        num_inference_steps: denoising steps.
        guidance_scale: classifier-free guidance; 1 turns it off.
        flow_shift: of the native and linear schedules.
        schedule: ``native``, ``linear``, ``karras``, or ``shipped`` for whatever the checkpoint's scheduler says.
        seed: of the initial noise.
        use_system_prompt: put the training system prompt first.
        append_metadata: add duration, frame rate and resolution to the prompt.
        negative_metadata: on the negative prompt: ``same`` as on the positive, ``none`` or ``inverse``.
        noise: modality -> initial noise to start from instead of drawing it; ``{"video": [1, C, T, H, W] fp32}``.
        compat: ``diffusers`` gives that pipeline's prompts and schedule (0.42.1) wherever a field is None.
    """

    prompt: str
    negative_prompt: str | None = None
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    schedule: str | None = None
    seed: int = 42
    use_system_prompt: bool | None = None
    append_metadata: bool = True
    negative_metadata: str | None = None
    noise: dict[str, Tensor] | None = field(default=None, compare=False)
    compat: str = NATIVE_BEHAVIOUR


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """One generation with every field decided; see :class:`GenerationRequest` for their meaning.

    Attributes:
        mode: ``text_to_video`` or ``text_to_image``.
        negative_prompt: None still means the default, which the processor knows.
        schedule: a real schedule's name; ``shipped`` is resolved.
        notes: what was changed on the way, for the user to read.
    """

    mode: str
    prompt: str
    negative_prompt: str | None
    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    flow_shift: float
    schedule: str
    seed: int
    use_system_prompt: bool
    append_metadata: bool
    negative_metadata: str
    noise: dict[str, Tensor] | None = field(default=None, compare=False)
    compat: str = NATIVE_BEHAVIOUR
    notes: tuple[str, ...] = ()

    def clip_format(self, *, crf: float = 18, lossless: bool = False) -> ClipFormat:
        """The file that this request becomes."""
        kind = "png" if self.mode == TEXT_TO_IMAGE else "mp4"
        return ClipFormat(kind, self.height, self.width, self.fps, crf, lossless)


def resolve(request: GenerationRequest, layout: CheckpointLayout) -> ResolvedRequest:
    """Check a request against a checkpoint and fill its gaps.

    Raises:
        RequestError: a field is out of bounds; names it, what was given and what is allowed.
    """
    checks.text("prompt", request.prompt, LIMITS.max_prompt_chars, may_be_empty=False)
    if request.negative_prompt is not None:
        checks.text("negative_prompt", request.negative_prompt, LIMITS.max_prompt_chars, may_be_empty=True)
    like_diffusers = checks.choice("compat", request.compat, BEHAVIOURS) == DIFFUSERS_BEHAVIOUR

    mode = TEXT_TO_IMAGE if request.num_frames == 1 else TEXT_TO_VIDEO
    preset = PRESETS[layout.family, mode]
    asked_frames = checks.integer("num_frames", _or(request.num_frames, preset.num_frames), 1, LIMITS.max_num_frames)
    num_frames = layout.geometry.round_up_num_frames(asked_frames)
    notes: tuple[str, ...] = ()
    if num_frames != asked_frames:
        rule = f"clips have 1 + k * {layout.geometry.temporal} frames"
        notes = (f"num_frames={asked_frames} was rounded up to {num_frames}: {rule}",)
    height = checks.pixels(
        "height", _or(request.height, preset.height), layout.geometry.spatial, LIMITS.max_side_pixels
    )
    width = checks.pixels("width", _or(request.width, preset.width), layout.geometry.spatial, LIMITS.max_side_pixels)
    _check_token_budget(num_frames, height, width, layout)

    steps = _or(request.num_inference_steps, preset.num_inference_steps)
    guidance_scale = _or(request.guidance_scale, preset.guidance_scale)
    schedule = checks.choice("schedule", _or(request.schedule, SHIPPED if like_diffusers else "native"), SCHEDULE_NAMES)
    as_shipped = like_diffusers or schedule == SHIPPED
    flow_shift = _or(request.flow_shift, shipped_flow_shift(layout) if as_shipped else preset.flow_shift)
    system_prompt = _or(request.use_system_prompt, like_diffusers and layout.default_use_system_prompt)
    negative_metadata = _or(request.negative_metadata, "inverse" if like_diffusers else "same")
    return ResolvedRequest(
        mode=mode,
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=checks.real("fps", _or(request.fps, preset.fps), LIMITS.min_fps, LIMITS.max_fps),
        num_inference_steps=checks.integer("num_inference_steps", steps, 1, LIMITS.max_num_inference_steps),
        guidance_scale=checks.real("guidance_scale", guidance_scale, 0, LIMITS.max_guidance_scale),
        flow_shift=checks.real("flow_shift", flow_shift, LIMITS.min_flow_shift, LIMITS.max_flow_shift),
        schedule=shipped_schedule(layout) if schedule == SHIPPED else schedule,
        seed=checks.integer("seed", request.seed, 0, LIMITS.max_seed),
        use_system_prompt=checks.flag("use_system_prompt", system_prompt),
        append_metadata=checks.flag("append_metadata", request.append_metadata),
        negative_metadata=checks.choice("negative_metadata", negative_metadata, NEGATIVE_METADATA),
        noise=request.noise,
        compat=request.compat,
        notes=notes,
    )


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def shipped_flow_shift(layout: CheckpointLayout) -> float:
    """The shift that goes with :func:`shipped_schedule`."""
    if layout.use_native_flow_schedule and layout.native_flow_shift is not None:
        return layout.native_flow_shift
    return layout.scheduler.flow_shift


def shipped_schedule(layout: CheckpointLayout) -> str:
    """The schedule that a checkpoint's own scheduler config amounts to; what diffusers runs with it."""
    if layout.scheduler.use_karras_sigmas:
        return "karras"
    return "native" if layout.use_native_flow_schedule else "linear"


def _check_token_budget(num_frames: int, height: int, width: int, layout: CheckpointLayout) -> None:
    num_tokens = layout.geometry.num_tokens(num_frames, height, width)
    budget = layout.transformer.max_position_embeddings - LIMITS.max_text_tokens
    if num_tokens > budget:
        raise RequestError(
            "num_frames x height x width",
            f"{num_frames} x {height} x {width}",
            f"at most {budget} video tokens, this is {num_tokens}",
            "Ask for fewer frames or a smaller picture.",
        )
