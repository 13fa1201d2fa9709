"""Request bodies: fields as clients of vLLM-Omni's and OpenAI's video API send them -> :class:`GenerationRequest`.

Only names, and what is special to HTTP, are decided here. Values are checked where the library checks them, in
:func:`cosmos3_core.request.resolve`, so that a wrong one says the same over HTTP as in Python.
"""

from __future__ import annotations

import difflib
import re
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import GenerationRequest

_DEFAULT_FPS = 24.0
_MAX_SECONDS = 3600.0


class VideoBody(BaseModel):
    """Body of ``POST /v1/videos/sync``, multipart or JSON. Absent fields take the checkpoint's own defaults."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(description="plain text, or a JSON object as a string")
    model: str | None = Field(None, description="the served model's name, if given")
    negative_prompt: str | None = Field(None, description="absent: the structured default; empty: none")
    size: str | None = Field(None, description="WIDTHxHEIGHT in pixels, multiples of 16")
    width: int | None = Field(None, description="pixels, a multiple of 16")
    height: int | None = Field(None, description="pixels, a multiple of 16")
    seconds: float | None = Field(None, description="length; num_frames wins over it")
    num_frames: int | None = Field(None, description="rounded up to 1 + 4k; 1 makes a png")
    fps: float | None = Field(None, description="frames per second")
    num_inference_steps: int | None = Field(None, description="denoising steps")
    guidance_scale: float | None = Field(None, description="classifier-free guidance; 1 turns it off")
    flow_shift: float | None = Field(None, description="of the native and linear schedules")
    schedule: str | None = Field(None, description="native, linear, karras or shipped")
    seed: int | None = Field(None, description="of the initial noise")
    use_system_prompt: bool | None = Field(None, description="put the training system prompt first")
    negative_metadata: str | None = Field(None, description="same, none or inverse")
    compat: str | None = Field(None, description="native or diffusers: whose prompts and schedule to follow")
    user: str | None = Field(None, description="the caller's own note; not used")


# Fields that go to the request as they are.
_PASSED_ON = (
    "prompt",
    "negative_prompt",
    "fps",
    "num_inference_steps",
    "guidance_scale",
    "flow_shift",
    "schedule",
    "seed",
    "use_system_prompt",
    "negative_metadata",
    "compat",
)


def parse_video_body(fields: dict[str, Any], model_name: str) -> GenerationRequest:
    """A body's fields as a request.

    Args:
        fields: of a JSON body as they are; of a form as text, see :func:`from_form`.
        model_name: of the served model.

    Raises:
        RequestError: an unknown field (names the nearest known one), a missing prompt, another model's name, sizes
            that contradict each other.
    """
    for name in fields:
        if name not in VideoBody.model_fields:
            raise _unknown(name, fields[name])
    given = {name: value for name, value in fields.items() if value is not None}
    if "prompt" not in given:
        raise RequestError("prompt", None, "a text with at least one visible character", "The field is required.")
    if given.get("model", model_name) != model_name:
        raise RequestError("model", given["model"], f"{model_name!r}, the one that is served")
    width, height = _frame_size(given)
    passed = {name: given[name] for name in _PASSED_ON if name in given}
    return GenerationRequest(width=width, height=height, num_frames=_num_frames(given), **passed)


def from_form(fields: dict[str, str]) -> dict[str, Any]:
    """A form's texts as what the fields hold: numbers and booleans; what is neither stays text and is refused later."""
    return {name: _from_text(name, text) for name, text in fields.items()}


def _from_text(name: str, text: str) -> Any:
    field = VideoBody.model_fields.get(name)
    kind = str(field.annotation) if field is not None else "str"
    try:
        if "int" in kind:
            return int(text)
        if "float" in kind:
            return float(text)
    except ValueError:
        return text
    if "bool" in kind:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    return text


def _unknown(name: str, value: Any) -> RequestError:
    near = difflib.get_close_matches(name, VideoBody.model_fields, n=1)
    hint = f"Did you mean {near[0]}?" if near else ""
    return RequestError(name, value, f"no field of this name; known are {', '.join(VideoBody.model_fields)}", hint)


def _frame_size(given: dict[str, Any]) -> tuple[Any, Any]:
    width, height = given.get("width"), given.get("height")
    if "size" not in given:
        if (width is None) != (height is None):
            missing = "height" if height is None else "width"
            raise RequestError(missing, None, "given together with the other one, or neither")
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
    seconds = checks.real("seconds", given["seconds"], 1 / _MAX_SECONDS, _MAX_SECONDS)
    fps = checks.real("fps", given.get("fps", _DEFAULT_FPS), LIMITS.min_fps, LIMITS.max_fps)
    return max(1, int(seconds * fps))
