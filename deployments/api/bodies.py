"""Request bodies: fields as clients of vLLM-Omni's and OpenAI's video API send them -> :class:`GenerationRequest`.

Types are checked here, ranges in :func:`cosmos3_core.request.resolve`, so that a wrong value says the same over HTTP as
in Python.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest


class VideoBody(BaseModel):
    """Body of ``POST /v1/videos/sync``; multipart or JSON, the same fields."""

    model_config = ConfigDict(extra="forbid")

    prompt: str
    model: str | None = None
    negative_prompt: str | None = None
    size: str | None = None
    width: int | None = None
    height: int | None = None
    seconds: float | None = None
    num_frames: int | None = None
    fps: float | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    flow_shift: float | None = None
    schedule: str | None = None
    seed: int | None = None
    use_system_prompt: bool | None = None
    negative_metadata: str | None = None
    compat: Literal["native", "diffusers"] = "native"
    user: str | None = None


def parse_video_body(values: dict[str, Any], model_name: str) -> GenerationRequest:
    """A body's fields as a request.

    Raises:
        RequestError: an unknown field (names the nearest known one), a wrong type, sizes that contradict each other,
            another model's name.
    """
    try:
        body = VideoBody.model_validate(values)
    except ValidationError as error:
        raise _request_error(error) from None
    if body.model is not None and body.model != model_name:
        raise RequestError("model", body.model, f"{model_name!r}, the one that is served")
    width, height = _frame_size(body)
    return GenerationRequest(
        prompt=body.prompt,
        negative_prompt=body.negative_prompt,
        num_frames=_num_frames(body),
        height=height,
        width=width,
        fps=body.fps,
        num_inference_steps=body.num_inference_steps,
        guidance_scale=body.guidance_scale,
        flow_shift=body.flow_shift,
        schedule=body.schedule,
        seed=body.seed if body.seed is not None else 42,
        use_system_prompt=body.use_system_prompt,
        negative_metadata=body.negative_metadata,
        compat=body.compat,
    )


def _frame_size(body: VideoBody) -> tuple[int | None, int | None]:
    if body.size is None:
        if (body.width is None) != (body.height is None):
            missing = "height" if body.height is None else "width"
            raise RequestError(missing, None, "given together with the other one, or neither")
        return body.width, body.height
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", body.size)
    if match is None:
        raise RequestError("size", body.size, "WIDTHxHEIGHT, such as 1280x720")
    width, height = int(match[1]), int(match[2])
    if body.width not in (None, width) or body.height not in (None, height):
        raise RequestError("size", body.size, f"the same as width={body.width}, height={body.height}, or one of both")
    return width, height


def _num_frames(body: VideoBody) -> int | None:
    if body.num_frames is not None or body.seconds is None:
        return body.num_frames
    if not 0 < body.seconds <= 3600:
        raise RequestError("seconds", body.seconds, "a number above 0, at most 3600")
    return int(body.seconds * (body.fps if body.fps is not None and body.fps > 0 else 24.0))


def _request_error(error: ValidationError) -> RequestError:
    fault = error.errors()[0]
    field = str(fault["loc"][0])
    if fault["type"] == "extra_forbidden":
        near = difflib.get_close_matches(field, VideoBody.model_fields, n=1)
        hint = f"Did you mean {near[0]}?" if near else ""
        return RequestError(field, fault["input"], f"no such field; known are {sorted(VideoBody.model_fields)}", hint)
    if fault["type"] == "missing":
        return RequestError(field, None, "a value; the field is required")
    return RequestError(field, fault["input"], fault["msg"])
