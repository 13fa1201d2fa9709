"""Exchange of one waiting HTTP request with the Director, and its file as the answer.

The file is sent whole, as it grows, or in JSON beside actions.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
import urllib.parse
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, TypeVar

from pydantic import Field
from starlette.responses import JSONResponse, Response

from cluster.errors import DeadlineExceeded, OverloadedError, StageFailed
from cosmos3_core.request import GenerationRequest
from deployments.api.body_reader import Reservation
from deployments.api.content import FileResponse, read_finished, read_live
from deployments.api_model import ApiModel
from deployments.failures import translate_error
from deployments.jobs.job import SubmitOptions
from deployments.jobs.video import Actions, Count, JobId, Mode, Seconds
from deployments.media.store import MediaStore
from deployments.messages import Accepted, FileStarted, Finished, round_seconds

# Beyond the request's own deadline, which the Director enforces.
_SLACK_S = 15.0
# For the Director to accept or refuse a request: it does so at once, and is back within seconds if it died. A clip is
# probed first, and may wait for others.
_ACCEPT_S = 60.0
_ACCEPT_CLIP_S = 600.0
# Between two tries to enter a full queue.
_LONGEST_PAUSE_S = 5.0
# Memory for a file and its base64, as a multiple of the file's size.
_SPACE_OF_BASE64 = 7 / 3
# Of one header: proxies and clients accept 8 KiB of all headers together.
_MAX_WARNINGS_CHARS = 6000

Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]

T = TypeVar("T")
_Part = asyncio.Future[bytes | None]
_FileEvent = asyncio.Future[FileStarted | Finished]


class Exchange:
    """The Director's work for one HTTP request; one generation after the other.

    Attributes:
        request_id: the caller's, or made up.
        job_id: of the request that the Director accepted last; "" before.
    """

    def __init__(self, director: Any, request_id: str, timeout_s: float) -> None:
        self.request_id, self.job_id = request_id, ""
        self._director = director
        self._deadline_s = time.monotonic() + timeout_s
        self._events: Any = None

    @classmethod
    @asynccontextmanager
    async def open(cls, director: Any, request_id: str | None, timeout_s: float) -> AsyncIterator[Exchange]:
        """Open an exchange; an error in the ``with`` block stops the stages. A file may still grow after the block.

        The Director enforces ``timeout_s``; here DeadlineExceeded only ends the wait for a Director that is gone.
        """
        exchange = cls(director, request_id or uuid.uuid4().hex, timeout_s)
        try:
            async with asyncio.timeout(timeout_s + _SLACK_S):
                yield exchange
        except BaseException as error:
            exchange.cancel()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("director", timeout_s) from None
            raise

    async def submit(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float | None = None) -> None:
        """Submit a request, with a deadline of its own or the app's; raise as :func:`await_acceptance`."""
        self.cancel()  # releases the stream of the previous request, which has ended
        self._events = self._director.stream.remote(request, options, timeout_s)
        has_clip = request.video is not None
        accepted: Accepted = await await_acceptance(anext(self._events), self.cancel, has_clip=has_clip)
        self.job_id = accepted.job_id

    async def wait_for_file(self) -> FileStarted | Finished:
        """Wait until the request's file grows, or for its end if it has none; raise what the Director raised."""
        async for event in self._events:
            if isinstance(event, FileStarted | Finished):
                return event
        raise RuntimeError("the Director's stream ended before the request did")

    async def wait_for_end(self) -> Finished:
        """Wait for the request's end, when the file is whole; raise what the Director raised."""
        while not isinstance(event := await self.wait_for_file(), Finished):
            pass
        return event

    async def submit_next(self, request: GenerationRequest, options: SubmitOptions) -> Finished:
        """Submit a further request and follow it to its end; wait while the queue is full."""
        while True:
            try:
                await self.submit(request, options, max(self._deadline_s - time.monotonic(), 0.0))
                return await self.wait_for_end()
            except Exception as error:  # the wrapped error decides
                self.cancel()
                reason = translate_error(error, "director")
                if not isinstance(reason, OverloadedError):
                    raise
            await asyncio.sleep(min(reason.retry_after_s, _LONGEST_PAUSE_S))

    def cancel(self) -> None:
        """Stop the stages: a stream that is only dropped runs on."""
        if self._events is not None:
            self._events.cancel()
            self._events = None


async def await_acceptance(answer: Awaitable[T], cancel: Callable[[], object], *, has_clip: bool) -> T:
    """Return the Director's first answer to a request.

    Raises:
        StageFailed: it does not come in time; the call was cancelled.
        Exception: why the Director refuses the request.
    """
    limit_s = _ACCEPT_CLIP_S if has_clip else _ACCEPT_S
    try:
        async with asyncio.timeout(limit_s):
            return await answer
    except TimeoutError:
        cancel()
        raise StageFailed("director", 1, f"no word of the request within {limit_s:g} s") from None


class GeneratedFile(ApiModel):
    """A file inside of an answer."""

    media_type: str
    b64_json: Base64


class ActionsAnswer(ApiModel):
    """Actions that were made while the client waited, and the clip that goes with them."""

    id: JobId
    mode: Mode
    actions: Actions
    video: GeneratedFile | None
    seed: Count
    fps: Seconds
    num_frames: Count
    height: Count
    width: Count
    frames_sha256: str
    negative_prompt_origin: str
    notes: tuple[str, ...]
    stage_durations: Mapping[str, Seconds]


async def answer_when_done(exchange: Exchange, reserved: Reservation, media: MediaStore) -> Response:
    """Answer with the submitted request's file, described by headers; if actions were made, with JSON of both."""
    event = await exchange.wait_for_end()
    exchange.cancel()
    if event.actions is None:
        return await answer_with_file(event, media)
    video = None
    if event.num_bytes:
        video = GeneratedFile(media_type=event.media_type, b64_json=to_base64(await read_file(event, reserved, media)))
    answer = ActionsAnswer(
        id=event.job_id,
        mode=event.mode,
        actions=event.actions.as_json(),
        video=video,
        seed=event.seed,
        fps=event.fps,
        num_frames=event.num_frames,
        height=event.height,
        width=event.width,
        frames_sha256=event.frames_sha256,
        negative_prompt_origin=event.negative_origin,
        notes=tuple(event.notes),
        stage_durations=round_seconds(event.stage_seconds),
    )
    return JSONResponse(answer.as_json(), headers=_result_headers(event))


async def answer_while_growing(exchange: Exchange, media: MediaStore) -> Response:
    """Answer with the file as it grows, from its first fragment on. A client that leaves stops the request.

    A file that fails before its first part is replaced by that of the next attempt. Later, the connection breaks: a
    file that ended early would look like a short one.
    """
    event: FileStarted | Finished | None = await exchange.wait_for_file()
    while event is not None:
        assert isinstance(event, FileStarted), "a clip has a file"
        media_type = event.media_type
        parts = read_live(media, await asyncio.to_thread(media.require, event.media_id))
        first, coming = asyncio.ensure_future(anext(parts, None)), asyncio.ensure_future(exchange.wait_for_file())
        try:
            event = await _wait_for_first(first, coming)
        except BaseException:
            await _close(parts, first, coming)
            raise
        if event is not None:
            await _close(parts, first)

    def end() -> None:
        exchange.cancel()
        coming.cancel()

    headers = {"x-video-id": exchange.job_id, "cache-control": "no-store"}
    return FileResponse(_yield_until_failure(parts, first, coming, exchange), headers, media_type, on_end=end)


async def _wait_for_first(first: _Part, coming: _FileEvent) -> FileStarted | None:
    """Wait for a file's first part; return the file of the next attempt instead, if one begins."""
    await asyncio.wait((first, coming), return_when=asyncio.FIRST_COMPLETED)
    if not coming.done() and first.exception():
        await asyncio.wait((coming,))  # the Director tries again, or says why not
    if coming.done() and isinstance(event := coming.result(), FileStarted):
        return event
    await first
    return None


async def _yield_until_failure(
    parts: AsyncGenerator[bytes, None], part: _Part, coming: _FileEvent, exchange: Exchange
) -> AsyncGenerator[bytes, None]:
    """Yield parts to the end, and raise as soon as the Director reports a failure: the file may show it late."""

    async def wait_for_end() -> None:
        if not isinstance(await coming, Finished):
            await exchange.wait_for_end()

    ending = asyncio.ensure_future(wait_for_end())
    try:
        while True:
            await asyncio.wait((part, ending), return_when=asyncio.FIRST_COMPLETED)
            if ending.done():
                ending.result()
            if (data := await part) is None:
                break
            part = asyncio.ensure_future(anext(parts, None))
            yield data
        await ending
    finally:
        await _close(parts, part, ending)


async def _close(parts: AsyncGenerator[bytes, None], *waiting: asyncio.Future[Any]) -> None:
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await parts.aclose()


async def answer_with_file(event: Finished, media: MediaStore) -> Response:
    """Answer with a finished file, read as it is sent."""
    record = await asyncio.to_thread(media.require, event.media_id)
    headers = {"content-length": str(event.num_bytes), **_result_headers(event)}
    return FileResponse(read_finished(media, record), headers, event.media_type)


def to_base64(data: bytes) -> str:
    """Return the base64 of a file."""
    return base64.b64encode(data).decode()


async def read_file(event: Finished, reserved: Reservation, media: MediaStore) -> bytes:
    """Read a finished file in one piece; reserve memory for it and its base64."""
    reserved.grow_past_bound_by(int(event.num_bytes * _SPACE_OF_BASE64))
    return await asyncio.to_thread(lambda: media.read(media.require(event.media_id)))


def _result_headers(event: Finished) -> dict[str, str]:
    return {
        "x-video-id": event.job_id,
        "x-mode": event.mode,
        "x-seed": str(event.seed),
        "x-frames-sha256": event.frames_sha256,
        "x-negative-prompt": event.negative_origin,
        "x-inference-time-s": f"{event.stage_seconds['total']:.3f}",
        "x-stage-durations": json.dumps(round_seconds(event.stage_seconds)),
        "x-notes": json.dumps(event.notes),
    }


def service_headers(model_name: str, warnings: tuple[str, ...]) -> dict[str, str]:
    """Return the model and the warnings as headers in printable ASCII; warnings that do not fit are counted."""
    shown: list[str] = []
    num_chars = 0
    for warning in warnings:
        num_chars += len(json.dumps(warning)) + len(", ")
        if num_chars > _MAX_WARNINGS_CHARS:
            shown.append(f"and {len(warnings) - len(shown)} more, which the job's warnings name")
            break
        shown.append(warning)
    return {"x-model": urllib.parse.quote(model_name, safe="/:@+ ()"), "x-warnings": json.dumps(shown)}
