"""A request as the JSON body of the HTTP API."""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Sequence
from typing import Any

from cosmos3_core.actions import action_rows
from cosmos3_core.errors import RequestError
from cosmos3_core.media.image import write_image
from cosmos3_core.request import GenerationRequest

_DEFAULTS = GenerationRequest(prompt="")


def body_of(request: GenerationRequest) -> dict[str, Any]:
    """The request as a JSON body: the fields that differ from the defaults; an image or clip as a data URL.

    Raises:
        RequestError: a field that does not travel over HTTP, or an image or clip that cannot be read.
    """
    given = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    body: dict[str, Any] = {}
    if given.pop("noise") is not None:
        raise _kept_at_home("noise", "tensors")
    if (actions := given.pop("actions")) is not None:
        body["actions"] = action_rows("actions", actions, None).tolist()
    packed = request.packed()
    if packed.image is not None:
        body["image"] = _data_url(packed.image if isinstance(packed.image, bytes) else _png(packed.image))
    if packed.video is not None:
        if not isinstance(packed.video, bytes):
            raise RequestError("video", "frames", "a file over HTTP", "Write them to one, and give its path or bytes.")
        body["video"] = _data_url(packed.video)
    del given["image"], given["video"]
    for name in ("condition_frame_indexes_vision", "guidance_interval"):
        if isinstance(given[name], Sequence) and not isinstance(given[name], str):
            given[name] = list(given[name])
    body |= {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)}
    if "append_metadata" in body:
        raise _kept_at_home("append_metadata", body["append_metadata"])
    return body


def _kept_at_home(name: str, value: Any) -> RequestError:
    return RequestError(name, value, "the default over HTTP", "Generate in process instead.")


def _data_url(data: bytes) -> str:
    # What it is is told by its content.
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def _png(frame: Any) -> bytes:
    png = io.BytesIO()
    write_image(png, frame, "png")
    return png.getvalue()
