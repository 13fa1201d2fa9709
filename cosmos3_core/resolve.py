"""Checks a request against a checkpoint and fills its gaps: :func:`resolve`.

Every fault of a request is found here, before anything large is allocated; only the headers of images and clips are
read. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from cosmos3_core import checks
from cosmos3_core.actions import ActionTrack, resolve_actions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.canvas import action_canvas, content_size
from cosmos3_core.conditioning.modes import (
    ACTIONS_ONLY,
    IMAGE_TO_VIDEO,
    MEDIA_FIELDS,
    MODES,
    TEXT_TO_IMAGE,
    TEXT_TO_VIDEO,
    VIDEO_TO_VIDEO,
    WITH_SOUND,
    Mode,
)
from cosmos3_core.conditioning.picture import GivenPicture, PictureCondition, probe_picture
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.file_kinds import DEFAULT_CRF, DEFAULT_QUALITY, LOSSY_IMAGE_KINDS
from cosmos3_core.media.image import check_image
from cosmos3_core.media.source import ClipInfo, Packed, probe_clip
from cosmos3_core.media.writer import ClipFormat, SoundFormat
from cosmos3_core.presets import LIMITS, PRESETS, ActionPreset, Preset
from cosmos3_core.prompts import PromptFormat, read_json_prompt
from cosmos3_core.request import (
    DIFFUSERS_BEHAVIOUR,
    FIELDS,
    KEEP,
    SHIPPED,
    GenerationRequest,
    ResolvedRequest,
)
from cosmos3_core.shapes import num_sound_latents, sound_samples

# Latent frames of a continued clip that are kept by default, as in diffusers and cosmos-framework.
_DEFAULT_CLEAN_FRAMES = (0, 1)


class _Clip(NamedTuple):
    """The size of the result in pixels, and that of the clip which the prompt describes.

    Attributes:
        num_frames, height, width: of the result.
        prompt_size: frames, rows and columns in the prompt: with actions those of the whole chunk on its canvas.
        tier: of the canvas; 0 without one.
    """

    num_frames: int
    height: int
    width: int
    prompt_size: tuple[int, int, int]
    tier: int = 0


def find_offered_modes(layout: CheckpointLayout, *, is_sound_offered: bool = True) -> tuple[str, ...]:
    """Return the names of the modes that a checkpoint was trained for and has the parts for, in the order of the table.

    ``is_sound_offered`` is False where nothing decodes sound.
    """
    return tuple(
        name
        for name, mode in MODES.items()
        if (layout.preset_kind, name) in PRESETS
        and not (mode.has_sound and not (layout.has_sound and is_sound_offered))
        and not (mode.has_actions and not layout.has_action)
    )


def resolve(
    request: GenerationRequest,
    layout: CheckpointLayout,
    *,
    is_sound_offered: bool = True,
    probe: Callable[[str, Packed], ClipInfo] = probe_clip,
) -> ResolvedRequest:
    """Check a request against a checkpoint and fill its gaps.

    Args:
        request: with its media :meth:`~GenerationRequest.packed`.
        is_sound_offered: False where nothing decodes sound.
        probe: reads the header of a given clip; a service does that in another process.

    Raises:
        CapabilityError: a mode that the checkpoint cannot do; names those that it can.
        RequestError: a field is out of bounds; names it, what was given and what it must be.
    """
    like_diffusers = _read_field(request, "compat") == DIFFUSERS_BEHAVIOUR
    mode = _find_mode(request)
    preset = _find_preset(mode, request, layout, is_sound_offered)
    _check_prompts(mode, request)
    _refuse_foreign_fields(mode, request)
    sampling = _choose_sampling(request, preset, layout)
    given = probe_picture(request, probe)
    notes = [
        f"{name} begins like JSON and is none: it is read as a plain text"
        for name in ("prompt", "negative_prompt")
        if (text := getattr(request, name)) and text.lstrip().startswith("{") and read_json_prompt(text) is None
    ]
    action = None
    if preset.action is not None and mode.has_actions:
        action = resolve_actions(mode, request, preset.action, layout, notes)
        clip = _fit_canvas(given, action, request, preset.action, layout, notes)
    else:
        clip = _size_clip(mode, request, preset, layout, notes)
    num_sound_latents, sound = 0, None
    if mode.has_sound:
        num_sound_latents, sound = _size_sound(clip.num_frames, sampling["fps"], layout, like_diffusers=like_diffusers)
    _check_token_budget(clip, num_sound_latents + (0 if action is None else action.chunk_size), layout)
    return ResolvedRequest(
        **sampling,
        mode=mode.name,
        prompt=request.prompt,
        # The default describes how pictures look; no checkpoint was trained with both it and actions.
        negative_prompt="" if request.negative_prompt is None and mode.has_actions else request.negative_prompt,
        prompt_format=_format_prompts(request, clip, sampling["fps"], action, layout),
        num_frames=clip.num_frames,
        height=clip.height,
        width=clip.width,
        picture=None if given is None else _describe_condition(given, mode, request, clip, layout, notes),
        action=action,
        num_sound_latents=num_sound_latents,
        file=_choose_file(mode, request, clip, sampling["fps"], sound),
        noise=request.noise,
        notes=tuple(notes),
    )


def _read_field(request: GenerationRequest, name: str, default: Any = None) -> Any:
    """Return a field of a request, or its default where the request leaves it out; checked."""
    value = getattr(request, name)
    return FIELDS[name].check(name, default if value is None else value)


def _find_mode(request: GenerationRequest) -> Mode:
    """Return the mode that a request names, or that its fields imply."""
    wants_sound = _read_field(request, "generate_sound")
    name = request.mode
    if name is None:
        if request.image is not None and request.video is not None:
            raise RequestError("image, video", "both", "one of the two", "an image begins a clip, a video is continued")
        if request.image is not None:
            name = IMAGE_TO_VIDEO
        elif request.video is not None:
            name = VIDEO_TO_VIDEO
        else:
            name = TEXT_TO_IMAGE if request.num_frames == 1 else TEXT_TO_VIDEO
    checks.choice("mode", name, tuple(MODES))
    if wants_sound and not MODES[name].has_sound:
        if name + WITH_SOUND not in MODES:
            with_sound = [mode.name for mode in MODES.values() if mode.name + WITH_SOUND in MODES]
            raise RequestError("generate_sound", True, f"false for {name}", f"sound goes with {', '.join(with_sound)}")
        name += WITH_SOUND
    return MODES[name]


def _find_preset(mode: Mode, request: GenerationRequest, layout: CheckpointLayout, is_sound_offered: bool) -> Preset:
    """Return the mode's row if this checkpoint can do it."""
    offered = find_offered_modes(layout, is_sound_offered=is_sound_offered)
    if mode.name in offered:
        return PRESETS[layout.preset_kind, mode.name]
    if mode.has_actions and not layout.has_action:
        lacks = "the checkpoint has no weights for actions"
    elif mode.has_sound and not layout.has_sound:
        lacks = "the checkpoint makes no sound: its transformer has no weights for it, or there is no sound_tokenizer"
    elif mode.has_sound and not is_sound_offered:
        lacks = "the app was configured without a decoder of sound"
    elif request.compat == DIFFUSERS_BEHAVIOUR:  # diffusers only asks for the weights, not for training in the mode
        return PRESETS[layout.preset_kind, TEXT_TO_VIDEO]
    else:
        lacks = "the checkpoint was not trained for it"
    name = "generate_sound" if mode.has_sound and request.mode is None else "mode"
    given, modes = (mode.name, "a mode") if name == "mode" else (True, "false, for a mode")
    raise CapabilityError(name, given, f"{modes} that {layout.name} can do: {', '.join(offered)}", lacks)


def _check_prompts(mode: Mode, request: GenerationRequest) -> None:
    checks.text("prompt", request.prompt, FIELDS["prompt"].max_chars, may_be_empty=not mode.needs_prompt)
    if request.negative_prompt is not None:
        _read_field(request, "negative_prompt")


def _refuse_foreign_fields(mode: Mode, request: GenerationRequest) -> None:
    """Refuse fields that have no effect in this mode."""
    for name, spec in FIELDS.items():
        if getattr(request, name) is not None and not spec.is_for(mode):
            given = "given" if name in MEDIA_FIELDS else getattr(request, name)
            hint = spec.otherwise or f"it is for {', '.join(spec.modes)}"
            raise RequestError(name, given, f"left out for {mode.name}", hint)
    given = [name for name in mode.media if getattr(request, name) is not None]
    if mode.media and len(given) != 1:
        allowed = f"one {' or '.join(mode.media)}, which {mode.name} needs"
        if given:
            raise RequestError(", ".join(mode.media), "both", allowed)
        raise RequestError(mode.media[0], None, allowed)


def _choose_sampling(request: GenerationRequest, preset: Preset, layout: CheckpointLayout) -> dict[str, Any]:
    """Return the fields that decide how a request is denoised."""
    like_diffusers = request.compat == DIFFUSERS_BEHAVIOUR
    schedule = _read_field(request, "schedule", SHIPPED if like_diffusers else "native")
    shift = find_shipped_flow_shift(layout) if like_diffusers or schedule == SHIPPED else preset.flow_shift
    return {
        "fps": _read_field(request, "fps", preset.fps),
        "num_inference_steps": _read_field(request, "num_inference_steps", preset.num_inference_steps),
        "guidance_scale": _read_field(request, "guidance_scale", preset.guidance_scale),
        "guidance_interval": _choose_interval(request, preset),
        "flow_shift": _read_field(request, "flow_shift", shift),
        "schedule": find_shipped_schedule(layout) if schedule == SHIPPED else schedule,
        "seed": _read_field(request, "seed"),
    }


def _format_prompts(
    request: GenerationRequest, clip: _Clip, fps: float, action: ActionTrack | None, layout: CheckpointLayout
) -> PromptFormat:
    """Return the form in which the model reads the prompts."""
    like_diffusers = request.compat == DIFFUSERS_BEHAVIOUR
    has_system_prompt = like_diffusers and layout.default_use_system_prompt
    return PromptFormat(
        *clip.prompt_size,
        fps=fps,
        append_metadata=_read_field(request, "append_metadata"),
        use_system_prompt=_read_field(request, "use_system_prompt", has_system_prompt),
        negative_metadata=_read_field(request, "negative_metadata", "inverse" if like_diffusers else "same"),
        compat=request.compat,
        view_point=None if action is None else action.view_point,
    )


def _choose_interval(request: GenerationRequest, preset: Preset) -> tuple[float, float] | None:
    """Return the timesteps with guidance; None: all."""
    given = request.guidance_interval
    if given is None:
        return preset.guidance_interval
    low, high = _read_field(request, "guidance_interval")
    if low > high:
        raise RequestError("guidance_interval", given, "the lowest timestep, then the highest", "swap the two")
    return low, high


def find_shipped_flow_shift(layout: CheckpointLayout) -> float:
    """Return the shift that goes with :func:`find_shipped_schedule`."""
    if layout.use_native_flow_schedule and layout.native_flow_shift is not None:
        return layout.native_flow_shift
    return layout.scheduler.flow_shift


def find_shipped_schedule(layout: CheckpointLayout) -> str:
    """Return the schedule that a checkpoint's own scheduler config amounts to, as diffusers runs it."""
    if layout.scheduler.use_karras_sigmas:
        return "karras"
    return "native" if layout.use_native_flow_schedule else "linear"


def _size_clip(
    mode: Mode, request: GenerationRequest, preset: Preset, layout: CheckpointLayout, notes: list[str]
) -> _Clip:
    given = _read_field(request, "num_frames", preset.num_frames)
    if mode.is_image != (given == 1):
        allowed = "1 for an image" if mode.is_image else f"2 or more for {mode.name}"
        raise RequestError("num_frames", given, allowed)
    num_frames = layout.geometry.round_up_num_frames(given)
    if num_frames != given:
        rule = f"clips have 1 + k * {layout.geometry.temporal} frames"
        notes.append(f"num_frames={given} was rounded up to {num_frames}: {rule}")
    rows = preset.height if request.height is None else request.height
    columns = preset.width if request.width is None else request.width
    side = layout.geometry.spatial
    height = checks.pixels("height", rows, side, LIMITS.max_side_pixels)
    width = checks.pixels("width", columns, side, LIMITS.max_side_pixels)
    for name, other in (("height", "width"), ("width", "height")):
        if getattr(request, name) is None and getattr(request, other) is not None:
            raise RequestError(name, None, f"given together with {other}")
    return _Clip(num_frames, height, width, (num_frames, height, width))


def _size_sound(
    num_frames: int, fps: float, layout: CheckpointLayout, *, like_diffusers: bool
) -> tuple[int, SoundFormat]:
    """Return the number of sound latents, and the sound of the file."""
    assert layout.audio is not None, "find_offered_modes"
    audio, latent_fps = layout.audio, layout.transformer.sound_latent_fps
    if num_frames / fps > LIMITS.max_sound_s:
        hint = "ask for fewer frames, or more a second"
        raise RequestError(
            "num_frames / fps", f"{num_frames / fps:.1f} s", f"at most {LIMITS.max_sound_s:g} s with sound", hint
        )
    if like_diffusers:  # diffusers cuts off the samples' fraction first
        num_latents = -(-int(num_frames / fps * audio.sampling_rate) // audio.hop_size)
    else:
        num_latents = num_sound_latents(num_frames, fps, latent_fps)
    num_samples = sound_samples(num_frames, fps, audio.sampling_rate)
    return num_latents, SoundFormat(audio.sampling_rate, audio.dec_out_channels, num_samples)


def _check_token_budget(clip: _Clip, num_others: int, layout: CheckpointLayout) -> None:
    """Refuse more tokens than the transformer has positions; ``num_others`` counts those of sound and actions."""
    num_tokens = layout.geometry.num_tokens(clip.num_frames, clip.height, clip.width) + num_others
    budget = layout.transformer.max_position_embeddings - LIMITS.max_text_tokens
    if num_tokens > budget:
        raise RequestError(
            "num_frames x height x width",
            f"{clip.num_frames} x {clip.height} x {clip.width}",
            f"at most {budget} video tokens, not {num_tokens}",
            "ask for fewer frames or a smaller picture",
        )


def _fit_canvas(
    given: GivenPicture | None,
    action: ActionTrack,
    request: GenerationRequest,
    preset: ActionPreset,
    layout: CheckpointLayout,
    notes: list[str],
) -> _Clip:
    """Return the size of a clip with actions, whose picture is fitted into a canvas."""
    assert given is not None, "_refuse_foreign_fields"
    tier = _read_field(request, "resolution_tier", preset.resolution_tier)
    canvas = action_canvas(given.height, given.width, tier, field=given.kind)
    side = layout.geometry.spatial
    content = content_size(given.height, given.width, canvas, field=given.kind)
    # The padding is cut off again after encoding.
    height, width = (max(n // side, 1) * side for n in content)
    in_chunk = action.chunk_size + 1
    num_frames = layout.geometry.num_pixel_frames(action.chunk_size // layout.geometry.temporal + 1)
    if num_frames != in_chunk:
        rule = f"clips have 1 + k * {layout.geometry.temporal} frames"
        notes.append(f"of the {in_chunk} frames of the chunk, {num_frames} are part of it: {rule}")
    return _Clip(num_frames, height, width, (in_chunk, *canvas), tier)


def _describe_condition(
    given: GivenPicture, mode: Mode, request: GenerationRequest, clip: _Clip, layout: CheckpointLayout, notes: list[str]
) -> PictureCondition:
    """Decide which frames of the given image or clip are encoded, and which latent frames they fix."""
    assert mode.resizing is not None, "a mode that takes media says how it comes to size"
    geometry = layout.geometry
    num_latent_frames = geometry.latent_shape(clip.num_frames, clip.height, clip.width).num_frames
    chosen: tuple[int, ...] = ()
    if mode.chooses_frames:
        chosen = _check_frame_indexes(request.condition_frame_indexes_vision, num_latent_frames)
        if len(chosen) == num_latent_frames and request.compat != DIFFUSERS_BEHAVIOUR:
            least = geometry.num_pixel_frames(num_latent_frames + 1)
            hint = f"latent frames {list(chosen)} are given and nothing is left to generate; or give fewer of them"
            raise RequestError("num_frames", clip.num_frames, f"at least {least}", hint)
    clean = mode.clean_frames(num_latent_frames, chosen)
    num_needed = geometry.num_pixel_frames(max(clean) + 1)
    given.check_memory(mode.resizing, num_needed, clip.prompt_size[1:])
    if given.num_frames is not None:
        _note_length(given.num_frames, num_needed, mode, notes)
    return PictureCondition(
        kind=given.kind,
        media=given.media,
        resizing=mode.resizing,
        height=clip.height,
        width=clip.width,
        resolution_tier=clip.tier,
        num_frames=num_needed,
        keep=_read_field(request, "condition_video_keep", KEEP[0]),
        clean_frames=clean,
    )


def _check_frame_indexes(indexes: Sequence[int] | int | None, num_latent_frames: int) -> tuple[int, ...]:
    field_name, allowed = "condition_frame_indexes_vision", f"latent frames from 0 to {num_latent_frames - 1}"
    if indexes is None:
        return tuple(index for index in _DEFAULT_CLEAN_FRAMES if index < num_latent_frames)
    given: Sequence[Any] = [indexes] if isinstance(indexes, int) else indexes
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise RequestError(field_name, indexes, f"a list of {allowed}")
    for index in given:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_latent_frames:
            raise RequestError(field_name, indexes, allowed)
    return tuple(sorted(set(given)))


def _note_length(num_given: int, num_needed: int, mode: Mode, notes: list[str]) -> None:
    """Note that a clip is longer or shorter than the frames that are used."""
    if num_given < num_needed:
        notes.append(f"the video has {num_given} frames of the {num_needed} that are used: its last is repeated")
    elif num_given > num_needed and mode.has_actions and num_needed > 1:
        notes.append(f"of the video's {num_given} frames the first {num_needed} are used")


def _choose_file(
    mode: Mode, request: GenerationRequest, clip: _Clip, fps: float, sound: SoundFormat | None
) -> ClipFormat | None:
    """Return the format of the result's file; None for actions alone."""
    kind = checks.choice("output", mode.outputs[0] if request.output is None else request.output, mode.outputs)
    is_lossless: bool = _read_field(request, "lossless")
    for name, users in (("output_quality", LOSSY_IMAGE_KINDS), ("crf", ("mp4",)), ("lossless", ("mp4",))):
        given = getattr(request, name)
        if given is not None and given is not False and kind not in users:
            raise RequestError(name, given, f"left out for {kind}", f"it is for {' and '.join(users)}")
    if is_lossless and request.crf is not None:
        raise RequestError("crf", request.crf, "left out beside lossless", "choose one of the two")
    quality = _read_field(request, "output_quality", DEFAULT_QUALITY)
    if mode.is_image:
        check_image(kind, clip.height, clip.width, quality)
    if kind == ACTIONS_ONLY:
        return None
    crf = DEFAULT_CRF if request.crf is None else _read_field(request, "crf")
    return ClipFormat(kind, clip.height, clip.width, fps, crf, is_lossless, sound, quality)
