"""Send a job's content over HTTP: its file (whole, a range, or as it grows), pictures and sound of it, or its actions.

Readers poll a growing file in threads: any number of them, each at its own pace, unknown to the writer.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import re
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, BinaryIO

from fastapi import Query
from starlette.responses import Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from cosmos3_core.errors import MediaError
from deployments.api.call import CurrentCall, VideoId, make_router
from deployments.api.openapi import conditional_headers, content_answers, responses
from deployments.errors import ApiError
from deployments.media.layout import DONE, FAILED, LIVE_KEPT_S, MediaRecord
from deployments.media.store import MediaStore
from deployments.media.variants import CONTENT_VARIANTS, VIDEO
from deployments.observability.metrics import SENT_BYTES, metrics
from deployments.threads import run_in_thread

_CONTENT = "/v1/videos/{video_id}/content"
_ERRORS = (404, 409, 410, 416)
_PART_BYTES = 256 * 1024
# Between two reads of a growing file; a reader lags by as much.
_POLL_S = 0.05
# The same where every look asks the archive.
_ARCHIVE_POLL_S = 1.0
# One range. Other units and several ranges get the whole file, as RFC 9110 14.2 allows; no file needs more digits.
_RANGE = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_Variant = Annotated[
    str,
    Query(
        description="the file itself (an image or sound where that was asked for), pictures or the sound of it, or "
        "generated actions",
        json_schema_extra={"enum": list(CONTENT_VARIANTS)},
    ),
]

router = make_router()


@router.get(
    _CONTENT, responses=responses(content_answers(has_body=True), *_ERRORS), openapi_extra=conditional_headers()
)
async def get_video_content(video_id: VideoId, call: CurrentCall, variant: _Variant = VIDEO) -> Response:
    """Send the content of a job; the file itself from its first fragment on, and as it grows."""
    jobs, request = call.service.jobs, call.request
    content = await jobs.find_content(await jobs.get(video_id, call.caller.owner), variant)
    if isinstance(content, MediaRecord):
        return await answer_with_content(jobs.media, content, request.method, request.headers)
    etag = f'"{hashlib.sha256(content).hexdigest()}"'
    if Conditions.of(request.method, request.headers).is_known(etag):
        return Response(status_code=304, headers={"etag": etag})
    return Response(content, headers={"etag": etag}, media_type="application/json")


@router.head(
    _CONTENT,
    responses=responses(content_answers(has_body=False), *_ERRORS),
    openapi_extra=conditional_headers(),
    response_class=Response,
)
async def head_video_content(video_id: VideoId, call: CurrentCall, variant: _Variant = VIDEO) -> Response:
    """Send the headers that the content of a job has."""
    return await get_video_content(video_id, call, variant)


@dataclass(frozen=True)
class Conditions:
    """Conditions and range of a request's headers, RFC 9110 13.1.2, 13.1.5 and 14.2.

    Attributes:
        known_etags: of files that the client has.
        if_range: ETag of the file that the range is for; None: of any.
        first, last: bytes of the range as they are written; both "" for the whole.
    """

    is_head: bool
    known_etags: frozenset[str]
    if_range: str | None
    first: str
    last: str

    @classmethod
    def of(cls, method: str, headers: Mapping[str, str]) -> Conditions:
        """Read the headers, by lower-case names, of a GET or HEAD."""
        known = frozenset(tag.strip().removeprefix("W/") for tag in headers.get("if-none-match", "").split(","))
        match = None if method == "HEAD" else _RANGE.fullmatch(headers.get("range", ""))
        first, last = (match[1], match[2]) if match else ("", "")
        if first and last and int(last) < int(first):
            first = last = ""  # invalid, and ignored as the RFC says
        return cls(method == "HEAD", known, headers.get("if-range"), first, last)

    def is_known(self, etag: str) -> bool:
        """Return whether the client has this file."""
        return bool(self.known_etags & {etag, "*"})

    def span(self, num_bytes: int, etag: str) -> range | None:
        """Return the range of a file to send, None for all of it; raise ApiError 416 if it is outside of the file."""
        if not (self.first or self.last) or self.if_range not in (None, etag):
            return None
        if self.first:
            start, end = int(self.first), min(int(self.last) + 1 if self.last else num_bytes, num_bytes)
        else:
            start, end = max(num_bytes - int(self.last), 0), num_bytes
        if start >= end:
            message = f"the range is outside of the {num_bytes} bytes that there are"
            raise ApiError(416, "range_not_satisfiable", message, {"content-range": f"bytes */{num_bytes}"})
        return range(start, end)


async def answer_with_content(
    store: MediaStore, record: MediaRecord, method: str, headers: Mapping[str, str]
) -> Response:
    """Answer with a record's file, under the conditions of RFC 9110 and with its ranges, one at a time.

    A finished file is sent with its length. A growing one is sent without, part by part to its end; ``Range:
    bytes=a-b`` gets what exists of that range, if anything does. ApiError: 416, the range is outside of the file; 409,
    the file grows where this process cannot read it.
    """
    answer = _answer_finished if record.state == DONE else _answer_live
    return await asyncio.to_thread(answer, store, record, Conditions.of(method, headers))


def _answer_finished(store: MediaStore, record: MediaRecord, conditions: Conditions) -> Response:
    headers = {"accept-ranges": "bytes", "etag": record.etag}
    if conditions.is_known(record.etag):
        return Response(status_code=304, headers=headers)
    if span := conditions.span(record.num_bytes, record.etag):
        return _answer_part(read_finished(store, record, span), span, str(record.num_bytes), record, headers)
    headers["content-length"] = str(record.num_bytes)
    if conditions.is_head:
        return Response(headers=headers, media_type=record.media_type)
    return FileResponse(read_finished(store, record), headers, record.media_type)


def _answer_live(store: MediaStore, record: MediaRecord, conditions: Conditions) -> Response:
    if not record.live_name:
        raise ApiError.not_ready("this file cannot be read before it is finished")
    # A cache would take what it has stored so far for the whole.
    headers = {"etag": record.live_etag, "cache-control": "no-store"}
    path = store.live_path(record)
    num_bytes = path.stat().st_size if path.exists() else 0
    # A range of which nothing exists yet may exist later: it is not refused but ignored, as RFC 9110 14.2 allows.
    is_there = bool(conditions.first and conditions.last) and int(conditions.first) < num_bytes
    if is_there and (span := conditions.span(num_bytes, record.live_etag)):
        parts = _read_span(lambda: path.open("rb", buffering=0), span)
        return _answer_part(parts, span, "*", record, headers)
    # To HEAD, a plain answer without a body would declare a length of 0.
    return FileResponse(_no_parts() if conditions.is_head else read_live(store, record), headers, record.media_type)


async def _no_parts() -> AsyncGenerator[bytes, None]:
    return
    yield


def _answer_part(
    parts: AsyncGenerator[bytes, None], span: range, total: str, record: MediaRecord, headers: dict[str, str]
) -> Response:
    content_range = f"bytes {span.start}-{span.stop - 1}/{total}"
    headers = {**headers, "content-range": content_range, "content-length": str(len(span))}
    return FileResponse(parts, headers, record.media_type, 206)


class PartsResponse(StreamingResponse):
    """An answer in parts, whose generator is closed however the answer ends.

    An error in ``parts`` breaks the connection, so that no reader takes a part for the whole. ``on_end`` is called at
    the end, even if no part was sent.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        headers: Mapping[str, str],
        media_type: str,
        status_code: int = 200,
        on_end: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(parts, status_code, headers, media_type)
        self._parts, self._on_end = parts, on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()
            await self._parts.aclose()


class FileResponse(PartsResponse):
    """A file, or a range of it, in parts; the metrics count what the server has sent."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count(message: Message) -> None:
            await send(message)
            metrics().record(SENT_BYTES, len(message.get("body", b"")))

        await super().__call__(scope, receive, count)


def read_finished(store: MediaStore, record: MediaRecord, span: range | None = None) -> AsyncGenerator[bytes, None]:
    """Yield a finished file or a span of it, to its end even if the file is removed meanwhile.

    While iterating, MediaError: the file is shorter than its record says.
    """
    return _read_span(lambda: store.open(record), span or range(record.num_bytes))


async def _read_span(open_file: Callable[[], BinaryIO], span: range) -> AsyncGenerator[bytes, None]:
    """Yield a span of a file, which is opened once, so that removing it does not cut off its readers."""
    start = span.start
    with contextlib.ExitStack() as stack:
        # A cancellation waits for the reading thread: its file must not be closed under it.
        file = await run_in_thread(lambda: stack.enter_context(open_file()))
        while start < span.stop:
            part = await run_in_thread(_read_at, file, start, min(span.stop - start, _PART_BYTES))
            if not part:
                raise MediaError(f"a file has {start} bytes; {span.stop} are to be read")
            start += len(part)
            yield part


async def read_live(store: MediaStore, record: MediaRecord) -> AsyncGenerator[bytes, None]:
    """Yield a growing file, each part as it appears, until the clip is done.

    A file that grows in another node's directory is sent once it is finished. While iterating, MediaError: the clip
    failed, was removed, or has not grown for as long as the store keeps files.
    """
    num_bytes, grown_s = 0, time.monotonic()
    touched_s = grown_s
    if not record.live_name:
        while (record := await asyncio.to_thread(_find_unfailed, store, record.media_id)).state != DONE:
            if time.monotonic() - grown_s > store.keep_s:
                raise MediaError(f"{record.media_id} is not done after {store.keep_s:g} s; its writer is gone")
            await asyncio.sleep(_ARCHIVE_POLL_S)
        async with contextlib.aclosing(read_finished(store, record)) as parts:
            async for whole_part in parts:
                yield whole_part
        return
    while (part := await asyncio.to_thread(_read_live_part, store, record.media_id, num_bytes)) is not None:
        if time.monotonic() - touched_s > LIVE_KEPT_S / 2:  # of a finished clip it would be removed
            touched_s = time.monotonic()
            await asyncio.to_thread(store.objects.touch, f"{record.media_id}/{record.live_name}")
        if part:
            yield part
            num_bytes, grown_s = num_bytes + len(part), time.monotonic()
        elif time.monotonic() - grown_s > store.keep_s:
            raise MediaError(f"{record.media_id} has not grown for {store.keep_s:g} s; its writer is gone")
        else:
            await asyncio.sleep(_POLL_S)


def _find_unfailed(store: MediaStore, media_id: str) -> MediaRecord:
    """Return the record of a clip that is done or still being written."""
    record = store.find(media_id)
    if record is None:
        raise MediaError(f"{media_id} was removed while it was read")
    if record.state == FAILED:
        raise MediaError(f"{media_id} failed while it was read: {record.reason}")
    return record


def _read_live_part(store: MediaStore, media_id: str, start: int) -> bytes | None:
    """Read a growing file from a position on: b"" while there is nothing, None at its end."""
    record = _find_unfailed(store, media_id)  # before the read: a file that is done by now grows no more
    if not record.live_name:
        raise MediaError(f"{media_id} was removed from the directory while it was read")
    try:
        # Opened for every part: NFS need not show a file open on this node growing on another.
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
