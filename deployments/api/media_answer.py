"""Generated media as HTTP answers: the file itself, or JSON with what no file holds."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import time
import urllib.parse
import zipfile
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import JSONResponse, Response

from cosmos3_core.media.file_kinds import SUFFIXES
from deployments.api.answers import ActionsAnswer, GeneratedFile, Image, ImageMetrics, Images
from deployments.api.bodies import ParsedBody
from deployments.api.content import PartsResponse, finished_parts, live_parts
from deployments.api.exchange import Exchange
from deployments.api.fields import B64_JSON, ImageBody
from deployments.api.memory_budget import Reservation
from deployments.jobs.job import SubmitOptions
from deployments.media.store import MediaStore
from deployments.messages import FileStarted, Finished

_Part = asyncio.Future[bytes | None]
_News = asyncio.Future[FileStarted | Finished]
# Of a file in base64, in bytes of the file; and the file beside it.
_SPACE_OF_BASE64 = 7 / 3
_NO_REPLAY = "Idempotency-Key is without effect: the answer is the file itself"
# Of a header: proxies and clients take 8 KiB of all headers together.
_MAX_WARNINGS_CHARS = 6000


async def media_answer(exchange: Exchange, held: Reservation, media: MediaStore) -> Response:
    """Answer with the file, described by headers; with generated actions, with JSON of both.

    Args:
        exchange: the Director has its request.
        held: room for a file that has to be in memory.
        media: where files are.
    """
    event = await exchange.finished()
    exchange.cancel()
    if event.actions is None:
        return await _file(event, media)
    video = None
    if event.num_bytes:
        data = await _whole(event, held, media)
        video = GeneratedFile(media_type=event.media_type, b64_json=base64.b64encode(data).decode())
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
        stage_durations=_rounded(event.stage_seconds),
    )
    headers = {name: value for name, value in _headers(event).items() if name != "content-length"}
    return JSONResponse(answer.as_json(), headers=headers)


async def live_answer(exchange: Exchange, media: MediaStore) -> Response:
    """Answer with the file as it grows, from its first fragment on. Leaving it stops the request.

    Instead of a file that fails before there is anything of it, the answer is the one that is made next. Later, the
    connection breaks: a file that ended early would look like a short one.

    Args:
        exchange: the Director has its request, which makes a clip.
        media: where files are.
    """
    event: FileStarted | Finished | None = await exchange.started()
    while event is not None:
        assert isinstance(event, FileStarted), "a clip has a file"
        started = event
        parts = live_parts(media, await asyncio.to_thread(media.expect, started.media_id))
        first, news = asyncio.ensure_future(anext(parts, None)), asyncio.ensure_future(exchange.started())
        try:
            event = await _made_instead(first, news)
        except BaseException:
            await _drop(parts, first, news)
            raise
        if event is not None:
            await _drop(parts, first)

    def end() -> None:
        exchange.cancel()
        news.cancel()

    headers = {"x-video-id": exchange.job_id, "cache-control": "no-store"}
    return PartsResponse(_until_failed(parts, first, news, exchange), headers, started.media_type, ended=end)


async def _made_instead(first: _Part, news: _News) -> FileStarted | None:
    """Wait for a file's first part. None: it has come; else the file that is made instead."""
    await asyncio.wait((first, news), return_when=asyncio.FIRST_COMPLETED)
    if not news.done() and first.exception():
        await asyncio.wait((news,))  # the Director tries again, or says why not
    if news.done() and isinstance(event := news.result(), FileStarted):
        return event
    await first
    return None


async def _until_failed(
    parts: AsyncGenerator[bytes, None], part: _Part, news: _News, exchange: Exchange
) -> AsyncGenerator[bytes, None]:
    """Yield the parts while their request has not failed, which its file may show much later.

    Args:
        parts: those after the next.
        part: the next.
        news: what the Director says next.
        exchange: of the request.
    """
    ending = asyncio.ensure_future(_end(news, exchange))
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


async def _end(news: _News, exchange: Exchange) -> None:
    if not isinstance(await news, Finished):
        await exchange.finished()


async def _drop(parts: AsyncGenerator[bytes, None], *waiting: asyncio.Future[Any]) -> None:
    for future in waiting:
        future.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    await parts.aclose()


async def images_answer(
    exchange: Exchange, body: ParsedBody[ImageBody], options: SubmitOptions, held: Reservation, media: MediaStore
) -> Response:
    """Answer with images, made one after the other: as JSON, as the file, or as a zip of several.

    Args:
        exchange: the Director has the first image's request.
        body: what was asked for.
        asked: how.
        held: room for the images.
        media: where files are.
    """
    is_json, num_images = body.fields.response_format == B64_JSON, len(body.requests)
    event = await exchange.finished()
    if not is_json and num_images == 1:
        exchange.cancel()
        return await _file(event, media)
    made: list[tuple[Finished, bytes]] = []
    for request in body.requests:
        if made:
            event = await exchange.asked_again(request, options)
        made.append((event, await _whole(event, held, media)))
    exchange.cancel()
    stage_seconds: dict[str, float] = {}
    for event, _ in made:
        for stage, seconds in event.stage_seconds.items():
            stage_seconds[stage] = stage_seconds.get(stage, 0.0) + seconds
    if not is_json:
        seeds = ",".join(str(event.seed) for event, _ in made)
        headers = {"x-seed": seeds, "x-stage-durations": json.dumps(_rounded(stage_seconds))}
        return Response(_zip(made), media_type="application/zip", headers=headers)
    images = tuple(
        Image(
            id=event.job_id,
            b64_json=base64.b64encode(image).decode(),
            seed=event.seed,
            frames_sha256=event.frames_sha256,
        )
        for event, image in made
    )
    answer = Images(
        created=int(time.time()),
        data=images,
        output_format=body.fields.output_format,
        size=f"{event.width}x{event.height}",
        metrics=ImageMetrics(stage_durations=_rounded(stage_seconds)),
    )
    return JSONResponse(answer.as_json())


async def _file(event: Finished, media: MediaStore) -> Response:
    """Answer with a finished file, read as it is sent."""
    record = await asyncio.to_thread(media.expect, event.media_id)
    return PartsResponse(finished_parts(media, record), _headers(event), event.media_type)


async def _whole(event: Finished, held: Reservation, media: MediaStore) -> bytes:
    """Read a finished file in one piece."""
    held.need(int(event.num_bytes * _SPACE_OF_BASE64))
    return await asyncio.to_thread(lambda: media.read(media.expect(event.media_id)))


def _zip(made: list[tuple[Finished, bytes]]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # they are compressed
        for index, (event, image) in enumerate(made):
            archive.writestr(f"{index}{SUFFIXES[event.media_type]}", image)
    return packed.getvalue()


def _headers(event: Finished) -> dict[str, str]:
    return {
        "content-length": str(event.num_bytes),
        "x-video-id": event.job_id,
        "x-mode": event.mode,
        "x-seed": str(event.seed),
        "x-frames-sha256": event.frames_sha256,
        "x-negative-prompt": event.negative_origin,
        "x-inference-time-s": f"{event.stage_seconds['total']:.3f}",
        "x-stage-durations": json.dumps(_rounded(event.stage_seconds)),
        "x-notes": json.dumps(event.notes),
    }


def _rounded(stage_seconds: dict[str, float]) -> dict[str, float]:
    return {name: round(seconds, 4) for name, seconds in stage_seconds.items()}


def all_warnings(idempotency_key: str | None, options: SubmitOptions) -> tuple[str, ...]:
    """Return the warnings of an answer that is the file itself, which an idempotency key cannot repeat."""
    return options.warnings if idempotency_key is None else (_NO_REPLAY, *options.warnings)


def service_headers(model_name: str, warnings: tuple[str, ...]) -> dict[str, str]:
    """Return the headers of an answer that is a file; in printable ASCII whatever the model is called."""
    return {"x-model": urllib.parse.quote(model_name, safe="/:@+ ()"), "x-warnings": _warnings_header(warnings)}


def _warnings_header(warnings: tuple[str, ...]) -> str:
    """Return a JSON list of the first ones, as many as fit, and of how many more there are."""
    first: list[str] = []
    num_chars = 0
    for warning in warnings:
        num_chars += len(json.dumps(warning)) + len(", ")
        if num_chars > _MAX_WARNINGS_CHARS:
            first.append(f"and {len(warnings) - len(first)} more, which the job's warnings name")
            break
        first.append(warning)
    return json.dumps(first)
