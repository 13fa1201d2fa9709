"""A request checked against a checkpoint, every gap filled: :func:`resolve`.

Whatever is wrong with a request is said here, before anything large is allocated; of images and clips only the header
is read. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cosmos3_core import checks
from cosmos3_core.actions import ActionStatistics, ActionTrack, action_rows, convert_actions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.conditioning.canvas import action_canvas, content_size, covering_size
from cosmos3_core.conditioning.modes import (
    ACTIONS_ONLY,
    IMAGE,
    IMAGE_TO_VIDEO,
    MODES,
    TEXT_TO_IMAGE,
    TEXT_TO_VIDEO,
    VIDEO,
    VIDEO_TO_VIDEO,
    WITH_SOUND,
    ActionRole,
    Mode,
    Resizing,
)
from cosmos3_core.conditioning.picture import PictureCondition
from cosmos3_core.embodiments import find_embodiment
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.file_kinds import DEFAULT_CRF, DEFAULT_QUALITY, IMAGE_KINDS, LOSSY_IMAGE_KINDS
from cosmos3_core.media.image import check_image
from cosmos3_core.media.source import (
    ClipInfo,
    Packed,
    probe_clip,
    probe_image,
)
from cosmos3_core.media.writer import SoundFormat
from cosmos3_core.presets import LIMITS, PRESETS, ActionPreset, Preset
from cosmos3_core.request import (
    DIFFUSERS_BEHAVIOUR,
    FIELDS,
    KEEP,
    SHIPPED,
    VIEW_POINTS,
    GenerationRequest,
    ResolvedRequest,
    SoundTrack,
)
from cosmos3_core.shapes import num_sound_latents, sound_samples

# Of diffusers and cosmos-framework for clips that go on.
_CHOSEN_FRAMES = (0, 1)


def find_offered_modes(layout: CheckpointLayout, *, is_sound_offered: bool = True) -> tuple[str, ...]:
    """Return the names of the modes that a checkpoint was trained for and has the parts for, in the order of the table.

    Args:
        layout: of the checkpoint.
        is_sound_offered: False where nothing decodes sound.
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
        layout: of the checkpoint.
        is_sound_offered: False where nothing decodes sound.
        probe: how a given clip is looked at; a service does that in another process.

    Raises:
        CapabilityError: a mode that the checkpoint cannot do; names those that it can.
        RequestError: a field is out of bounds; names it, what was given and what is allowed.
    """
    like_diffusers = _check("compat", request.compat) == DIFFUSERS_BEHAVIOUR
    mode = _mode_of(request)
    preset = _preset(mode, request, layout, is_sound_offered, like_diffusers=like_diffusers)
    checks.text("prompt", request.prompt, FIELDS["prompt"].max_chars, may_be_empty=not mode.needs_prompt)
    if request.negative_prompt is not None:
        _check("negative_prompt", request.negative_prompt)
    _refuse_foreign_fields(mode, request)
    given = _take_picture(request, probe)

    notes: list[str] = []
    fps: float = _check("fps", _or(request.fps, preset.fps))
    if preset.action is not None and mode.has_actions:
        action = _action_track(mode, request, preset.action, layout, notes, like_diffusers=like_diffusers)
        tier = _check("resolution_tier", _or(request.resolution_tier, preset.action.resolution_tier))
        height, width, prompt_size = _fit(given, tier, layout)
        num_frames = layout.geometry.num_pixel_frames(action.chunk_size // layout.geometry.temporal + 1)
        if num_frames != action.chunk_size + 1:
            rule = f"clips have 1 + k * {layout.geometry.temporal} frames"
            notes.append(f"of the {action.chunk_size + 1} frames of the chunk, {num_frames} are part of it: {rule}")
    else:
        action, tier = None, 0
        num_frames = _num_frames(mode, request, preset, layout, notes)
        side = layout.geometry.spatial
        height = checks.pixels("height", _or(request.height, preset.height), side, LIMITS.max_side_pixels)
        width = checks.pixels("width", _or(request.width, preset.width), side, LIMITS.max_side_pixels)
        for name, other in (("height", "width"), ("width", "height")):
            if getattr(request, name) is None and getattr(request, other) is not None:
                raise RequestError(name, None, f"given together with {other}")
        prompt_size = (height, width)
    sound = _sound_track(num_frames, fps, layout, like_diffusers=like_diffusers) if mode.has_sound else None
    num_others = (0 if sound is None else sound.num_latents) + (0 if action is None else action.chunk_size)
    _check_token_budget(num_frames, height, width, num_others, layout)
    picture = None
    if given is not None and mode.resizing is not None:
        num_latent_frames = layout.geometry.latent_shape(num_frames, height, width).num_frames
        clean = _clean_frames(mode, request, num_latent_frames)
        if mode.chooses_frames and len(clean) == num_latent_frames and not like_diffusers:
            least = layout.geometry.num_pixel_frames(num_latent_frames + 1)
            hint = f"latent frames {list(clean)} are given and nothing is left to generate; or give fewer of them"
            raise RequestError("num_frames", num_frames, f"at least {least}", hint)
        num_needed = layout.geometry.num_pixel_frames(max(clean) + 1)
        _check_memory(given, mode.resizing, num_needed, prompt_size)
        if given.num_frames is not None:
            _note_length(given.num_frames, num_needed, mode, notes)
        picture = PictureCondition(
            kind=given.kind,
            media=given.media,
            resizing=mode.resizing,
            height=height,
            width=width,
            resolution_tier=tier,
            num_frames=num_needed,
            keep=_check("condition_video_keep", _or(request.condition_video_keep, KEEP[0])),
            clean_frames=clean,
        )

    schedule = _check("schedule", _or(request.schedule, SHIPPED if like_diffusers else "native"))
    as_shipped = like_diffusers or schedule == SHIPPED
    flow_shift = _or(request.flow_shift, find_shipped_flow_shift(layout) if as_shipped else preset.flow_shift)
    system_prompt = _or(request.use_system_prompt, like_diffusers and layout.default_use_system_prompt)
    negative_metadata = _or(request.negative_metadata, "inverse" if like_diffusers else "same")
    output = _output(mode, request.output)
    quality = _output_quality(output, request.output_quality)
    crf = _crf(output, request)
    if mode.is_image:
        check_image(output, height, width, quality)
    return ResolvedRequest(
        mode=mode.name,
        prompt=request.prompt,
        # The default is about how pictures look; with actions nobody was trained with it.
        negative_prompt=_or(request.negative_prompt, "" if mode.has_actions else None),
        num_frames=num_frames,
        height=height,
        width=width,
        prompt_size=prompt_size,
        fps=fps,
        num_inference_steps=_check("num_inference_steps", _or(request.num_inference_steps, preset.num_inference_steps)),
        guidance_scale=_check("guidance_scale", _or(request.guidance_scale, preset.guidance_scale)),
        guidance_interval=_interval(_or(request.guidance_interval, preset.guidance_interval)),
        flow_shift=_check("flow_shift", flow_shift),
        schedule=find_shipped_schedule(layout) if schedule == SHIPPED else schedule,
        seed=_check("seed", request.seed),
        use_system_prompt=_check("use_system_prompt", system_prompt),
        append_metadata=_check("append_metadata", request.append_metadata),
        negative_metadata=_check("negative_metadata", negative_metadata),
        output=output,
        output_quality=quality,
        crf=crf,
        lossless=request.lossless,
        picture=picture,
        action=action,
        sound=sound,
        noise=request.noise,
        compat=request.compat,
        notes=tuple(notes),
    )


def _check(name: str, value: Any) -> Any:
    return FIELDS[name].check(name, value)


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _mode_of(request: GenerationRequest) -> Mode:
    """Return the mode that a request names, or that its fields tell."""
    wants_sound = _check("generate_sound", request.generate_sound)
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


def _preset(
    mode: Mode, request: GenerationRequest, layout: CheckpointLayout, is_sound_offered: bool, *, like_diffusers: bool
) -> Preset:
    """Return the mode's row, if this checkpoint can do it."""
    offered = find_offered_modes(layout, is_sound_offered=is_sound_offered)
    if mode.name in offered:
        return PRESETS[layout.preset_kind, mode.name]
    lacks = ""
    if mode.has_actions and not layout.has_action:
        lacks = "the checkpoint has no weights for actions"
    elif mode.has_sound and not layout.has_sound:
        lacks = "the checkpoint makes no sound: its transformer has no weights for it, or there is no sound_tokenizer"
    elif mode.has_sound and not is_sound_offered:
        lacks = "the app was configured without a decoder of sound"
    elif like_diffusers:  # which asks of a checkpoint no more than the weights
        return PRESETS[layout.preset_kind, TEXT_TO_VIDEO]
    else:
        lacks = "the checkpoint was not trained for it"
    name = "generate_sound" if mode.has_sound and request.mode is None else "mode"
    given, modes = (mode.name, "a mode") if name == "mode" else (True, "false, for a mode")
    raise CapabilityError(name, given, f"{modes} that {layout.name} can do: {', '.join(offered)}", lacks)


def _refuse_foreign_fields(mode: Mode, request: GenerationRequest) -> None:
    """Refuse fields that have no effect in this mode."""
    for name, spec in FIELDS.items():
        if getattr(request, name) is not None and not spec.is_for(mode):
            given = "given" if name in (IMAGE, VIDEO) else getattr(request, name)
            hint = spec.otherwise or f"it is for {', '.join(spec.modes)}"
            raise RequestError(name, given, f"left out for {mode.name}", hint)
    given = [name for name in mode.media if getattr(request, name) is not None]
    if mode.media and len(given) != 1:
        allowed = f"one {' or '.join(mode.media)}, which {mode.name} needs"
        if given:
            raise RequestError(", ".join(mode.media), "both", allowed)
        raise RequestError(mode.media[0], None, allowed)


def _num_frames(
    mode: Mode, request: GenerationRequest, preset: Preset, layout: CheckpointLayout, notes: list[str]
) -> int:
    asked = _check("num_frames", _or(request.num_frames, preset.num_frames))
    if mode.is_image != (asked == 1):
        allowed = "1 for an image" if mode.is_image else f"2 or more for {mode.name}"
        raise RequestError("num_frames", asked, allowed)
    num_frames = layout.geometry.round_up_num_frames(asked)
    if num_frames != asked:
        rule = f"clips have 1 + k * {layout.geometry.temporal} frames"
        notes.append(f"num_frames={asked} was rounded up to {num_frames}: {rule}")
    return num_frames


def _action_track(
    mode: Mode,
    request: GenerationRequest,
    preset: ActionPreset,
    layout: CheckpointLayout,
    notes: list[str],
    *,
    like_diffusers: bool,
) -> ActionTrack:
    config = layout.transformer
    domain_name = request.domain_name
    if domain_name is None and request.domain_id is None:
        domain_name = preset.domain_name
    embodiment = find_embodiment(domain_name, request.domain_id, config.num_embodiment_domains)
    known = [embodiment.raw_action_dim] if embodiment.raw_action_dim is not None else []
    if embodiment.name == preset.domain_name and preset.raw_action_dim is not None:
        known.insert(0, preset.raw_action_dim)
    width = request.raw_action_dim
    if width is None:
        width = known[0] if known else None
    elif checks.integer("raw_action_dim", width, 1, config.action_dim) not in (known or [width]):
        allowed = f"{' or '.join(map(str, known))}, the numbers in an action of {embodiment.name}"
        raise RequestError("raw_action_dim", width, allowed, "leave it out for the first of them")
    if mode.actions is ActionRole.GIVEN:
        if request.actions is None:
            raise RequestError("actions", None, f"the actions that {mode.name} is to carry out, [steps, width]")
        num_given, given_width = action_rows("actions", request.actions, width).shape
        width = given_width
    else:
        num_given = 0
    if width is None:
        hint = "it depends on the data set; give it"
        raise RequestError("raw_action_dim", None, f"the numbers in an action of {embodiment.name}", hint)
    checks.integer("raw_action_dim", width, 1, config.action_dim)
    chunk_size = request.action_chunk_size
    if chunk_size is None and request.num_frames is not None:
        chunk_size = checks.integer("num_frames", request.num_frames, 2, LIMITS.max_actions + 1) - 1
    chunk_size = _check("action_chunk_size", _or(chunk_size, num_given or preset.chunk_size))
    if request.num_frames is not None and request.num_frames != chunk_size + 1:
        raise RequestError("num_frames", request.num_frames, f"{chunk_size + 1}, one more than the actions")
    if num_given > chunk_size:
        notes.append(f"of {num_given} given actions the first {chunk_size} are used")
    elif 0 < num_given < chunk_size:
        notes.append(f"the last of {num_given} given actions is repeated, for {chunk_size}")
    statistics = None if like_diffusers else ActionStatistics.of(layout.directory, embodiment.name, width)
    given = None
    if mode.actions is ActionRole.GIVEN:
        given = convert_actions("actions", request.actions, width, chunk_size, statistics)
    return ActionTrack(
        chunk_size=chunk_size,
        domain_name=embodiment.name,
        domain_id=embodiment.domain_id,
        width=width,
        view_point=_check("view_point", _or(request.view_point, VIEW_POINTS[0])),
        given=given,
        statistics=statistics,
    )


@dataclass(frozen=True)
class _Given:
    """The image or clip of a request, and its size in pixels, upright; frames where a clip's header says how many."""

    kind: str
    media: Packed
    height: int
    width: int
    num_frames: int | None


def _take_picture(request: GenerationRequest, probe: Callable[[str, Packed], ClipInfo]) -> _Given | None:
    """None where there is none.

    Raises:
        RequestError: it cannot be read; or it is not packed: a path would be opened here, wherever that is.
    """
    kind = IMAGE if request.image is not None else VIDEO
    media: Any = getattr(request, kind)
    if media is None:
        return None
    if not isinstance(media, bytes | np.ndarray):
        raise RequestError(kind, type(media).__name__, "a file's bytes, or frames", "call packed() on the request")
    if kind == IMAGE:
        picture = probe_image(kind, media)
        return _Given(kind, media, picture.height, picture.width, None)
    clip = probe(kind, media)
    return _Given(kind, media, clip.height, clip.width, clip.num_frames)


def _check_memory(given: _Given, resizing: Resizing, num_frames: int, onto: tuple[int, int]) -> None:
    """Refuse a picture that is too large at any size on its way to the encoder.

    Raises:
        RequestError: it is not.
    """
    size = f"{given.width} x {given.height} pixels"
    rows, columns = onto
    if resizing is Resizing.CROP:
        rows, columns = covering_size(given.height, given.width, rows, columns)
        if rows * columns > LIMITS.max_image_pixels:
            allowed = f"of a shape nearer to {onto[1]} x {onto[0]}, which it covers when scaled to {columns} x {rows}"
            raise RequestError(given.kind, size, allowed, "cut it first")
    if num_frames * rows * columns > LIMITS.max_clip_total_pixels:
        allowed = f"at most {LIMITS.max_clip_total_pixels} pixels in all, of {columns} x {rows} each"
        raise RequestError("frames to encode", num_frames, allowed, "ask for fewer, or a smaller size")


def _note_length(num_given: int, num_needed: int, mode: Mode, notes: list[str]) -> None:
    """Say what becomes of a clip of another length than is used."""
    if num_given < num_needed:
        notes.append(f"the video has {num_given} frames of the {num_needed} that are used: its last is repeated")
    elif num_given > num_needed and mode.has_actions and num_needed > 1:
        notes.append(f"of the video's {num_given} frames the first {num_needed} are used")


def _fit(given: _Given | None, tier: int, layout: CheckpointLayout) -> tuple[int, int, tuple[int, int]]:
    """Pixel rows and columns of the result, and the canvas, of a mode whose picture is fitted into one."""
    assert given is not None, "_refuse_foreign_fields"
    canvas = action_canvas(given.height, given.width, tier, field=given.kind)
    side = layout.geometry.spatial
    content = content_size(given.height, given.width, canvas, field=given.kind)
    # What is padded is cut off again, as latents.
    height, width = (max(n // side, 1) * side for n in content)
    return height, width, (canvas.height, canvas.width)


def _clean_frames(mode: Mode, request: GenerationRequest, num_latent_frames: int) -> tuple[int, ...]:
    chosen = _choose_frames(request.condition_frame_indexes_vision, num_latent_frames) if mode.chooses_frames else ()
    return mode.clean_frames(num_latent_frames, chosen)


def _choose_frames(indexes: Sequence[int] | int | None, num_latent_frames: int) -> tuple[int, ...]:
    field_name, allowed = "condition_frame_indexes_vision", f"latent frames from 0 to {num_latent_frames - 1}"
    if indexes is None:
        return tuple(index for index in _CHOSEN_FRAMES if index < num_latent_frames)
    given: Sequence[Any] = [indexes] if isinstance(indexes, int) else indexes
    if not isinstance(given, Sequence) or isinstance(given, str | bytes) or not given:
        raise RequestError(field_name, indexes, f"a list of {allowed}")
    for index in given:
        if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < num_latent_frames:
            raise RequestError(field_name, indexes, allowed)
    return tuple(sorted(set(given)))


def _sound_track(num_frames: int, fps: float, layout: CheckpointLayout, *, like_diffusers: bool) -> SoundTrack:
    assert layout.audio is not None, "find_offered_modes"
    audio, latent_fps = layout.audio, layout.transformer.sound_latent_fps
    if num_frames / fps > LIMITS.max_sound_s:
        hint = "ask for fewer frames, or more a second"
        raise RequestError(
            "num_frames / fps", f"{num_frames / fps:.1f} s", f"at most {LIMITS.max_sound_s:g} s with sound", hint
        )
    if like_diffusers:  # which cuts off the samples' fraction first
        num_latents = -(-int(num_frames / fps * audio.sampling_rate) // audio.hop_size)
    else:
        num_latents = num_sound_latents(num_frames, fps, latent_fps)
    num_samples = sound_samples(num_frames, fps, audio.sampling_rate)
    return SoundTrack(num_latents, SoundFormat(audio.sampling_rate, audio.dec_out_channels, num_samples))


def _interval(interval: Any) -> tuple[float, float] | None:
    if interval is None:
        return None
    low, high = _check("guidance_interval", interval)
    if low > high:
        raise RequestError("guidance_interval", interval, "the lowest timestep, then the highest", "swap the two")
    return low, high


def _output(mode: Mode, output: str | None) -> str:
    if mode.is_image:
        allowed: tuple[str, ...] = IMAGE_KINDS
    elif mode.has_sound:
        allowed = ("mp4", "wav")
    elif mode.actions is ActionRole.GENERATED:
        allowed = ("mp4", ACTIONS_ONLY)
    else:
        allowed = ("mp4",)
    return checks.choice("output", _or(output, _or(mode.output, allowed[0])), allowed)


def _output_quality(output: str, quality: int | None) -> int:
    if quality is None:
        return DEFAULT_QUALITY
    if output not in LOSSY_IMAGE_KINDS:
        hint = f"it is for {' and '.join(LOSSY_IMAGE_KINDS)}"
        raise RequestError("output_quality", quality, f"left out for {output}", hint)
    return int(_check("output_quality", quality))


def _crf(output: str, request: GenerationRequest) -> float:
    """H.264's quality; looks at ``lossless`` as well, which goes without one."""
    is_lossless = _check("lossless", request.lossless)
    for name, given in (("crf", request.crf is not None), ("lossless", is_lossless)):
        if given and output != "mp4":
            raise RequestError(name, getattr(request, name), f"left out for {output}", "it is for mp4")
    if request.crf is None:
        return DEFAULT_CRF
    if is_lossless:
        raise RequestError("crf", request.crf, "left out beside lossless", "choose one of both")
    return float(_check("crf", request.crf))


def find_shipped_flow_shift(layout: CheckpointLayout) -> float:
    """Return the shift that goes with :func:`find_shipped_schedule`."""
    if layout.use_native_flow_schedule and layout.native_flow_shift is not None:
        return layout.native_flow_shift
    return layout.scheduler.flow_shift


def find_shipped_schedule(layout: CheckpointLayout) -> str:
    """Return the schedule that a checkpoint's own scheduler config amounts to; what diffusers runs with it."""
    if layout.scheduler.use_karras_sigmas:
        return "karras"
    return "native" if layout.use_native_flow_schedule else "linear"


def _check_token_budget(num_frames: int, height: int, width: int, num_others: int, layout: CheckpointLayout) -> None:
    """``num_others``: tokens of sound and actions."""
    num_tokens = layout.geometry.num_tokens(num_frames, height, width) + num_others
    budget = layout.transformer.max_position_embeddings - LIMITS.max_text_tokens
    if num_tokens > budget:
        raise RequestError(
            "num_frames x height x width",
            f"{num_frames} x {height} x {width}",
            f"at most {budget} video tokens, not {num_tokens}",
            "ask for fewer frames or a smaller picture",
        )
