"""Reading a request body with a bound: refused by its announced length, or while it is being read."""

from __future__ import annotations

import json
import re
from typing import Any

from starlette.datastructures import FormData, Headers, UploadFile
from starlette.formparsers import FormParser, MultiPartException, MultiPartParser
from starlette.requests import Request

from deployments.api.bodies import from_form
from deployments.api.errors import BodyError

_MAX_FIELDS = 64


async def read_fields(request: Request, max_bytes: int) -> dict[str, Any]:
    """The fields of a JSON, multipart or URL-encoded body.

    Raises:
        BodyError: 413 too large, 415 another content type, 400 not readable.
    """
    content_type = request.headers.get("content-type", "").split(";")[0].strip().lower()
    stream = _bounded(request, max_bytes)
    if content_type == "application/json":
        return _json_object(b"".join([chunk async for chunk in stream]))
    limits = {"max_fields": _MAX_FIELDS, "max_part_size": max_bytes}
    parser: MultiPartParser | FormParser | None = None
    if content_type == "multipart/form-data":
        parser = MultiPartParser(request.headers, stream, max_files=0, **limits)
    elif content_type == "application/x-www-form-urlencoded":
        parser = FormParser(request.headers, stream, **limits)
    if parser is not None:
        try:
            return _fields(await parser.parse())
        except (MultiPartException, KeyError) as error:
            raise BodyError(400, "broken_form", f"the form cannot be read: {error}") from None
    raise BodyError(
        415,
        "wrong_content_type",
        f"content-type {content_type!r}: allowed are application/json and multipart/form-data",
    )


def request_id_of(headers: Headers, default: str) -> str:
    """The caller's ``x-request-id``, or the default.

    Raises:
        BodyError: one that no log should hold.
    """
    given = headers.get("x-request-id")
    if given is not None and not re.fullmatch(r"[\x21-\x7e]{1,128}", given):
        raise BodyError(400, "invalid_header", "x-request-id: allowed are 1 to 128 visible ASCII characters")
    return given or default


async def _bounded(request: Request, max_bytes: int) -> Any:
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > max_bytes:
        raise _too_large(max_bytes)
    num_bytes = 0
    async for chunk in request.stream():
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(max_bytes)
        yield chunk


def _too_large(max_bytes: int) -> BodyError:
    return BodyError(413, "body_too_large", f"the body is larger than the {max_bytes} bytes that are allowed")


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise BodyError(400, "broken_json", f"the body is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise BodyError(400, "broken_json", f"the body is a JSON {type(values).__name__}; allowed is an object")
    return values


def _fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, str] = {}
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            raise BodyError(400, "broken_form", f"the field {name!r} is a file; text-to-video takes none")
        if name in fields:
            raise BodyError(400, "broken_form", f"the field {name!r} is given twice")
        fields[name] = value
    return from_form(fields)
