"""The fields of request bodies, in one table: what each is called, how it is written, what becomes of it.

A field is *effective*, *without effect* (other servers' clients send it; the answer's warnings name it), or *not
offered* (it asks for something that this service does not do yet, and is refused). What values of effective ones mean,
and which are allowed, is decided in :func:`cosmos3_core.resolve.resolve`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cosmos3_core.conditioning.canvas import ACTION_TIERS
from cosmos3_core.conditioning.modes import ACTIONS_ONLY, MODES
from cosmos3_core.embodiments import EMBODIMENTS
from cosmos3_core.errors import RequestError
from cosmos3_core.media.file_kinds import IMAGE_KINDS
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import BEHAVIOURS, KEEP, NEGATIVE_METADATA, SCHEDULE_NAMES, VIEW_POINTS, GenerationRequest
from cosmos3_core.request import FIELDS as CORE_FIELDS
from deployments.api.field_kinds import (
    ANYTHING,
    FILE,
    FLAG,
    INDEXES,
    INTEGER,
    NUMBER,
    NUMBERS,
    OBJECT,
    ROWS,
    SECONDS,
    TEXT,
    Kind,
)
from deployments.jobs.video import HIGH, LOSSLESS

_MAX_COMPARED_CHARS = 200
MAX_IMAGES = 10
SIZE_PATTERN = r"\d{1,6}x\d{1,6}"

B64_JSON, FILE_ITSELF = "b64_json", "file"
"""How an answer has its images."""

NO_SUCH_FIELD = "left out: unknown field"
"""What is allowed for a field that is none."""


class Endpoint(StrEnum):
    """What takes these bodies."""

    VIDEOS = "/v1/videos"
    SYNC = "/v1/videos/sync"
    IMAGES = "/v1/images/generations"


class Use(StrEnum):
    """What becomes of a field."""

    EFFECTIVE = "effective"
    IGNORED = "no effect"
    NOT_OFFERED = "not offered"


@dataclass(frozen=True)
class Field:
    """One row of the table.

    Attributes:
        kind: how it is written.
        about: what it is for; why it is without effect; what is not offered.
        uses: endpoint -> what becomes of it there; others do not know it.
        also: other servers' names for it.
    """

    kind: Kind
    about: str
    uses: Mapping[Endpoint, Use]
    also: tuple[str, ...] = ()

    def without_effect_at(self, endpoint: Endpoint) -> str:
        """Why, in words."""
        where = [other for other, use in self.uses.items() if use is Use.EFFECTIVE]
        if not where:
            return f"without effect: {self.about}"
        return f"without effect at {endpoint}; at {where[0]}: {self.about}"


def _effective(kind: Kind, about: str, *also: str, at: tuple[Endpoint, ...] = tuple(Endpoint)) -> Field:
    return Field(kind, about, dict.fromkeys(at, Use.EFFECTIVE), also)


def _ignored(about: str, *, at: tuple[Endpoint, ...] = tuple(Endpoint)) -> Field:
    return Field(ANYTHING, about, dict.fromkeys(at, Use.IGNORED))


def _not_offered(about: str, *, at: tuple[Endpoint, ...] = tuple(Endpoint)) -> Field:
    return Field(ANYTHING, about, dict.fromkeys(at, Use.NOT_OFFERED))


_CLIPS = (Endpoint.VIDEOS, Endpoint.SYNC)
_IMAGES = (Endpoint.IMAGES,)
_OTHER_MODEL = "of other models"
_TRANSFER = "transfer from edges, depth and other controls"
_ROBOT = "OpenPI's policy server"
_OF_PIXELS = "pixels, a multiple of 16"

_SAMPLING = {
    "prompt": _effective(TEXT, "plain text, or a JSON object as a string"),
    "negative_prompt": _effective(TEXT, "absent: the structured default; empty: none"),
    "num_inference_steps": _effective(INTEGER.bounded_by(CORE_FIELDS["num_inference_steps"]), "denoising steps"),
    "guidance_scale": _effective(
        NUMBER.bounded_by(CORE_FIELDS["guidance_scale"]), "classifier-free guidance; 1 turns it off"
    ),
    "guidance_interval": _effective(NUMBERS, "lowest and highest timestep, of 1000, that guidance is for: [400, 1000]"),
    "flow_shift": _effective(NUMBER.bounded_by(CORE_FIELDS["flow_shift"]), "of the native and linear schedules"),
    "schedule": _effective(TEXT.of(*SCHEDULE_NAMES), "of the noise levels; shipped: the checkpoint's own"),
    "seed": _effective(INTEGER.bounded_by(CORE_FIELDS["seed"]), "of the initial noise"),
    "use_system_prompt": _effective(FLAG, "put the training system prompt first"),
    "negative_metadata": _effective(
        TEXT.of(*NEGATIVE_METADATA), "what the negative prompt says of length and size", "negative_metadata_mode"
    ),
    "compat": _effective(TEXT.of(*BEHAVIOURS), "whose prompts and schedule to follow"),
}
_OF_VIDEOS = {
    "image": _effective(FILE, "to begin with", at=_CLIPS),
    "video": _effective(FILE, "to continue, or to find the actions of", at=_CLIPS),
    "input_reference": _effective(
        FILE, "an image or a video, told by its content; of an animated image the first frame", at=_CLIPS
    ),
    "input_references": _effective(FILE, "a list of one, as input_reference; more are not offered", at=_CLIPS),
    "image_reference": _effective(FILE, '{"image_url": "data:..."}', at=_CLIPS),
    "video_reference": _effective(FILE, '{"video_url": "data:..."}', at=_CLIPS),
    "mode": _effective(
        TEXT.of(*MODES), "told from the other fields where there are no actions", "action_mode", at=_CLIPS
    ),
    "generate_sound": _effective(FLAG, "a sound track as well", "sound_gen", at=_CLIPS),
    "size": _effective(
        dataclasses.replace(TEXT, schema={"type": "string", "pattern": f"^{SIZE_PATTERN}$"}),
        "WIDTHxHEIGHT in pixels, multiples of 16",
        at=_CLIPS,
    ),
    "width": _effective(INTEGER.pixels(), _OF_PIXELS, at=_CLIPS),
    "height": _effective(INTEGER.pixels(), _OF_PIXELS, at=_CLIPS),
    "seconds": _effective(SECONDS, "length; num_frames wins over it", at=_CLIPS),
    "num_frames": _effective(
        INTEGER.bounded_by(CORE_FIELDS["num_frames"]), "rounded up to 1 + 4k; 1 makes an image", at=_CLIPS
    ),
    "fps": _effective(NUMBER.bounded_by(CORE_FIELDS["fps"]), "frames per second", "action_fps", at=_CLIPS),
    "condition_frame_indexes_vision": _effective(INDEXES, "latent frames that a given video fixes: [0, 1]", at=_CLIPS),
    "condition_video_keep": _effective(TEXT.of(*KEEP), "which frames of a longer video are used", at=_CLIPS),
    "actions": _effective(
        ROWS, "rows of numbers, or an earlier answer's actions: what forward_dynamics carries out", "action", at=_CLIPS
    ),
    "action_chunk_size": _effective(
        INTEGER.bounded_by(CORE_FIELDS["action_chunk_size"]), "actions; one between two frames", at=_CLIPS
    ),
    "domain_name": _effective(TEXT, f"embodiment of the actions: {', '.join(EMBODIMENTS)}", at=_CLIPS),
    "domain_id": _effective(INTEGER.bounded_by(CORE_FIELDS["domain_id"]), "embodiment by number", at=_CLIPS),
    "raw_action_dim": _effective(
        INTEGER.bounded_by(CORE_FIELDS["raw_action_dim"]), "numbers in an action; the embodiment's", at=_CLIPS
    ),
    "resolution_tier": _effective(
        INTEGER.of(*ACTION_TIERS).or_text(), "with actions: of the canvas", "resolution", "image_size", at=_CLIPS
    ),
    "view_point": _effective(TEXT.of(*VIEW_POINTS), "with actions: where the camera is", at=_CLIPS),
    "output": _effective(
        TEXT.of("mp4", "wav", *IMAGE_KINDS, ACTIONS_ONLY),
        "the file's kind: wav with sound, png, jpeg and webp of one frame; or actions alone",
        at=_CLIPS,
    ),
    "output_quality": _effective(INTEGER.bounded_by(CORE_FIELDS["output_quality"]), "of jpeg and webp", at=_CLIPS),
    "crf": _effective(NUMBER.bounded_by(CORE_FIELDS["crf"]), "of mp4, H.264's quality, 0 is best", at=_CLIPS),
    "lossless": _effective(FLAG, "of mp4: its yuv420p planes are stored exactly; not with crf", at=_CLIPS),
    "quality": _effective(TEXT.of(HIGH, LOSSLESS), "lossless: as lossless=true; high: the default", at=_CLIPS),
    "previews": Field(
        INTEGER.within(0, MAX_PREVIEWS),
        "small pictures of what is being made, told as events",
        {Endpoint.VIDEOS: Use.EFFECTIVE, Endpoint.SYNC: Use.IGNORED},
    ),
    "stream": Field(
        FLAG,
        "send the mp4 while it is made: fragmented, without the headers that say what it became",
        {Endpoint.SYNC: Use.EFFECTIVE, Endpoint.VIDEOS: Use.IGNORED},
    ),
}
_OF_IMAGES = {
    "n": _effective(INTEGER.within(1, MAX_IMAGES), "images; image i of them has seed + i", at=_IMAGES),
    "size": _effective(
        dataclasses.replace(TEXT, schema={"type": "string", "pattern": f"^({SIZE_PATTERN}|auto)$"}),
        "WIDTHxHEIGHT in pixels, multiples of 16, or auto",
        at=_IMAGES,
    ),
    "response_format": _effective(
        TEXT.of(B64_JSON, FILE_ITSELF), "file: the image itself, or a zip of several", at=_IMAGES
    ),
    "output_format": _effective(TEXT.of(*IMAGE_KINDS), "of the images", at=_IMAGES),
    "output_compression": _effective(INTEGER.within(0, 100), "quality of jpeg and webp", at=_IMAGES),
}
_OF_ALL = {
    "model": _effective(TEXT, "the served model's name, if given"),
    "service_class": _effective(TEXT, "class of the queue that the request waits in", "priority"),
    "guardrails": _effective(FLAG, "false: without them, where the operator allows it"),
    "extra_params": _effective(OBJECT, "an object whose keys count as if they stood beside it"),
}
_WITHOUT_EFFECT = {
    "user": _ignored("the caller's own note"),
    "max_sequence_length": _ignored("prompts are not cut off; one that is too long is refused"),
    "return_stage_metrics": _ignored("they are always told"),
    "generator_device": _ignored("noise is drawn on the CPU, whatever runs the model"),
    "vae_use_slicing": _ignored("decided by the operator"),
    "vae_use_tiling": _ignored("decided by the operator"),
    "use_duration_template": _ignored("prompts say length and frame rate as the model was trained"),
    "use_resolution_template": _ignored("prompts say the size as the model was trained"),
    "num_outputs_per_prompt": _ignored("one request makes one clip"),
    "modalities": _ignored("told from the other fields"),
    **{name: _ignored(_OTHER_MODEL) for name in ("true_cfg_scale", "guidance_scale_2", "boundary_ratio")},
    **{name: _ignored(_OTHER_MODEL, at=_IMAGES) for name in ("layers", "bot_task", "system_prompt")},
    **{name: _ignored("give size", at=_CLIPS) for name in ("aspect_ratio", "short_edge")},
    **{name: _ignored("sound is as long as the pictures", at=_CLIPS) for name in ("sound_duration", "audio_duration")},
    "enable_frame_interpolation": _ignored(_OTHER_MODEL, at=_CLIPS),
    "frame_interpolation_*": _ignored(_OTHER_MODEL, at=_CLIPS),
    "video_codec_options": _ignored("give crf, or lossless", at=_CLIPS),
}
_REFUSED = {
    "lora": _not_offered("low-rank adapters"),
    **{
        name: _not_offered(_TRANSFER, at=_CLIPS)
        for name in (
            *("control_reference", "control_type", "edge", "blur", "depth", "seg", "wsm"),
            *("control", "control_path", "control_weight", "preset_edge_threshold", "preset_blur_strength"),
            *("control_guidance", "control_guidance_interval", "num_video_frames_per_chunk", "num_conditional_frames"),
            *("num_first_chunk_conditional_frames", "max_frames", "share_vision_temporal_positions"),
            *("emphasize_control_in_prompt", "show_control_condition", "show_input"),
        )
    },
    **{name: _not_offered(_ROBOT, at=_CLIPS) for name in ("robot_obs", "observation")},
    "audio_reference": _not_offered("sound that follows given sound", at=_CLIPS),
    **{name: _not_offered("editing of given clips", at=_CLIPS) for name in ("source_video", "source_audio")},
    "*_noise_mask": _not_offered("editing of given clips", at=_CLIPS),
    "action_path": _not_offered("files on the server; send the rows as actions", at=_CLIPS),
}
_ROWS = (_SAMPLING, _OF_VIDEOS, _OF_IMAGES, _OF_ALL, _WITHOUT_EFFECT, _REFUSED)

MEDIA = ("image", "video", "input_reference", "input_references", "image_reference", "video_reference")
"""Fields that bring an image or a clip."""

FIELDS: Mapping[Endpoint, Mapping[str, Field]] = {
    endpoint: {name: field for rows in _ROWS for name, field in rows.items() if endpoint in field.uses}
    for endpoint in Endpoint
}
"""Endpoint -> its fields by name; what a ``*`` in one stands for says :func:`name_pattern`."""

_OWN = {field.name for field in dataclasses.fields(GenerationRequest)} - {"image", "video", "width", "height"}
PASSED_ON = tuple(name for name in (*_SAMPLING, *_OF_VIDEOS) if name in _OWN)
"""Fields that go to the request as they are, under its own names."""

ALIASES = {alias: name for rows in _ROWS for name, field in rows.items() for alias in field.also}
"""Other servers' names for some of them."""


def known(endpoint: Endpoint, use: Use = Use.EFFECTIVE) -> Mapping[str, Field]:
    """An endpoint's fields of one use."""
    return {name: field for name, field in FIELDS[endpoint].items() if field.uses[endpoint] is use}


def name_pattern(name: str) -> str:
    """The names that one with ``*`` in it stands for, as a regular expression."""
    return "[a-z0-9_]{1,64}".join(re.escape(part) for part in name.split("*"))


def find_field(written: str, given: Any, endpoint: Endpoint) -> tuple[str, Field]:
    """The field that a name in a body means, and its own name.

    Args:
        written: the name.
        given: its value, for the message.
        endpoint: of the body.

    Raises:
        RequestError: there is none; names the nearest.
    """
    fields = FIELDS[endpoint]
    name = ALIASES.get(written, written)
    if name in fields and "*" not in name:
        return name, fields[name]
    for pattern, field in fields.items():
        if "*" in pattern and re.fullmatch(name_pattern(pattern), written):
            return written, field
    names = known(endpoint)
    aliases = [alias for alias, meant in ALIASES.items() if meant in names]
    near = difflib.get_close_matches(written[:_MAX_COMPARED_CHARS], [*names, *aliases], n=1)
    hint = f"Did you mean {near[0]}? " if near else ""
    if endpoint is Endpoint.IMAGES and written in ("width", "height"):
        hint = "Give size, WIDTHxHEIGHT. "
    raise RequestError(written, given, NO_SUCH_FIELD, f"{hint}Fields are {', '.join(names)}.")


_HEAD = ("fields", "written as", *(f"`{endpoint}`" for endpoint in Endpoint), "what it is for")


def fields_table() -> str:
    """All fields as a Markdown table, for README; those that are without effect for one reason share a row."""
    cells: dict[tuple[str, ...], tuple[list[str], dict[Endpoint, Use]]] = {}
    for rows in _ROWS:
        for name, field in rows.items():
            is_read = Use.EFFECTIVE in field.uses.values()
            key = (field.about, field.kind.name, name if is_read else " ".join(field.uses.values()))
            names, uses = cells.setdefault(key, ([], {}))
            names += [f"`{it}`" for it in (name, *field.also) if f"`{it}`" not in names]
            uses.update(field.uses)
    lines = [_HEAD, ("---",) * len(_HEAD)]
    for (about, kind, _), (names, uses) in cells.items():
        lines.append((", ".join(names), kind, *(uses.get(endpoint, "") for endpoint in Endpoint), about))
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fields_page() -> str:
    """``FIELDS.md``, the table for people to read."""
    return f"""# Fields of requests

Effective ones do what they say. Those without effect are accepted and named in the `warnings` of the job
(`x-warnings` of an answer with a file). Those that are not offered are refused with a 422 that says so; so is every
other name, with the nearest known one. Absent fields take the checkpoint's own defaults (`cosmos3_core/presets.py`).
This page is made from `fields.py`; a test compares them.

{fields_table()}
"""
