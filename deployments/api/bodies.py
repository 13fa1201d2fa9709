"""Request bodies: fields as clients of vLLM-Omni's and OpenAI's APIs send them -> :class:`GenerationRequest`.

Only names, and what is special to HTTP, are decided here. Values are checked where the library checks them, in
:func:`cosmos3_core.resolve.resolve`, so that a wrong one says the same over HTTP as in Python.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any

from cosmos3_core import checks
from cosmos3_core.conditioning.modes import MODES, TEXT_TO_IMAGE, Actions
from cosmos3_core.errors import RequestError
from cosmos3_core.media.image import IMAGE_KINDS
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import GenerationRequest
from deployments.api.fields import (
    ALIASES,
    FILE,
    IMAGE_FIELDS,
    OBJECT,
    PASSED_ON,
    ROWS,
    VIDEO_FIELDS,
    Fields,
    Kind,
)
from deployments.api.given_media import given_media

_DEFAULT_FPS = 24.0
_MAX_SECONDS = 3600.0
_MAX_IMAGES = 10
_MAX_SHOWN_CHARS = 200

B64_JSON, FILE_ITSELF = "b64_json", "file"
"""How an answer has its images."""


class FormText(str):
    """A form's text: what it means depends on the field."""

    __slots__ = ()


@dataclass(frozen=True)
class VideoJob:
    """What ``POST /v1/videos/sync`` asks for.

    Attributes:
        request: for the Director.
        is_live: whether the file is to be sent while it grows.
    """

    request: GenerationRequest
    is_live: bool


@dataclass(frozen=True)
class ImageJob:
    """What ``POST /v1/images/generations`` asks for.

    Attributes:
        requests: one an image, in order; each has the next seed.
        response_format: :data:`B64_JSON` or :data:`FILE_ITSELF`.
    """

    requests: tuple[GenerationRequest, ...]
    response_format: str


def parse_video_body(fields: dict[str, Any], model_name: str) -> VideoJob:
    """A body of ``POST /v1/videos/sync`` as what it asks for.

    Args:
        fields: of a JSON body as they are; of a form :class:`FormText`, and the bytes of files.
        model_name: of the served model.

    Raises:
        RequestError: an unknown field (names the nearest known one), one given twice, another model's name, sizes that
            contradict each other, media that cannot be read.
    """
    given = _merged(fields, VIDEO_FIELDS)
    _check_model(given, model_name)
    width, height = _frame_size(given)
    passed = {name: given[name] for name in PASSED_ON if name in given} | {"num_frames": _num_frames(given)}
    if isinstance(actions := given.get("actions"), dict) and "data" in actions:  # as an answer has them
        passed["actions"] = actions["data"]
    image, video = given_media(given)
    request = GenerationRequest(width=width, height=height, image=image, video=video, **passed)
    return VideoJob(request, _is_live(given, request))


def parse_image_body(fields: dict[str, Any], model_name: str) -> ImageJob:
    """A body of ``POST /v1/images/generations`` as what it asks for.

    Args:
        fields, model_name: as of :func:`parse_video_body`.

    Raises:
        RequestError: as there, and what only images have is wrong.
    """
    given = _merged(fields, IMAGE_FIELDS)
    _check_model(given, model_name)
    response_format = given.get("response_format", B64_JSON)
    if response_format == "url":
        hint = "Images are in the answer itself."
        raise RequestError("response_format", response_format, f"{B64_JSON} or {FILE_ITSELF}", hint)
    checks.choice("response_format", response_format, (B64_JSON, FILE_ITSELF))
    num_images = checks.integer("n", given.get("n", 1), 1, _MAX_IMAGES)
    first_seed = given.get("seed", GenerationRequest.seed)
    checks.integer("seed", first_seed, 0, LIMITS.max_seed - num_images + 1)
    output = checks.choice("output_format", given.get("output_format", IMAGE_KINDS[0]), IMAGE_KINDS)
    if given.get("size") == "auto":
        del given["size"]
    width, height = _frame_size(given)
    passed = {name: given[name] for name in PASSED_ON if name in given} | {
        "mode": TEXT_TO_IMAGE,
        "width": width,
        "height": height,
        "output": output,
        "output_quality": _quality(given.get("output_compression"), output),
    }
    seeds = range(first_seed, first_seed + num_images)
    return ImageJob(tuple(GenerationRequest(**{**passed, "seed": seed}) for seed in seeds), response_format)


def _is_live(given: dict[str, Any], request: GenerationRequest) -> bool:
    is_live = checks.flag("stream", given.get("stream", False))
    mode = MODES.get(request.mode) if isinstance(request.mode, str) else None
    is_clip = request.output in (None, "mp4") and request.num_frames != 1 and request.mode != TEXT_TO_IMAGE
    if is_live and (not is_clip or (mode is not None and mode.actions is Actions.GENERATED)):
        raise RequestError("stream", True, "only with an mp4 and without generated actions", "Nothing else grows.")
    return is_live


def _merged(fields: dict[str, Any], known: Fields) -> dict[str, Any]:
    """Fields under their own names, those of ``extra_params`` among them; without those that are null."""
    given: dict[str, Any] = {}
    _merge(given, fields, known)
    extra = given.pop("extra_params", {})
    if not isinstance(extra, dict) or "extra_params" in extra:
        raise RequestError("extra_params", extra, "a JSON object, without extra_params in it")
    _merge(given, extra, known)
    return given


def _merge(given: dict[str, Any], fields: dict[str, Any], known: Fields) -> None:
    for written, value in fields.items():
        name = ALIASES.get(written, written)
        if name not in known:
            raise _unknown(written, value, known)
        if value is None:
            continue
        value = _read(written, value, known[name].kind)
        if name in given and given[name] != value:
            raise RequestError(written, _start(value), f"one value; {name} is given with another one as well")
        given[name] = value


def _read(name: str, value: Any, kind: Kind) -> Any:
    """What a field holds; what cannot be read stays text, for the library to refuse."""
    if isinstance(value, bytes) and kind in (ROWS, OBJECT):
        value = FormText(value.decode("utf-8", "replace"))  # a JSON file
    if isinstance(value, bytes) and kind is not FILE:
        raise RequestError(name, "a file", "a text")
    if isinstance(value, str) and kind not in (FILE, ROWS, OBJECT):
        checks.text(name, value, LIMITS.max_prompt_chars, may_be_empty=True)
    if isinstance(value, FormText) or (isinstance(value, str) and kind.is_text_too):
        try:
            value = kind.read(value)
        except ValueError:
            value = str(value)
    if isinstance(value, str) and kind in (ROWS, OBJECT):
        checks.text(name, value, LIMITS.max_prompt_chars, may_be_empty=True)  # what could not be read goes no further
    return value


def _unknown(name: str, value: Any, known: Fields) -> RequestError:
    aliases = [alias for alias, meant in ALIASES.items() if meant in known]
    near = difflib.get_close_matches(name[:_MAX_SHOWN_CHARS], [*known, *aliases], n=1)
    hint = f"Did you mean {near[0]}?" if near else ""
    if name in ("width", "height"):
        hint = "Give size, WIDTHxHEIGHT."
    return RequestError(name, _start(value), f"no field of this name here; known are {', '.join(known)}", hint)


def _start(value: Any) -> Any:
    """A value for a message: of a long text or file its beginning."""
    return value[:_MAX_SHOWN_CHARS] if isinstance(value, str | bytes) else value


def _check_model(given: dict[str, Any], model_name: str) -> None:
    if given.get("model", model_name) != model_name:
        raise RequestError("model", _start(given["model"]), f"{model_name!r}, the one that is served")


def _frame_size(given: dict[str, Any]) -> tuple[Any, Any]:
    width, height = given.get("width"), given.get("height")
    if "size" not in given:
        return width, height
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", given["size"]) if isinstance(given["size"], str) else None
    if match is None:
        raise RequestError("size", given["size"], "WIDTHxHEIGHT, such as 1280x720")
    sized = int(match[1]), int(match[2])
    if (width, height) not in ((None, None), sized):
        raise RequestError("size", given["size"], f"the same as width={width} and height={height}, or one of both ways")
    return sized


def _num_frames(given: dict[str, Any]) -> Any:
    if "num_frames" in given or "seconds" not in given:
        return given.get("num_frames")
    mode = MODES.get(given["mode"]) if isinstance(given.get("mode"), str) else None
    if mode is not None and mode.has_actions:
        raise RequestError("seconds", given["seconds"], f"nothing for {mode.name}; action_chunk_size decides")
    seconds = checks.real("seconds", given["seconds"], 1 / _MAX_SECONDS, _MAX_SECONDS)
    fps = checks.real("fps", given.get("fps", _DEFAULT_FPS), LIMITS.min_fps, LIMITS.max_fps)
    return max(1, int(seconds * fps))


def _quality(compression: Any, output: str) -> int | None:
    if compression is None:
        return None
    if output == "png":
        raise RequestError("output_compression", compression, "nothing for png; it is for jpeg and webp")
    return checks.integer("output_compression", compression, 0, 100)
