"""Files of the media store as HTTP answers: whole, a range of them, or as they grow.

Readers take what is there and wait for more by looking again, in threads beside the event loop: any number of them may
read a file, each as fast as it likes, and its writer knows of none.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import BinaryIO

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cosmos3_core.errors import MediaError
from deployments.errors import ApiError
from deployments.media.layout import DONE, FAILED, MediaRecord
from deployments.media.store import MediaStore
from deployments.threads import run_in_thread

_PART_BYTES = 256 * 1024
# Between two looks at a file that grows: the time that a reader is behind.
_POLL_S = 0.05
# The same where a look is a question to the archive.
_ARCHIVE_POLL_S = 1.0
_RETRY_AFTER_S = 1
# One range. What has other units or more ranges may be answered with the whole, RFC 9110 14.2; positions of more digits
# than these are no file's.
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")


@dataclass(frozen=True)
class Span:
    """Bytes of a file, from ``start`` up to ``end``."""

    start: int
    end: int


class PartsResponse(StreamingResponse):
    """A file in parts, which are closed however it ends.

    Args:
        parts: of the file; what they raise breaks the connection, so that no reader takes a part for the whole.
        ended: called at the end as well, whether a part was sent or not.
        status_code, headers, media_type: of the answer.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        media_type: str,
        status_code: int = 200,
        ended: Callable[[], None] = lambda: None,
    ) -> None:
        super().__init__(parts, status_code, headers, media_type)
        self._parts, self._ended = parts, ended

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
            await self._parts.aclose()


async def file_answer(store: MediaStore, record: MediaRecord, method: str, headers: Mapping[str, str]) -> Response:
    """Answer with a clip by its record, as RFC 9110 has it for conditions and ranges; of ranges one at a time.

    A finished file is given by its length, with ``If-None-Match``, ``Range`` and ``If-Range``. One that is still made
    is given from its start, without length, part by part as it grows, and to its end even when the finished one is
    there by then; ``Range: bytes=a-b`` gives of it what is there, if there is any of it.

    Args:
        store: where it is.
        record: of the clip, as it is now.
        method: GET or HEAD.
        headers: of the request, by lower-case names.

    Raises:
        ApiError: 416, nothing of the range is there; 409, the file grows where this process cannot read it.
    """
    answer = _finished_answer if record.state == DONE else _live_answer
    return await asyncio.to_thread(answer, store, record, Conditions(method, headers))


def finished_parts(store: MediaStore, record: MediaRecord, span: Span | None = None) -> AsyncGenerator[bytes, None]:
    """Read a finished file as it is taken; to its end, even if the directory loses it after the first part.

    Args:
        store: where it is.
        record: of the clip.
        span: which bytes; None for all.

    Raises, while iterating:
        MediaError: it is not whole.
        OSError: it cannot be read.
    """
    return _parts(lambda: store.open(record), span or Span(0, record.num_bytes))


async def live_parts(store: MediaStore, record: MediaRecord) -> AsyncGenerator[bytes, None]:
    """Read the file that grows, each part as it appears, until the clip is done.

    Where it grows out of sight, in another node's directory, it is the finished file, when that is there.

    Args:
        store: where it is.
        record: of a clip that has such a file.

    Raises, while iterating:
        MediaError: the clip failed, was removed, or has not grown for as long as the store keeps files.
        OSError: it cannot be read.
    """
    num_bytes, grown_s = 0, time.monotonic()
    if not record.live_name:
        finished = await _finished(store, record.media_id)
        async with contextlib.aclosing(finished_parts(store, finished)) as parts:
            async for whole_part in parts:
                yield whole_part
        return
    while (part := await asyncio.to_thread(_live_part, store, record.media_id, num_bytes)) is not None:
        if part:
            yield part
            num_bytes, grown_s = num_bytes + len(part), time.monotonic()
        elif time.monotonic() - grown_s > store.keep_s:
            raise MediaError(f"{record.media_id} has not grown for {store.keep_s:g} s; its writer is gone")
        else:
            await asyncio.sleep(_POLL_S)


async def _finished(store: MediaStore, media_id: str) -> MediaRecord:
    """Wait until a clip is done."""
    asked_s = time.monotonic()
    while (record := await asyncio.to_thread(_going_on, store, media_id)).state != DONE:
        if time.monotonic() - asked_s > store.keep_s:
            raise MediaError(f"{media_id} is not done after {store.keep_s:g} s; its writer is gone")
        await asyncio.sleep(_ARCHIVE_POLL_S)
    return record


def _going_on(store: MediaStore, media_id: str) -> MediaRecord:
    """Return the record of a clip that is done or still being written."""
    record = store.find(media_id)
    if record is None:
        raise MediaError(f"{media_id} was removed while it was read")
    if record.state == FAILED:
        raise MediaError(f"{media_id} failed while it was read: {record.reason}")
    return record


def _live_part(store: MediaStore, media_id: str, start: int) -> bytes | None:
    """Read a growing file from a position on: b"" while there is nothing, None at its end."""
    record = _going_on(store, media_id)  # first: what is done by now grows no more
    if not record.live_name:
        raise MediaError(f"{media_id} was removed from the directory while it was read")
    try:
        # Opened for every part: a file that is open on one node need not be seen growing on another, NFS says.
        with store.live_path(record).open("rb", buffering=0) as file:
            part = _read_at(file, start, _PART_BYTES)
    except FileNotFoundError:
        if record.state == DONE:
            raise
        return b""  # its writer has only just begun
    return None if record.state == DONE and not part else part


def _read_at(file: BinaryIO, start: int, num_bytes: int) -> bytes:
    file.seek(start)
    return file.read(num_bytes)


def _finished_answer(store: MediaStore, record: MediaRecord, asked: Conditions) -> Response:
    headers = {"accept-ranges": "bytes", "etag": record.etag}
    if asked.knows(record.etag):
        return Response(status_code=304, headers=headers)
    if span := asked.span(record.num_bytes, record.etag):
        return _part_answer(finished_parts(store, record, span), span, str(record.num_bytes), record, headers)
    headers["content-length"] = str(record.num_bytes)
    if asked.is_head:
        return Response(headers=headers, media_type=record.media_type)
    return PartsResponse(finished_parts(store, record), headers, record.media_type)


def _live_answer(store: MediaStore, record: MediaRecord, asked: Conditions) -> Response:
    if not record.live_name:
        message = "this file cannot be read before it is finished"
        raise ApiError(409, "media_not_ready", message, {"retry-after": str(_RETRY_AFTER_S)})
    # What a cache had stored of it would be taken for the whole.
    headers = {"etag": record.live_etag, "cache-control": "no-store"}
    path = store.live_path(record)
    num_bytes = path.stat().st_size if path.exists() else 0
    # A range of which nothing is there yet cannot be refused for good. It is ignored, as RFC 9110 14.2 allows.
    if asked.has_both_ends and asked.first < num_bytes and (span := asked.span(num_bytes, record.live_etag)):
        opened = _parts(lambda: path.open("rb", buffering=0), span)
        return _part_answer(opened, span, "*", record, headers)
    # A plain answer without a body would say that the file has a length, of 0.
    parts = _no_parts() if asked.is_head else live_parts(store, record)
    return PartsResponse(parts, headers, record.media_type)


async def _no_parts() -> AsyncGenerator[bytes, None]:
    return
    yield


def _part_answer(
    parts: AsyncGenerator[bytes, None], span: Span, total: str, record: MediaRecord, headers: dict[str, str]
) -> Response:
    headers = headers | {
        "content-range": f"bytes {span.start}-{span.end - 1}/{total}",
        "content-length": str(span.end - span.start),
    }
    return PartsResponse(parts, headers, record.media_type, 206)


async def _parts(open_file: Callable[[], BinaryIO], span: Span) -> AsyncGenerator[bytes, None]:
    """Read a part of a file that exists. It is opened once, so that removing it does not cut off its readers."""
    start = span.start
    with contextlib.ExitStack() as opened:
        # Nobody leaves a thread that has the file: it would be closed under its hands.
        file = await run_in_thread(lambda: opened.enter_context(open_file()))
        while start < span.end:
            part = await run_in_thread(_read_at, file, start, min(span.end - start, _PART_BYTES))
            if not part:
                raise MediaError(f"a file has {start} bytes; {span.end} are to be read")
            start += len(part)
            yield part


class Conditions:
    """Conditions and range of a request's headers, RFC 9110 13.1.2, 13.1.5 and 14.2.

    Args:
        method: GET or HEAD.
        headers: by lower-case names.
    """

    def __init__(self, method: str, headers: Mapping[str, str]) -> None:
        self.is_head = method == "HEAD"
        self._known = headers.get("if-none-match", "")
        self._if_range = headers.get("if-range")
        match = None if self.is_head else _RANGE.fullmatch(headers.get("range", ""))
        self._first, self._last = (match[1], match[2]) if match else ("", "")
        if self._first and self._last and int(self._last) < int(self._first):
            self._first = self._last = ""  # no range, says the RFC

    @property
    def has_both_ends(self) -> bool:
        """Return whether the range does not depend on the file's end."""
        return bool(self._first and self._last)

    @property
    def first(self) -> int:
        """The first byte of the range."""
        return int(self._first)

    def knows(self, etag: str) -> bool:
        """Return whether the client has this file."""
        known = {tag.strip().removeprefix("W/") for tag in self._known.split(",")}
        return bool(known & {etag, "*"})

    def span(self, num_bytes: int, etag: str) -> Span | None:
        """Return the range to send of a file; None for all of it.

        Raises:
            ApiError: 416, nothing of it is there.
        """
        if not (self._first or self._last) or self._if_range not in (None, etag):
            return None
        if self._first:
            start, end = int(self._first), min(int(self._last) + 1 if self._last else num_bytes, num_bytes)
        else:
            start, end = max(num_bytes - int(self._last), 0), num_bytes
        if start >= end:
            message = f"the range is outside of the {num_bytes} bytes that there are"
            raise ApiError(416, "range_not_satisfiable", message, {"content-range": f"bytes */{num_bytes}"})
        return Span(start, end)
