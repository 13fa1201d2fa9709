"""A generated file as the answer to the request that waits for it: whole, as it grows, or as JSON beside actions."""

from __future__ import annotations

import asyncio
import base64
import json
import urllib.parse
from collections.abc import AsyncGenerator, Mapping
from typing import Annotated, Any

from pydantic import Field
from starlette.responses import JSONResponse, Response

from deployments.api.body_reader import Reservation
from deployments.api.content import PartsResponse, read_finished, read_live
from deployments.api.exchange import Exchange
from deployments.api_model import ApiModel
from deployments.jobs.video import Actions, Count, JobId, Mode, Seconds
from deployments.media.store import MediaStore
from deployments.messages import FileStarted, Finished

Base64 = Annotated[str, Field(json_schema_extra={"contentEncoding": "base64"})]

_Part = asyncio.Future[bytes | None]
_News = asyncio.Future[FileStarted | Finished]
# Memory for a file and its base64, as a multiple of the file's size.
_SPACE_OF_BASE64 = 7 / 3
# Of one header: proxies and clients accept 8 KiB of all headers together.
_MAX_WARNINGS_CHARS = 6000


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


async def media_answer(exchange: Exchange, reserved: Reservation, media: MediaStore) -> Response:
    """Answer with the submitted request's file, described by headers; if actions were made, with JSON of both."""
    event = await exchange.wait_for_end()
    exchange.cancel()
    if event.actions is None:
        return await file_answer(event, media)
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


async def live_answer(exchange: Exchange, media: MediaStore) -> Response:
    """Answer with the file as it grows, from its first fragment on. A client that leaves stops the request.

    A file that fails before its first part is replaced by that of the next attempt. Later, the connection breaks: a
    file that ended early would look like a short one.
    """
    event: FileStarted | Finished | None = await exchange.wait_for_file()
    while event is not None:
        assert isinstance(event, FileStarted), "a clip has a file"
        media_type = event.media_type
        parts = read_live(media, await asyncio.to_thread(media.require, event.media_id))
        first, news = asyncio.ensure_future(anext(parts, None)), asyncio.ensure_future(exchange.wait_for_file())
        try:
            event = await _wait_for_first(first, news)
        except BaseException:
            await _drop(parts, first, news)
            raise
        if event is not None:
            await _drop(parts, first)

    def end() -> None:
        exchange.cancel()
        news.cancel()

    headers = {"x-video-id": exchange.job_id, "cache-control": "no-store"}
    return PartsResponse(_until_failure(parts, first, news, exchange), headers, media_type, on_end=end)


async def _wait_for_first(first: _Part, news: _News) -> FileStarted | None:
    """Wait for a file's first part; return the file of the next attempt instead, if one begins."""
    await asyncio.wait((first, news), return_when=asyncio.FIRST_COMPLETED)
    if not news.done() and first.exception():
        await asyncio.wait((news,))  # the Director tries again, or says why not
    if news.done() and isinstance(event := news.result(), FileStarted):
        return event
    await first
    return None


async def _until_failure(
    parts: AsyncGenerator[bytes, None], part: _Part, news: _News, exchange: Exchange
) -> AsyncGenerator[bytes, None]:
    """Yield parts to the end, and raise as soon as the Director reports a failure: the file may show it late."""

    async def wait_for_end() -> None:
        if not isinstance(await news, Finished):
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
        await _drop(parts, part, ending)


async def _drop(parts: AsyncGenerator[bytes, None], *waiting: asyncio.Future[Any]) -> None:
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await parts.aclose()


async def file_answer(event: Finished, media: MediaStore) -> Response:
    """Answer with a finished file, read as it is sent."""
    record = await asyncio.to_thread(media.require, event.media_id)
    headers = {"content-length": str(event.num_bytes), **_result_headers(event)}
    return PartsResponse(read_finished(media, record), headers, event.media_type)


def to_base64(data: bytes) -> str:
    """Return the base64 of a file."""
    return base64.b64encode(data).decode()


async def read_file(event: Finished, reserved: Reservation, media: MediaStore) -> bytes:
    """Read a finished file in one piece; reserve memory for it and its base64."""
    reserved.need(int(event.num_bytes * _SPACE_OF_BASE64))
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


def round_seconds(stage_seconds: dict[str, float]) -> dict[str, float]:
    """Round stage -> seconds for an answer."""
    return {name: round(seconds, 4) for name, seconds in stage_seconds.items()}


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
