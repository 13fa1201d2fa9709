"""What a user asks for, and the same with every gap filled.

:class:`GenerationRequest` is what arrives: most fields may be left out. :func:`resolve` checks it against a checkpoint
and returns a :class:`ResolvedRequest` in which nothing is optional, or raises the error that says what to do. All of
that happens before anything large is allocated. No torch here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
        return ClipFormat(self.mode == TEXT_TO_IMAGE, self.height, self.width, self.fps, crf, lossless)


def resolve(request: GenerationRequest, layout: CheckpointLayout) -> ResolvedRequest:
    """Check a request against a checkpoint and fill its gaps.

    Raises:
        RequestError: a field is out of bounds; names it, what was given and what is allowed.
    """
    _check_text("prompt", request.prompt, may_be_empty=False)
    if request.negative_prompt is not None:
        _check_text("negative_prompt", request.negative_prompt, may_be_empty=True)
    _check_choice("compat", request.compat, (NATIVE_BEHAVIOUR, DIFFUSERS_BEHAVIOUR))
    like_diffusers = request.compat == DIFFUSERS_BEHAVIOUR

    mode = TEXT_TO_IMAGE if request.num_frames == 1 else TEXT_TO_VIDEO
    preset = PRESETS[layout.family, mode]
    asked_frames = _integer("num_frames", request.num_frames, preset.num_frames, 1, LIMITS.max_num_frames)
    num_frames = layout.geometry.round_up_num_frames(asked_frames)
    notes: tuple[str, ...] = ()
    if num_frames != asked_frames:
        notes = (
            f"num_frames={asked_frames} was rounded up to {num_frames}: "
            f"clips have 1 + k * {layout.geometry.temporal} frames",
        )
    height = _pixels("height", request.height, preset.height, layout.geometry.spatial)
    width = _pixels("width", request.width, preset.width, layout.geometry.spatial)
    _check_token_budget(num_frames, height, width, layout)

    schedule = request.schedule or (SHIPPED if like_diffusers else SCHEDULES[0])
    _check_choice("schedule", schedule, (*SCHEDULES, SHIPPED))
    default_shift = layout.scheduler.flow_shift if like_diffusers else preset.flow_shift
    negative_metadata = request.negative_metadata or ("inverse" if like_diffusers else "same")
    _check_choice("negative_metadata", negative_metadata, NEGATIVE_METADATA)
    use_system_prompt = request.use_system_prompt
    if use_system_prompt is None:
        use_system_prompt = like_diffusers and layout.default_use_system_prompt
    negative_prompt = request.negative_prompt
    if negative_prompt is None and like_diffusers:
        negative_prompt = ""

    resolved = ResolvedRequest(
        mode=mode,
        prompt=request.prompt,
        negative_prompt=negative_prompt,
        num_frames=num_frames,
        height=height,
        width=width,
        fps=_real("fps", request.fps, preset.fps, LIMITS.min_fps, LIMITS.max_fps),
        num_inference_steps=_integer(
            "num_inference_steps",
            request.num_inference_steps,
            preset.num_inference_steps,
            1,
            LIMITS.max_num_inference_steps,
        ),
        guidance_scale=_real(
            "guidance_scale", request.guidance_scale, preset.guidance_scale, 0, LIMITS.max_guidance_scale
        ),
        flow_shift=_real("flow_shift", request.flow_shift, default_shift, 1e-3, LIMITS.max_flow_shift),
        schedule=shipped_schedule(layout) if schedule == SHIPPED else schedule,
        seed=_integer("seed", request.seed, 0, 0, LIMITS.max_seed),
        use_system_prompt=use_system_prompt,
        append_metadata=request.append_metadata,
        negative_metadata=negative_metadata,
        noise=request.noise,
        compat=request.compat,
        notes=notes,
    )
    return resolved


def shipped_schedule(layout: CheckpointLayout) -> str:
    """The schedule that a checkpoint's own scheduler config amounts to; what diffusers runs with it."""
    if layout.scheduler.use_karras_sigmas:
        return "karras"
    return "native" if layout.use_native_flow_schedule else "linear"


def _check_text(name: str, value: Any, *, may_be_empty: bool) -> None:
    if not isinstance(value, str):
        raise RequestError(name, value, "a string")
    if not may_be_empty and not value.strip():
        raise RequestError(name, value, "a text with at least one visible character")
    if len(value) > LIMITS.max_prompt_chars:
        raise RequestError(name, value, f"at most {LIMITS.max_prompt_chars} characters", "Shorten the text.")


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise RequestError(name, value, f"one of {list(allowed)}")


def _integer(name: str, value: Any, default: int, low: int, high: int) -> int:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(name, value, f"a whole number from {low} to {high}")
    return value


def _real(name: str, value: Any, default: float, low: float, high: float) -> float:
    value = default if value is None else value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not low <= value <= high:
        raise RequestError(name, value, f"a number from {low:g} to {high:g}")
    return float(value)


def _pixels(name: str, value: Any, default: int, multiple: int) -> int:
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < multiple:
        raise RequestError(name, value, f"a multiple of {multiple}, at least {multiple}")
    if value % multiple:
        below = value - value % multiple
        raise RequestError(name, value, f"a multiple of {multiple}", f"Nearest are {below} and {below + multiple}.")
    return value


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
