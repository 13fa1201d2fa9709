"""Answers of the API as pydantic models, but for videos (:mod:`deployments.jobs.video`) and the served model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from deployments.api_model import ApiModel
from deployments.jobs.video import Actions, Count, JobId, Mode, Seconds

_Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]


class ErrorDetails(ApiModel):
    """A fault of a request, or of the service while it worked on it."""

    message: str
    type: Literal["invalid_request_error", "server_error"]
    code: Annotated[str, Field(description="short name of the fault")]
    param: Annotated[str | None, Field(description="the field at fault")]
    given: Annotated[str, Field(description="what it held, shortened")] = ""
    allowed: Annotated[str, Field(description="what would have been accepted")] = ""
    hint: Annotated[str, Field(description="what to do")] = ""


class Error(ApiModel):
    """The body of every answer that is a refusal or a failure."""

    error: ErrorDetails


class GeneratedFile(ApiModel):
    """A file inside of an answer."""

    media_type: str
    b64_json: _Base64


class ActionsAnswer(ApiModel):
    """Actions that were made while the client waited, and the clip that goes with them."""

    id: JobId
    mode: Mode
    actions: Actions
    video: GeneratedFile | None
    seed: Count
    fps: Seconds
    num_frames: Count
    height: Count
    width: Count
    frames_sha256: str
    negative_prompt_origin: str
    notes: tuple[str, ...]
    stage_durations: Mapping[str, Seconds]


class Image(ApiModel):
    """One of several images."""

    id: JobId
    b64_json: _Base64
    url: None = None
    revised_prompt: None = None
    seed: Count
    frames_sha256: str


class ImageMetrics(ApiModel):
    """Durations of the images."""

    stage_durations: Mapping[str, Seconds]


class Images(ApiModel):
    """Images that were made while the client waited."""

    created: Count
    data: tuple[Image, ...]
    output_format: str
    size: Annotated[str, Field(json_schema_extra={"pattern": "^[0-9]+x[0-9]+$"})]
    metrics: ImageMetrics


class Health(ApiModel):
    """The process is up."""

    status: Literal["ok"] = "ok"


class Ready(ApiModel):
    """Every stage has a running replica."""

    status: Literal["ready"] = "ready"


class NotReadyAnswer(ApiModel):
    """Requests should go elsewhere for now."""

    status: Literal["not ready", "shutting down"]
    waiting_for: Annotated[tuple[str, ...], Field(description="stages without a running replica")] = ()
