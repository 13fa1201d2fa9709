"""Images and clips in request bodies: the bytes of a file, however they were sent. No path is ever opened.

URLs of other servers are fetched only where the operator allows it, by :class:`RemoteFiles`.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any, Protocol

from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.kinds import CLIP, CLIP_KINDS, IMAGE_KINDS, STILL, kind_of
from cosmos3_core.presets import LIMITS
from deployments.api.json_text import read_json
from deployments.api.memory_budget import Reservation
from deployments.threads import run_in_thread

MEDIA = ("image", "video", "input_reference", "input_references", "image_reference", "video_reference")
"""Fields that bring an image or a clip."""

_BYTES_PER_BASE64_CHAR = 0.75
_MAX_SHOWN_CHARS = 60
_WITHOUT_SPACE = dict.fromkeys(map(ord, " \t\r\n\f\v"))
_REMOTE = ("http://", "https://")
_ALLOWED = "a file part of a multipart form, a data URL (data:image/png;base64,...), or base64"


class RemoteFiles(Protocol):
    """Fetcher of files from other servers, :class:`deployments.api.remote_media.RemoteMediaFetcher`."""

    async def fetch(self, url: str, field: str) -> bytes:
        """Return the file that the URL in a field leads to.

        Raises:
            RequestError: it is not allowed, or cannot be had.
        """
        ...


async def fetch_remote(values: dict[str, Any], remote: RemoteFiles, reserved: Reservation) -> dict[str, Any]:
    """Return the fields of a body with the bytes in place of URLs of other servers.

    Args:
        values: of its fields.
        remote: fetches them.
        reserved: the body's memory, which grows by the files; while one is on its way, by the largest that may come.

    Raises:
        RequestError: a URL is not allowed, or its file cannot be had.
        OverloadedError: there is no memory for it now.
    """
    fetched = dict(values)
    for name, url in (await run_in_thread(_remote_urls, values)).items():
        with reserved.room_for(LIMITS.max_media_bytes):
            data = await remote.fetch(url, name)
            _refuse_too_large(name, len(data))
        reserved.grow_by(len(data))
        fetched[name] = data
    return fetched


def _remote_urls(values: dict[str, Any]) -> dict[str, str]:
    """Return the fields that hold a URL of another server, with the URL."""
    references = {name: values[name] for name in MEDIA if not _is_file(values.get(name, b""))}
    texts = {name: _text_of(name, value) for name, value in references.items()}
    longest = max(map(len, _REMOTE))
    return {name: str(text) for name, text in texts.items() if text[:longest].lower().startswith(_REMOTE)}


def _is_file(value: Any) -> bool:
    """Return whether a value is a file part, or a form's list of one."""
    return isinstance(value, bytes) or (isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes))


def find_media(values: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    """Find the image and the clip that a body brings, each with the field that brings it.

    Args:
        values: of its fields; of those in :data:`MEDIA` the bytes of a file.

    Raises:
        RequestError: there are two images or two clips, or a file is neither.
    """
    found: dict[str, tuple[str, bytes]] = {}
    for name in MEDIA:
        if name not in values:
            continue
        data = values[name]
        kind = _kind_by_content(name, data) if name.startswith("input") else name.removesuffix("_reference")
        if kind in found:
            raise RequestError(name, "given", f"nothing beside {found[kind][0]}", f"A request has one {kind} at most.")
        found[kind] = name, data
    return found


def file_bytes(field: str, value: Any) -> bytes:
    """Return the file that a field holds.

    Args:
        field: its name.
        value: the bytes of a file part, a text, or a reference: an object of one URL, or a list of one reference.

    Raises:
        RequestError: the field holds something else, broken base64, a URL that is not fetched, nothing, or too much.
    """
    if _is_file(value):
        data: bytes = value if isinstance(value, bytes) else value[0]
    else:
        text = _text_of(field, value)
        _refuse_too_large(field, int(len(text) * _BYTES_PER_BASE64_CHAR))
        data = _decoded(field, text)
    if not data:
        raise RequestError(field, "an empty file", _ALLOWED)
    _refuse_too_large(field, len(data))
    return data


def _kind_by_content(field: str, data: bytes) -> str:
    kind = kind_of(data)
    if kind.category not in (STILL, CLIP):
        raise RequestError(field, f"a file of kind {kind.name}", f"{IMAGE_KINDS}, or {CLIP_KINDS}")
    return "image" if kind.category == STILL else "video"


def _text_of(field: str, value: Any) -> str:
    """Return the URL or base64 in a reference."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = read_json(value)
        except ValueError:
            raise _refused(field, value) from None
    if isinstance(value, list):
        if len(value) > 1 and field == "input_references":
            raise CapabilityError(field, f"a list of {len(value)}", "a list of one", "Not offered: several references.")
        if len(value) != 1:
            raise RequestError(field, f"a list of {len(value)}", "one reference, or a list of one")
        value = value[0]
    if isinstance(value, dict):
        kind = field.removesuffix("s").removesuffix("_reference")
        keys = ("image_url", "video_url") if kind == "input" else (f"{kind}_url",)
        if "file_id" in value:
            raise RequestError(
                field, value, f"an object of {' or '.join(keys)}", "No files can be uploaded here: send it."
            )
        if len(value) != 1 or next(iter(value)) not in keys:
            raise RequestError(field, sorted(value), f"an object of {' or '.join(keys)} and nothing else")
        (value,) = value.values()
        if isinstance(value, dict) and list(value) == ["url"]:  # as chat completions have it
            value = value["url"]
    if not isinstance(value, str):
        raise RequestError(field, type(value).__name__, _ALLOWED)
    return value


def _decoded(field: str, text: str) -> bytes:
    head, comma, encoded = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if head and not (comma and head.lower().endswith(";base64")):
        raise RequestError(field, _start(text), "a data URL with base64: data:image/png;base64,...")
    if "://" in text[:_MAX_SHOWN_CHARS] and not head:
        hint = "URLs are not fetched: send the file itself."
        raise RequestError(field, _start(text), _ALLOWED, hint)
    try:
        return base64.b64decode(encoded.translate(_WITHOUT_SPACE), validate=True)
    except ValueError:
        raise _refused(field, text) from None


def _refused(field: str, text: str) -> RequestError:
    return RequestError(field, _start(text), _ALLOWED, "This is neither; is it cut off?")


def _start(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def _refuse_too_large(field: str, num_bytes: int) -> None:
    if num_bytes > LIMITS.max_media_bytes:
        given, allowed = f"a file of {num_bytes} bytes", f"at most {LIMITS.max_media_bytes} bytes"
        raise RequestError(field, given, allowed, "Send a smaller file.")
