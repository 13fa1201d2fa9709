"""Reading a request body with bounds: refused by its announced length before it is read, or while it is."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from deployments.api.body_room import Held
from deployments.api.errors import BodyError
from deployments.api.field_kinds import FormText
from deployments.api.form_fields import nested_fields
from deployments.api.json_text import read_json

MAX_FIELDS = 64
"""Of a form."""

_MAX_FILES = 4
# The slowest client: 160 KiB/s for the largest body.
_UPLOAD_S = 600.0
# Between two pieces: a connection that says nothing holds its place no longer.
_IDLE_S = 30.0
_MAX_DIGITS = 18
_MAX_SHOWN_CHARS = 60
_VISIBLE = re.compile(r"[\x21-\x7e]{1,128}")


async def read_fields(request: Request, max_bytes: int, held: Held) -> dict[str, Any]:
    """The fields of a JSON, multipart or URL-encoded body: JSON's values, :class:`FormText`, the bytes of files.

    Args:
        request: whose body was not read yet.
        max_bytes: that it may have.
        held: grows with the body; for an announced length there has to be room before anything is read.

    Raises:
        BodyError: 413 too large, 415 another content type, 400 not readable or not whole, 408 too slow.
        OverloadedError: there is no room for it now.
    """
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        if len(announced) > _MAX_DIGITS or int(announced) > max_bytes:
            raise _too_large(max_bytes)
        held.check(int(announced))
    try:
        async with asyncio.timeout(_UPLOAD_S):
            return await _fields(request, _bounded(request, max_bytes, held), max_bytes)
    except TimeoutError:
        limits = f"allowed are {_UPLOAD_S:g} s for all of it and {_IDLE_S:g} s between two pieces"
        raise BodyError(408, "body_too_slow", f"the body did not come in time; {limits}") from None
    except ClientDisconnect:
        raise BodyError(400, "body_incomplete", "the connection was closed before the end of the body") from None


def request_id_of(headers: Headers, default: str) -> str:
    """The caller's ``x-request-id``, or the default.

    Raises:
        BodyError: one that no log should hold.
    """
    return visible_header(headers, "x-request-id") or default


def visible_header(headers: Headers, name: str) -> str | None:
    """A header's value; None where there is none.

    Raises:
        BodyError: one that no log or database should hold.
    """
    given = headers.get(name)
    if given is not None and not _VISIBLE.fullmatch(given):
        raise BodyError(400, "invalid_header", f"{name}: allowed are 1 to 128 visible ASCII characters")
    return given


async def _fields(request: Request, stream: Any, max_bytes: int) -> dict[str, Any]:
    content_type, _, parameters = request.headers.get("content-type", "").partition(";")
    kind = content_type.strip().lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters, re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        raise BodyError(415, "wrong_content_type", f"charset {charset[1][:_MAX_SHOWN_CHARS]!r}: allowed is utf-8")
    if kind == "application/json":
        data = bytearray()
        async for chunk in stream:
            data += chunk
        # Beside the event loop: a large one takes a second.
        return await asyncio.to_thread(_json_object, data)
    limits = {"max_fields": MAX_FIELDS, "max_part_size": max_bytes}
    parser: MultiPartParser | FormParser | None = None
    if kind == "multipart/form-data":
        parser = MultiPartParser(request.headers, stream, max_files=_MAX_FILES, **limits)
    elif kind == "application/x-www-form-urlencoded":
        parser = FormParser(request.headers, stream, **limits)
    if parser is not None:
        try:
            form = await parser.parse()
            try:
                return await _form_fields(form)
            finally:
                await form.close()
        except (MultiPartException, KeyError) as error:
            raise BodyError(400, "broken_form", f"the form cannot be read: {error}") from None
    allowed = "application/json, multipart/form-data and application/x-www-form-urlencoded"
    message = f"content-type {kind[:_MAX_SHOWN_CHARS]!r}: allowed are {allowed}"
    raise BodyError(415, "wrong_content_type", message)


async def _bounded(request: Request, max_bytes: int, held: Held) -> AsyncIterator[bytes]:
    num_bytes = 0
    chunks = request.stream()
    while True:
        async with asyncio.timeout(_IDLE_S):
            chunk = await anext(chunks, None)
        if chunk is None:
            return
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        held.grow_to(num_bytes)
        yield chunk


def _too_large(max_bytes: int) -> BodyError:
    return BodyError(413, "body_too_large", f"the body is larger than the {max_bytes} bytes that are allowed")


def _json_object(data: bytearray) -> dict[str, Any]:
    try:
        values = read_json(data)
    except ValueError as error:
        raise BodyError(400, "broken_json", f"the body cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise BodyError(400, "broken_json", f"the body is a JSON {type(values).__name__}; allowed is an object")
    return values


async def _form_fields(form: FormData) -> dict[str, Any]:
    items: list[tuple[str, FormText | bytes]] = []
    for name, value in form.multi_items():
        if isinstance(value, UploadFile) and not value.filename and not value.size:
            continue  # what browsers send for a file that was not chosen
        items.append((name, await value.read() if isinstance(value, UploadFile) else FormText(value)))
    return nested_fields(items)
