"""Read the fields of a request's body: bounded in bytes, time, memory, number and depth, without duplicate names."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncGenerator, Collection, Iterable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager, nullcontext
from typing import Any
from urllib.parse import parse_qsl

from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect, Request

from cluster.errors import OverloadedError
from deployments.api_model import JSON
from deployments.errors import BodyError
from deployments.process_memory import LARGE_BYTES, give_memory_back
from deployments.threads import run_in_thread

MAX_FIELDS = 128
"""Most fields of a form or a JSON body; every field that has a name fits in."""

MAX_URLENCODED_BYTES = 1 << 20
"""Most bytes of a URL-encoded form, which carries no files: two longest prompts of the longest characters."""

MULTIPART = "multipart/form-data"
URLENCODED = "application/x-www-form-urlencoded"
_MAX_FILES = 4
# Python takes fifty bytes for a value of two characters; real bodies have few values, and long texts.
_MAX_VALUES = 1_000_000
# A bound of our own: Python's depends on the stack, and what one thread can read, another cannot print.
_MAX_DEPTH = 100
_TOO_DEEP = f"its lists and objects lie deeper in each other than the {_MAX_DEPTH} levels that are allowed"
# Seconds for a whole body of any size.
_UPLOAD_S = 600.0
# Seconds that a client may fall behind the least pace before its connection is closed.
_MAX_LAG_S = 30.0
_LEAST_BYTES_PER_S = 64 * 1024
# Retry-After where memory is short: an upload takes seconds.
_RETRY_S = 5.0
_MAX_DIGITS = 18
_MAX_SHOWN_CHARS = 60
_CONTROL = re.compile(r"[\x00-\x1f]")
_BRACKETED = re.compile(r"([^\[\]]{1,200})((?:\[[^\[\]]{0,200}\]){1,4})")


class FormText(str):
    """Text from a form; its field decides how it is parsed."""

    __slots__ = ()


class MemoryBudget:
    """Bound of the bytes that all bodies in one process may hold, and how many are taken: 0 when idle."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.taken_bytes = max_bytes, 0
        self.large_parse = asyncio.Lock()
        """Held while a large body is parsed, which keeps Python's lock: others run between two of them."""

    @contextmanager
    def reserve(self) -> Iterator[Reservation]:
        """Reserve memory for a body as it grows; the end of the ``with`` block releases it."""
        reserved = Reservation(self)
        try:
            yield reserved
        finally:
            is_large = reserved.num_bytes > LARGE_BYTES
            reserved.shrink_to(0)
            if is_large:
                give_memory_back()


class Reservation:
    """The bytes that one body has reserved."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.num_bytes = 0

    def parse_turn(self) -> AbstractAsyncContextManager[None]:
        """Wait for the large bodies before this one, if it is large, so that other requests run between them."""
        return self._budget.large_parse if self.num_bytes > LARGE_BYTES else nullcontext()

    def check(self, num_bytes: int) -> None:
        """Raise OverloadedError if so many more bytes cannot be reserved. Reserves none: they have not come yet."""
        if self._budget.taken_bytes + num_bytes > self._budget.max_bytes:
            raise OverloadedError("bytes of bodies in memory", self._budget.max_bytes, _RETRY_S)

    def grow_to(self, num_bytes: int) -> None:
        """Grow the reservation to so many bytes; raise OverloadedError if there is no room."""
        if num_bytes > self.num_bytes:
            self.check(num_bytes - self.num_bytes)
            self._add(num_bytes - self.num_bytes)

    def shrink_to(self, num_bytes: int) -> None:
        """Release all but so many bytes."""
        self._add(num_bytes - self.num_bytes)

    def grow_past_bound_by(self, num_bytes: int) -> None:
        """Reserve so many more bytes, even beyond the bound: the result of an accepted request is not refused.

        New bodies are refused until there is room again.
        """
        self._add(num_bytes)

    def _add(self, num_bytes: int) -> None:
        self._budget.taken_bytes += num_bytes
        self.num_bytes += num_bytes


async def read_fields(
    request: Request, max_bytes: int, reserved: Reservation, lists: Collection[str] = ()
) -> dict[str, Any]:
    """Read the fields of a JSON, multipart or URL-encoded body: JSON's values, :class:`FormText`, the bytes of files.

    Args:
        reserved: grows with the body; an announced length needs room before anything is read.
        lists: fields that a form may repeat, one value each.

    Raises:
        BodyError: 413 too large, 415 another content type, 400 unreadable or incomplete, 408 too slow.
        OverloadedError: there is no memory for it now.
    """
    kind = _content_type(request.headers)
    if kind == URLENCODED:
        max_bytes = min(max_bytes, MAX_URLENCODED_BYTES)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal():
        if len(announced) > _MAX_DIGITS or int(announced) > max_bytes:
            raise _too_large(kind, max_bytes)
        reserved.check(int(announced))
    chunks = _limit_chunks(kind, request, max_bytes, reserved)
    try:
        async with asyncio.timeout(_UPLOAD_S):
            if kind == MULTIPART:
                return nest_fields(await _read_parts(request.headers, chunks, max_bytes), lists)
            data = bytearray()
            async for chunk in chunks:
                data += chunk
            # In a thread: a large one takes a second.
            if kind == JSON:
                async with reserved.parse_turn():
                    return await run_in_thread(_parse_json, data)
            return nest_fields(await run_in_thread(_parse_urlencoded, data), lists)
    except TimeoutError:
        behind = f"be at most {_MAX_LAG_S:g} s behind {_LEAST_BYTES_PER_S} bytes a second"
        raise BodyError(408, "body_too_slow", f"the body must come within {_UPLOAD_S:g} s, and {behind}") from None
    except ClientDisconnect:
        raise BodyError(400, "body_incomplete", "the connection was closed before the end of the body") from None


def _content_type(headers: Headers) -> str:
    """Return a body's content type; raise BodyError for one that is not supported."""
    content_type, _, parameters = headers.get("content-type", "").partition(";")
    kind = content_type.strip().lower()
    charset = re.search(r"charset\s*=\s*\"?([^\s\";]+)", parameters, re.IGNORECASE)
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8", "us-ascii"):
        message = f"charset must be utf-8 (got {charset[1][:_MAX_SHOWN_CHARS]!r})"
        raise BodyError(415, "wrong_content_type", message)
    if kind not in (JSON, MULTIPART, URLENCODED):
        message = f"content-type must be {JSON}, {MULTIPART} or {URLENCODED} (got {kind[:_MAX_SHOWN_CHARS]!r})"
        raise BodyError(415, "wrong_content_type", message)
    return kind


async def _limit_chunks(
    kind: str, request: Request, max_bytes: int, reserved: Reservation
) -> AsyncGenerator[bytes, None]:
    num_bytes = 0
    left_s = _MAX_LAG_S
    chunks = request.stream()
    while True:
        wait_from_s = time.monotonic()
        async with asyncio.timeout(left_s):
            chunk = await anext(chunks, None)
        waited_s = time.monotonic() - wait_from_s
        if chunk is None:
            return
        num_bytes += len(chunk)
        if num_bytes > max_bytes:
            raise _too_large(kind, max_bytes)
        reserved.grow_to(num_bytes)
        yield chunk
        # Capped: a fast start earns no right to be slow later, when the body holds more memory.
        left_s = min(left_s - waited_s + len(chunk) / _LEAST_BYTES_PER_S, _MAX_LAG_S)


def _too_large(kind: str, max_bytes: int) -> BodyError:
    message = f"the body is larger than the {max_bytes} bytes that are allowed"
    if max_bytes == MAX_URLENCODED_BYTES and kind == URLENCODED:
        message += f" of {URLENCODED}; send {MULTIPART} or {JSON}"
    return BodyError(413, "body_too_large", message)


async def _read_parts(
    headers: Headers, chunks: AsyncGenerator[bytes, None], max_bytes: int
) -> list[tuple[str, FormText | bytes]]:
    """Return the names and values of a multipart form."""
    parser = MultiPartParser(headers, chunks, max_files=_MAX_FILES, max_fields=MAX_FIELDS, max_part_size=max_bytes)
    try:
        form = await parser.parse()
    except (MultiPartException, KeyError) as error:
        raise _form_error(error) from None
    try:
        return [
            (name, await value.read() if isinstance(value, UploadFile) else FormText(value))
            for name, value in form.multi_items()
            # Browsers send an empty part for a file that was not chosen.
            if not isinstance(value, UploadFile) or value.filename or value.size
        ]
    finally:
        await form.close()


def _parse_urlencoded(data: bytearray) -> list[tuple[str, FormText | bytes]]:
    if data.lstrip()[:1] == b"{":  # curl -d declares everything a form
        raise _form_error(f"it looks like JSON, which needs the header content-type: {JSON}")
    try:
        items = parse_qsl(data.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        raise _form_error(f"it has more than the {MAX_FIELDS} fields that are allowed") from None
    return [(name, FormText(value)) for name, value in items]


def _form_error(reason: object) -> BodyError:
    return BodyError(400, "broken_form", f"the form cannot be read: {reason}")


def nest_fields(items: Iterable[tuple[str, FormText | bytes]], lists: Collection[str]) -> dict[str, Any]:
    """Return a form's fields: ``a[]`` makes a list, ``a[b]`` an object. Raise BodyError for one that is given twice."""
    fields: dict[str, Any] = {}
    for written, value in items:
        match = _BRACKETED.fullmatch(written)
        path = [match[1], *match[2][1:-1].split("][")] if match else [written]
        if written in lists:
            path.append("")
        *outer, last = path
        here: Any = fields
        for depth, name in enumerate(outer, start=1):
            kind = list if depth == len(outer) and not last else dict
            here = here.setdefault(name, kind())
            if not isinstance(here, kind):
                raise _duplicate(written)
        if isinstance(here, list):
            here.append(value)
        elif last in here:
            raise _duplicate(written)
        else:
            here[last] = value
    return fields


def _duplicate(written: str) -> BodyError:
    return BodyError(400, "broken_form", f"the field {written[:_MAX_SHOWN_CHARS]!r} is given twice")


def _parse_json(data: bytearray) -> dict[str, Any]:
    try:
        values = read_json(data)
    except ValueError as error:
        raise BodyError(400, "broken_json", f"the body cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise BodyError(400, "broken_json", f"the body must be a JSON object (got a {type(values).__name__})")
    if len(values) > MAX_FIELDS:
        raise BodyError(400, "broken_json", f"the body must have at most {MAX_FIELDS} fields (got {len(values)})")
    return values


def read_json(text: str | bytes | bytearray) -> Any:
    """Parse JSON; raise ValueError if it is broken, too deep or too large, or has a key twice."""
    if not isinstance(text, str):
        text = text.decode(json.detect_encoding(text), "surrogatepass")
    starts = range(0, len(text), LARGE_BYTES)
    if sum(text.count(separator, it, it + LARGE_BYTES) for separator in ",[{:" for it in starts) > _MAX_VALUES:
        raise ValueError(f"it has more than the {_MAX_VALUES} values that are allowed")
    try:
        if len(text) > LARGE_BYTES:
            value = _LargeDecoder().decode(text)
        else:
            value = json.loads(text, object_pairs_hook=_unique_keys)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(_MAX_DEPTH + 1):
        if not level:
            return value
        items = (it for outer in level for it in (outer.values() if isinstance(outer, dict) else outer))
        level = [it for it in items if isinstance(it, list | dict)]
    raise ValueError(_TOO_DEEP)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:_MAX_SHOWN_CHARS]!r} is given twice")
        values[name] = value
    return values


class _LargeDecoder(json.JSONDecoder):
    """Decoder of the same values that lets other threads run meanwhile: json's own keeps Python's lock to its end."""

    def __init__(self) -> None:
        super().__init__(object_pairs_hook=_unique_keys)
        self.parse_string = _parse_string
        self.scan_once = json.scanner.py_make_scanner(self)  # type: ignore[attr-defined]


def _parse_string(text: str, begin: int, strict: bool = True) -> tuple[str, int]:
    """Return the string that begins after a quote, and where it ends; raise as json's ``scanstring``."""
    end = text.find('"', begin)
    is_plain = end - begin > LARGE_BYTES and text.find("\\", begin, end) < 0
    if not is_plain or any(_CONTROL.search(text, it, it + LARGE_BYTES) for it in range(begin, end, LARGE_BYTES)):
        return json.decoder.scanstring(text, begin, strict)  # type: ignore[attr-defined]
    return text[begin:end], end + 1
