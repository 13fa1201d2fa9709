"""Images and clips in request bodies: the bytes of a file, however clients send them. No path is ever opened."""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.kinds import CLIP, CLIP_KINDS_TEXT, IMAGE_KINDS_TEXT, STILL, kind_of
from cosmos3_core.presets import LIMITS
from deployments.api.body_reader import Reservation, read_json
from deployments.api.field_types import FieldType, Schema, any_of
from deployments.threads import run_in_thread

MEDIA = ("image", "video", "input_reference", "input_references", "image_reference", "video_reference")
"""Fields that bring an image or a clip."""

FetchFile = Callable[[str, str], Awaitable[bytes]]
"""URL, the field that has it -> the file of another server, as :mod:`deployments.api.remote_media` fetches it."""

_BYTES_PER_BASE64_CHAR = 0.75
_MAX_SHOWN_CHARS = 60
_WITHOUT_SPACE = dict.fromkeys(map(ord, " \t\r\n\f\v"))
_REMOTE = ("http://", "https://")
_ALLOWED = "a file part of a multipart form, a data URL (data:image/png;base64,...), or base64"
_URL: Schema = {"type": "string", "minLength": 1, "description": "a data URL, base64, or a URL where they are fetched"}
_REFERENCE = any_of(_URL, {"type": "object", "minProperties": 1, "maxProperties": 1})


def file_type(about: str, *, takes_several: bool = False) -> FieldType:
    """Return the type of an image or a clip; in multipart forms the file itself."""
    references: Schema = {"type": "array", "items": _REFERENCE, "minItems": 1, "maxItems": 1}
    return FieldType(
        "file",
        about,
        any_of(_REFERENCE, references),
        check=decode_file,
        takes_several=takes_several,
        takes_file=True,
        form_schema={"type": "string", "format": "binary"},
    )


async def fetch_remote(values: dict[str, Any], fetch: FetchFile, reserved: Reservation) -> dict[str, Any]:
    """Return a body's fields with fetched files in place of URLs; the body's memory grows by the files.

    While a file is on its way, room for the largest allowed one is reserved.

    Raises:
        RequestError: a URL is not allowed, or its file cannot be fetched.
        OverloadedError: there is no memory for it now.
    """
    fetched = dict(values)
    for name, url in (await run_in_thread(_find_remote, values)).items():
        num_bytes = reserved.num_bytes
        reserved.grow_to(num_bytes + LIMITS.max_media_bytes)
        data = await fetch(url, name)
        _refuse_too_large(name, len(data))
        reserved.shrink_to(num_bytes + len(data))
        fetched[name] = data
    return fetched


def _find_remote(values: dict[str, Any]) -> dict[str, str]:
    """Return the fields that hold a URL of another server, with the URL."""
    references = {name: values[name] for name in MEDIA if name in values and _file_part(values[name]) is None}
    texts = {name: _text_of(name, value) for name, value in references.items()}
    longest = max(map(len, _REMOTE))
    return {name: str(text) for name, text in texts.items() if text[:longest].lower().startswith(_REMOTE)}


def _file_part(value: Any) -> bytes | None:
    """Return the file of a form's part, alone or in a list of one; None for another value."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, bytes) else None


def find_media(values: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    """Return kind -> (field, file) of image and clip; raise RequestError for two of a kind, or any other file."""
    found: dict[str, tuple[str, bytes]] = {}
    for name in MEDIA:
        if name not in values:
            continue
        data = values[name]
        kind = _detect_kind(name, data) if name.startswith("input") else name.removesuffix("_reference")
        if kind in found:
            raise RequestError(name, "given", f"nothing beside {found[kind][0]}", f"A request has one {kind} at most.")
        found[kind] = name, data
    return found


def decode_file(field: str, value: Any) -> bytes:
    """Return the file that a field holds: a file part, a text, an object of one URL, or a list of one of these.

    Raises:
        RequestError: the field holds something else, broken base64, a URL that is not fetched, nothing, or too much.
    """
    data = _file_part(value)
    if data is None:
        text = _text_of(field, value)
        _refuse_too_large(field, int(len(text) * _BYTES_PER_BASE64_CHAR))
        data = _decode(field, text)
    if not data:
        raise RequestError(field, "an empty file", _ALLOWED)
    _refuse_too_large(field, len(data))
    return data


def _detect_kind(field: str, data: bytes) -> str:
    kind = kind_of(data)
    if kind.category not in (STILL, CLIP):
        raise RequestError(field, f"a file of kind {kind.name}", f"{IMAGE_KINDS_TEXT}, or {CLIP_KINDS_TEXT}")
    return "image" if kind.category == STILL else "video"


def _text_of(field: str, value: Any) -> str:
    """Return the URL or base64 in a reference."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = read_json(value)
        except ValueError:
            raise _unreadable(field, value) from None
    if isinstance(value, list):
        if len(value) > 1 and field == "input_references":
            raise CapabilityError(field, f"a list of {len(value)}", "a list of one", "Not offered: several references.")
        if len(value) != 1:
            raise RequestError(field, f"a list of {len(value)}", "one reference, or a list of one")
        (value,) = value
    if isinstance(value, dict):
        kind = field.removesuffix("s").removesuffix("_reference")
        keys = ("image_url", "video_url") if kind == "input" else (f"{kind}_url",)
        allowed = f"an object of {' or '.join(keys)}"
        if "file_id" in value:
            raise RequestError(field, value, allowed, "No files can be uploaded here: send it.")
        if len(value) != 1 or next(iter(value)) not in keys:
            raise RequestError(field, sorted(value), f"{allowed} and nothing else")
        (value,) = value.values()
        if isinstance(value, dict) and list(value) == ["url"]:  # as chat completions have it
            value = value["url"]
    if not isinstance(value, str):
        raise RequestError(field, type(value).__name__, _ALLOWED)
    return value


def _decode(field: str, text: str) -> bytes:
    head, comma, encoded = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if head and not (comma and head.lower().endswith(";base64")):
        raise RequestError(field, _shorten(text), "a data URL with base64: data:image/png;base64,...")
    if "://" in text[:_MAX_SHOWN_CHARS] and not head:
        raise RequestError(field, _shorten(text), _ALLOWED, "URLs are not fetched: send the file itself.")
    try:
        return base64.b64decode(encoded.translate(_WITHOUT_SPACE), validate=True)
    except ValueError:
        raise _unreadable(field, text) from None


def _unreadable(field: str, text: str) -> RequestError:
    return RequestError(field, _shorten(text), _ALLOWED, "This is neither; is it cut off?")


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _refuse_too_large(field: str, num_bytes: int) -> None:
    if num_bytes > LIMITS.max_media_bytes:
        given, allowed = f"a file of {num_bytes} bytes", f"at most {LIMITS.max_media_bytes} bytes"
        raise RequestError(field, given, allowed, "Send a smaller file.")
