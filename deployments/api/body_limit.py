"""Bounded reading of request bodies: too large a body is refused by its announced length, or while it is read."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from deployments.api.field_types import FormText
from deployments.api.forms import nested_fields
from deployments.api.json_text import read_json
from deployments.api.memory_budget import Reservation
from deployments.errors import BodyError
from deployments.threads import run_in_thread

VISIBLE = {"pattern": r"^[\x21-\x7e]{1,128}$"}
"""JSON schema of headers that are repeated in logs and the database."""

MAX_FIELDS = 128
"""Of a form, or of a JSON body; all that have a name of their own fit in."""

MAX_URLENCODED_BYTES = 1 << 20
"""Of a URL-encoded form, which carries no files: two prompts of the longest, of letters that take most."""

JSON = "application/json"
MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
_MAX_FILES = 4
# For all of it, however much that is.
_UPLOAD_S = 600.0
# That a client may be behind: a connection that says nothing, or next to nothing, holds its place no longer.
_IDLE_S = 30.0
_LEAST_BYTES_PER_S = 64 * 1024
_MAX_DIGITS = 18
_MAX_SHOWN_CHARS = 60


async def read_fields(request: Request, max_bytes: int, held: Reservation) -> dict[str, Any]:
    """Read the fields of a JSON, multipart or URL-encoded body: JSON's values, :class:`FormText`, the bytes of files.

    Args:
        request: whose body was not read yet.
        max_bytes: that it may have.
        held: grows with the body; for an announced length there has to be room before anything is read.

    Raises:
        BodyError: 413 too large, 415 another content type, 400 not readable or not whole, 408 too slow.
        OverloadedError: there is no room for it now.
    """
    kind = _kind_of(request.headers)
    if kind == URLENCODED:
        max_bytes = min(max_bytes, MAX_URLENCODED_BYTES)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        if len(announced) > _MAX_DIGITS or int(announced) > max_bytes:
            raise _too_large(kind, max_bytes)
        held.check(int(announced))
    try:
        async with asyncio.timeout(_UPLOAD_S):
            return await _fields(kind, request, _bounded(kind, request, max_bytes, held), max_bytes)
    except TimeoutError:
        behind = f"at most {_IDLE_S:g} s behind {_LEAST_BYTES_PER_S} bytes a second"
        limits = f"allowed are {_UPLOAD_S:g} s for all of it, and {behind}"
        raise BodyError(408, "body_too_slow", f"the body did not come in time; {limits}") from None
    except ClientDisconnect:
        raise BodyError(400, "body_incomplete", "the connection was closed before the end of the body") from None


def check_visible(name: str, value: str) -> str:
    """Return a header's value.

    Raises:
        BodyError: it is one that no log or database should hold.
    """
    if not re.fullmatch(VISIBLE["pattern"], value, re.ASCII):
        raise BodyError(400, "invalid_header", f"{name} must be 1 to 128 visible ASCII characters")
    return value


def _kind_of(headers: Headers) -> str:
    """Return a body's content type.

    Raises:
        BodyError: one that is not read.
    """
    content_type, _, parameters = headers.get("content-type", "").partition(";")
    kind = content_type.strip().lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters, re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise BodyError(415, "wrong_content_type", f"charset {charset[1][:_MAX_SHOWN_CHARS]!r}: allowed is utf-8")
    if kind not in (JSON, MULTIPART, URLENCODED):
        allowed = f"{JSON}, {MULTIPART} and {URLENCODED}"
        message = f"content-type {kind[:_MAX_SHOWN_CHARS]!r}: allowed are {allowed}"
        raise BodyError(415, "wrong_content_type", message)
    return kind


async def _fields(kind: str, request: Request, stream: Any, max_bytes: int) -> dict[str, Any]:
    if kind == MULTIPART:
        return await _multipart_fields(request, stream, max_bytes)
    data = bytearray()
    async for chunk in stream:
        data += chunk
    # Beside the event loop: a large one takes a second.
    return await run_in_thread(_json_object if kind == JSON else _urlencoded_fields, data)


async def _multipart_fields(request: Request, stream: Any, max_bytes: int) -> dict[str, Any]:
    limits = {"max_files": _MAX_FILES, "max_fields": MAX_FIELDS, "max_part_size": max_bytes}
    try:
        form = await MultiPartParser(request.headers, stream, **limits).parse()
        try:
            return await _form_fields(form)
        finally:
            await form.close()
    except (MultiPartException, KeyError) as error:
        raise _broken_form(error) from None


async def _bounded(kind: str, request: Request, max_bytes: int, held: Reservation) -> AsyncIterator[bytes]:
    num_bytes = 0
    left_s = _IDLE_S
    chunks = request.stream()
    while True:
        asked_s = time.monotonic()
        async with asyncio.timeout(left_s):
            chunk = await anext(chunks, None)
        came_s = time.monotonic()
        if chunk is None:
            return
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(kind, max_bytes)
        held.grow_to(num_bytes)
        yield chunk
        # A faster beginning is no reason to be slow later: it holds more room.
        left_s = min(left_s - (came_s - asked_s) + len(chunk) / _LEAST_BYTES_PER_S, _IDLE_S)


def _too_large(kind: str, max_bytes: int) -> BodyError:
    message = f"the body is larger than the {max_bytes} bytes that are allowed"
    if max_bytes == MAX_URLENCODED_BYTES and kind == URLENCODED:
        message += f" of {URLENCODED}; send {MULTIPART} or {JSON}"
    return BodyError(413, "body_too_large", message)


def _json_object(data: bytearray) -> dict[str, Any]:
    try:
        values = read_json(data)
    except ValueError as error:
        raise BodyError(400, "broken_json", f"the body cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise BodyError(400, "broken_json", f"the body is a JSON {type(values).__name__}; allowed is an object")
    if len(values) > MAX_FIELDS:
        raise BodyError(400, "broken_json", f"the body has {len(values)} fields; allowed are {MAX_FIELDS}")
    return values


def _urlencoded_fields(data: bytearray) -> dict[str, Any]:
    if data.lstrip()[:1] == b"{":  # curl -d says that everything is a form
        raise _broken_form(f"it looks like JSON, which needs the header content-type: {JSON}")
    try:
        items = parse_qsl(data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise _broken_form(f"it has more than the {MAX_FIELDS} fields that are allowed") from None
    return nested_fields((name, FormText(value)) for name, value in items)


def _broken_form(reason: object) -> BodyError:
    return BodyError(400, "broken_form", f"the form cannot be read: {reason}")


async def _form_fields(form: FormData) -> dict[str, Any]:
    items: list[tuple[str, FormText | bytes]] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and not value.filename and not value.size:
            continue  # what browsers send for a file that was not chosen
        items.append((name, await value.read() if isinstance(value, UploadFile) else FormText(value)))
    return nested_fields(items)
