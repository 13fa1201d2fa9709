"""Images and clips in request bodies: the bytes of a file, however they were sent. No path is ever opened.

URLs of other servers are fetched only where the operator says so, by :class:`RemoteFiles`.
"""

from __future__ import annotations

import base64
from typing import Any, Protocol

from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.media.kinds import CLIP, CLIP_KINDS, IMAGE_KINDS, STILL, kind_of
from cosmos3_core.presets import LIMITS
from deployments.api.fields import MEDIA
from deployments.api.json_text import read_json
from deployments.api.memory_budget import Reservation
from deployments.threads import run_in_thread

# Of base64.
_BYTES_PER_CHAR = 0.75
_MAX_SHOWN_CHARS = 60
_WITHOUT_SPACE = dict.fromkeys(map(ord, " \t\r\n\f\v"))
_REMOTE = ("http://", "https://")
_ALLOWED = "a file part of a multipart form, a data URL (data:image/png;base64,...), or base64"


class RemoteFiles(Protocol):
    """Fetches files of other servers, :class:`deployments.api.remote_media.RemoteMediaFetcher`."""

    async def fetch(self, url: str, field: str) -> bytes:
        """The file that a URL in a field leads to.

        Raises:
            RequestError: it is not allowed, or cannot be had.
        """
        ...


async def with_fetched(given: dict[str, Any], remote: RemoteFiles, held: Reservation) -> dict[str, Any]:
    """The fields of a body, with the bytes in place of URLs of other servers.

    Args:
        given: its fields.
        remote: fetches them.
        held: the body's room, which grows by the files; while one is on its way, by the largest that may come.

    Raises:
        RequestError: a URL that is not allowed, or whose file cannot be had.
        OverloadedError: there is no room for it now.
    """
    fetched = dict(given)
    for name, url in (await run_in_thread(_remote_urls, given)).items():
        with held.room_for(LIMITS.max_media_bytes):
            data = await remote.fetch(url, name)
            _refuse_too_large(name, len(data))
        held.grow_by(len(data))
        fetched[name] = data
    return fetched


def _remote_urls(given: dict[str, Any]) -> dict[str, str]:
    """Field -> URL of another server that it holds."""
    texts = {name: _text_of(name, given[name]) for name in MEDIA if not isinstance(given.get(name, b""), bytes)}
    longest = max(map(len, _REMOTE))
    return {name: str(text) for name, text in texts.items() if text[:longest].lower().startswith(_REMOTE)}


def given_media(given: dict[str, Any]) -> dict[str, tuple[str, bytes]]:
    """The image and the clip that a body brings, each with the field that brings it.

    Args:
        given: its fields.

    Raises:
        RequestError: a field holds no file, or there are two images or two clips.
    """
    found: dict[str, tuple[str, bytes]] = {}
    for name in MEDIA:
        if name not in given:
            continue
        data = file_bytes(name, given[name])
        kind = _told_by_content(name, data) if name.startswith("input") else name.removesuffix("_reference")
        if kind in found:
            raise RequestError(name, "given", f"nothing beside {found[kind][0]}", f"A request has one {kind} at most.")
        found[kind] = name, data
    return found


def file_bytes(field: str, value: Any) -> bytes:
    """The file that a field holds.

    Args:
        field: its name.
        value: the bytes of a file part, a text, or a reference: an object of one URL, or a list of one reference.

    Raises:
        RequestError: something else, broken base64, a URL that would have to be fetched, nothing, or too much.
    """
    if isinstance(value, bytes):
        data = value
    else:
        text = _text_of(field, value)
        _refuse_too_large(field, int(len(text) * _BYTES_PER_CHAR))
        data = _decoded(field, text)
    if not data:
        raise RequestError(field, "an empty file", _ALLOWED)
    _refuse_too_large(field, len(data))
    return data


def _told_by_content(field: str, data: bytes) -> str:
    kind = kind_of(data)
    if kind.category not in (STILL, CLIP):
        raise RequestError(field, f"a file of kind {kind.name}", f"{IMAGE_KINDS}, or {CLIP_KINDS}")
    return "image" if kind.category == STILL else "video"


def _text_of(field: str, value: Any) -> str:
    """The URL or base64 in a reference."""
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
