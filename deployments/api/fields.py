"""The fields of request bodies: their names, how each is written in JSON and in a form, what it is for.

What values mean and which are allowed is decided in :func:`cosmos3_core.resolve.resolve` and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deployments.api.json_text import read_json

Schema = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """How a field is written.

    Attributes:
        schema: in JSON, as OpenAPI says it.
        read: a form's text -> value; ValueError where it is none.
        is_text_too: JSON bodies may have the form's text in it as well.
    """

    schema: Schema
    read: Callable[[str], Any]
    is_text_too: bool = False


@dataclass(frozen=True)
class Field:
    """One field: how it is written, and what it is for."""

    kind: Kind
    about: str


Fields = Mapping[str, Field]


def _flag(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _list_of(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [number(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


_NUMBERS = {"type": "array", "items": {"type": "number"}}
_URL_OR_BASE64: Schema = {"type": "string", "description": "a data URL, or base64"}
_REFERENCE: Schema = {"anyOf": [_URL_OR_BASE64, {"type": "object"}, {"type": "array", "maxItems": 1}]}

TEXT = Kind({"type": "string"}, str)
INTEGER = Kind({"type": "integer"}, int)
NUMBER = Kind({"type": "number"}, float)
FLAG = Kind({"type": "boolean"}, _flag)
INDEXES = Kind({"anyOf": [{"type": "integer"}, {"type": "array"}, {"type": "string"}]}, _list_of(int), True)
NUMBERS = Kind({"anyOf": [_NUMBERS, {"type": "string"}]}, _list_of(float), True)
ROWS = Kind({"anyOf": [{"type": "array", "items": _NUMBERS}, {"type": "string"}]}, read_json, True)
OBJECT = Kind({"anyOf": [{"type": "object"}, {"type": "string"}]}, read_json, True)
FILE = Kind(_REFERENCE, str)
"""An image or a clip; in multipart forms the file itself."""

_NOTED = {
    "model": Field(TEXT, "the served model's name, if given"),
    "user": Field(TEXT, "the caller's own note; not used"),
    "extra_params": Field(OBJECT, "an object whose keys count as if they stood beside it"),
}
_SAMPLING = {
    "prompt": Field(TEXT, "plain text, or a JSON object as a string"),
    "negative_prompt": Field(TEXT, "absent: the structured default; empty: none"),
    "num_inference_steps": Field(INTEGER, "denoising steps"),
    "guidance_scale": Field(NUMBER, "classifier-free guidance; 1 turns it off"),
    "guidance_interval": Field(NUMBERS, "lowest and highest timestep, of 1000, that guidance is for: [400, 1000]"),
    "flow_shift": Field(NUMBER, "of the native and linear schedules"),
    "schedule": Field(TEXT, "native, linear, karras or shipped"),
    "seed": Field(INTEGER, "of the initial noise"),
    "use_system_prompt": Field(FLAG, "put the training system prompt first"),
    "negative_metadata": Field(TEXT, "same, none or inverse"),
    "compat": Field(TEXT, "native or diffusers: whose prompts and schedule to follow"),
}
_OF_VIDEOS = {
    "mode": Field(TEXT, "text_to_video, policy ...; told from the other fields where there are no actions"),
    "generate_sound": Field(FLAG, "a sound track as well"),
    "fps": Field(NUMBER, "frames per second"),
    "num_frames": Field(INTEGER, "rounded up to 1 + 4k; 1 makes an image"),
    "condition_frame_indexes_vision": Field(INDEXES, "latent frames that a given video fixes: [0, 1]"),
    "condition_video_keep": Field(TEXT, "first or last: which frames of a longer video are used"),
    "actions": Field(ROWS, "rows of numbers, or an earlier answer's actions: what forward_dynamics carries out"),
    "action_chunk_size": Field(INTEGER, "actions; one between two frames"),
    "domain_name": Field(TEXT, "embodiment of the actions"),
    "domain_id": Field(INTEGER, "embodiment by number"),
    "raw_action_dim": Field(INTEGER, "numbers in an action; the embodiment's"),
    "resolution_tier": Field(INTEGER, "with actions: 256, 480, 704 or 720"),
    "view_point": Field(TEXT, "with actions: ego_view, third_person_view, wrist_view or concat_view"),
    "output": Field(TEXT, "mp4, wav (with sound), png, jpeg or webp (one frame), or actions alone"),
    "output_quality": Field(INTEGER, "of jpeg and webp, 0 to 100"),
    "crf": Field(NUMBER, "of mp4, H.264's quality, 0 (best) to 51"),
    "lossless": Field(FLAG, "of mp4: its yuv420p planes are stored exactly; not with crf"),
}

PASSED_ON = (*_SAMPLING, *_OF_VIDEOS)
"""Fields that go to the request as they are, under its own names."""

MEDIA = {
    "image": Field(FILE, "to begin with"),
    "video": Field(FILE, "to continue, or to find the actions of"),
    "input_reference": Field(FILE, "an image or a video, told by its content; of an animated image the first frame"),
    "image_reference": Field(FILE, '{"image_url": "data:..."}'),
    "video_reference": Field(FILE, '{"video_url": "data:..."}'),
}
"""Fields that bring an image or a clip."""

VIDEO_FIELDS: Fields = {
    **_SAMPLING,
    **MEDIA,
    **_OF_VIDEOS,
    "size": Field(TEXT, "WIDTHxHEIGHT in pixels, multiples of 16"),
    "width": Field(INTEGER, "pixels, a multiple of 16"),
    "height": Field(INTEGER, "pixels, a multiple of 16"),
    "seconds": Field(NUMBER, "length; num_frames wins over it"),
    "stream": Field(FLAG, "send the mp4 while it is made: fragmented, without the headers that say what it became"),
    **_NOTED,
}
"""Of ``POST /v1/videos/sync``. Absent ones take the checkpoint's own defaults."""

IMAGE_FIELDS: Fields = {
    **_SAMPLING,
    "n": Field(INTEGER, "images, 1 to 10; image i of them has seed + i"),
    "size": Field(TEXT, "WIDTHxHEIGHT in pixels, multiples of 16, or auto"),
    "response_format": Field(TEXT, "b64_json, or file: the image itself, or a zip of several"),
    "output_format": Field(TEXT, "png, jpeg or webp"),
    "output_compression": Field(INTEGER, "quality of jpeg and webp, 0 to 100"),
    **_NOTED,
}
"""Of ``POST /v1/images/generations``."""

ALIASES = {
    "action": "actions",
    "action_mode": "mode",
    "action_fps": "fps",
    "resolution": "resolution_tier",
    "image_size": "resolution_tier",
    "sound_gen": "generate_sound",
}
"""What clients of vLLM-Omni call some of them."""


def openapi(fields: Fields) -> dict[str, Any]:
    """The part of an OpenAPI document about a body of these fields."""

    def schema(file: Schema | None) -> dict[str, Any]:
        def of(field: Field) -> Schema:
            kind = file if file is not None and field.kind is FILE else field.kind.schema
            return {**kind, "description": field.about}

        known = {name: of(field) for name, field in fields.items()}
        aliases = {alias: {**known[name], "description": name} for alias, name in ALIASES.items() if name in known}
        return {"type": "object", "properties": known | aliases, "additionalProperties": False}

    binary = {"type": "string", "format": "binary"}
    content = {"application/json": schema(None), "multipart/form-data": schema(binary)}
    return {"requestBody": {"required": True, "content": {kind: {"schema": it} for kind, it in content.items()}}}
