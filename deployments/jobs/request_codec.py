"""Convert requests to their stored form: plain JSON values, and the image or clip beside them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from cosmos3_core.actions import action_rows
from cosmos3_core.conditioning.modes import IMAGE_FIELD, VIDEO_FIELD
from cosmos3_core.errors import RequestError
from cosmos3_core.media.source import Packed
from cosmos3_core.request import GenerationRequest

MEDIA = (IMAGE_FIELD, VIDEO_FIELD)
"""Names of the files that a request may have."""

_DEFAULTS = GenerationRequest()


def encode_request(request: GenerationRequest) -> tuple[dict[str, Any], dict[str, Packed]]:
    """Return the fields of a request that differ from their defaults, and its media by name.

    Args:
        request: checked, with its media :meth:`~GenerationRequest.packed`.

    Raises:
        RequestError: it brings its own noise, which is not kept.
    """
    if request.noise is not None:
        raise RequestError("noise", "tensors", "nothing where a service makes it", "Generate in process instead.")
    values: dict[str, Any] = {}
    media: dict[str, Packed] = {}
    for field in dataclasses.fields(request):
        value = getattr(request, field.name)
        if field.name in MEDIA:
            if value is not None:
                media[field.name] = value
        elif field.name == "actions":
            if value is not None:
                values["actions"] = action_rows("actions", value, None).tolist()
        elif value != getattr(_DEFAULTS, field.name):
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            values[field.name] = list(value) if is_list else value
    return values, media


def decode_request(values: Mapping[str, Any], media: Mapping[str, Packed]) -> GenerationRequest:
    """Rebuild a request from what :func:`encode_request` returned."""
    given: dict[str, Any] = {**values, **media}
    return GenerationRequest(**given)


def compute_fingerprint(values: Mapping[str, Any], media: Mapping[str, Packed], **options: Any) -> str:
    """Return a hash of a request and its options, the same in any process."""
    digest = hashlib.sha256(json.dumps([values, options], sort_keys=True).encode())
    for name in sorted(media):
        data = media[name]
        about = "bytes" if isinstance(data, bytes) else f"{data.dtype} {data.shape}"
        digest.update(f"\0{name} {about}\0".encode())
        digest.update(data if isinstance(data, bytes) else data.tobytes())
    return digest.hexdigest()
