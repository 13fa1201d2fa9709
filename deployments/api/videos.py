"""Routes of videos: made, waited for, listed, looked at, stopped, deleted, made again with another prompt."""

from __future__ import annotations

import asyncio
import json
import re
import urllib.parse
import uuid
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cluster.errors import StageFailed
from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from deployments.api.bodies import Wishes, video_body
from deployments.api.body_limit import read_fields, request_id_of, visible_header
from deployments.api.call import Call, routes
from deployments.api.exchange import Exchange, accept_limit_s, answered
from deployments.api.fields import NO_SUCH_FIELD, Endpoint
from deployments.api.media_answer import live_answer, media_answer
from deployments.api.written import as_written
from deployments.api_model import ApiModel
from deployments.jobs.job import Job
from deployments.jobs.service import MAX_PAGE
from deployments.jobs.video import poll_after_ms

_PAGE = 20
_MAX_SHOWN_CHARS = 100
_IDEMPOTENCY_KEY = "idempotency-key"
_NO_REPLAY = "Idempotency-Key is without effect: the answer is the file itself"
_OPTIONS = ("prompt",)
# Of a header: proxies and clients take 8 KiB of all headers together.
_MAX_WARNINGS_CHARS = 6000

router = routes()


@router.post(Endpoint.VIDEOS)
async def create_video(request: Request) -> Response:
    """Accept a request as a job, which is run whatever becomes of its caller."""
    call = Call.of(request)
    idempotency_key = visible_header(request.headers, _IDEMPOTENCY_KEY)
    request_id = request_id_of(request.headers, uuid.uuid4().hex)
    with call.service.room.hold() as held:
        body = await call.body(Endpoint.VIDEOS, held, video_body)
        asked = call.options(body.wishes, request_id, idempotency_key)
        response = call.service.director.submit.remote(body.request, asked)
        limit_s, origins = accept_limit_s(body.request), body.origins
        del body
        with as_written(origins):
            job = await _accepted(response, limit_s)
    return await _told(call, job)


@router.post(Endpoint.SYNC)
async def create_video_and_wait(request: Request) -> Response:
    """Make what is asked for; the answer is the file, or JSON where actions are generated."""
    call = Call.of(request)
    service = call.service

    async def work(exchange: Exchange) -> Response:
        no_replay = told_no_replay(request.headers)
        with service.room.hold() as held:
            body = await call.body(Endpoint.SYNC, held, video_body)
            is_live, warnings = body.is_live, (*no_replay, *body.wishes.warnings)
            asked = call.options(replace(body.wishes, warnings=warnings), exchange.request_id)
            with as_written(body.origins):
                await exchange.ask(body.request, asked)
            del body
        if is_live:
            answer = await live_answer(exchange, service.jobs.media)
        else:
            with service.room.hold() as held:  # the request's body is gone
                answer = await media_answer(exchange, held, service.jobs.media)
        answer.headers.update(service_headers(service.model.id, warnings))
        return answer

    return await answered(request, service.streaming, service.http.request_timeout_s, work)


@router.get(Endpoint.VIDEOS)
async def list_videos(request: Request) -> Response:
    """The caller's jobs, in pages."""
    call = Call.of(request, "after", "limit", "order")
    limit = _limit(call.query.get("limit"))
    order = call.query.get("order", "desc")
    return _json(await call.service.jobs.list(call.caller.owner, call.query.get("after"), limit, order))


@router.get("/v1/videos/{video_id}")
async def get_video(video_id: str, request: Request) -> Response:
    """A job as it stands; one that has failed as well."""
    call = Call.of(request)
    return await _told(call, await call.job(video_id))


@router.post("/v1/videos/{video_id}/cancel")
async def cancel_video(video_id: str, request: Request) -> Response:
    """Stop a job; one that has ended stays as it is."""
    call = Call.of(request)
    return await _told(call, await call.service.jobs.cancel(video_id, call.caller.owner))


@router.delete("/v1/videos/{video_id}")
async def delete_video(video_id: str, request: Request) -> Response:
    """Stop and forget a job, its files too."""
    call = Call.of(request)
    return _json(await call.service.jobs.delete(video_id, call.caller.owner))


@router.post("/v1/videos/{video_id}/remix")
async def remix_video(video_id: str, request: Request) -> Response:
    """Accept an earlier job's request again, with the same seed and fields and another prompt."""
    call = Call.of(request)
    idempotency_key = visible_header(request.headers, _IDEMPOTENCY_KEY)
    request_id = request_id_of(request.headers, uuid.uuid4().hex)
    with call.service.room.hold() as held:
        fields = await read_fields(request, call.service.http.max_body_bytes, held)
        for name in fields:
            if name not in _OPTIONS:
                hint = f"Fields are {', '.join(_OPTIONS)}; everything else is the earlier request's."
                raise RequestError(name, "given", NO_SUCH_FIELD, hint)
        prompt = checks.text("prompt", fields.get("prompt"), LIMITS.max_prompt_chars, may_be_empty=False)
    options = call.options(Wishes(call.caller.service_class), request_id, idempotency_key)
    response = call.service.director.remix.remote(video_id, str(prompt), options)
    return await _told(call, await _accepted(response, accept_limit_s(None)))


def told_no_replay(headers: Headers) -> tuple[str, ...]:
    """Warnings of an answer that is the file itself: who has given an idempotency key is told that it is for nothing.

    Raises:
        BodyError: one that no log or database should hold.
    """
    return () if visible_header(headers, _IDEMPOTENCY_KEY) is None else (_NO_REPLAY,)


def service_headers(model_name: str, warnings: tuple[str, ...]) -> dict[str, str]:
    """Headers of an answer that is a file; of printable ASCII whatever the model is called."""
    return {"x-model": urllib.parse.quote(model_name, safe="/:@+ ()"), "x-warnings": _warnings_header(warnings)}


def _warnings_header(warnings: tuple[str, ...]) -> str:
    """A JSON list of the first ones, as many as fit, and of how many more there are."""
    told: list[str] = []
    num_chars = 0
    for warning in warnings:
        num_chars += len(json.dumps(warning)) + len(", ")
        if num_chars > _MAX_WARNINGS_CHARS:
            told.append(f"and {len(warnings) - len(told)} more, which the job's warnings name")
            break
        told.append(warning)
    return json.dumps(told)


async def _accepted(response: Any, limit_s: float) -> Job:
    """The job that the Director makes of a request.

    Raises:
        StageFailed: no word of it.
        Exception: why it makes none.
    """
    try:
        async with asyncio.timeout(limit_s):
            job: Job = await response
            return job
    except TimeoutError:
        response.cancel()
        raise StageFailed("director", 1, f"no word of the request within {limit_s:g} s") from None


async def _told(call: Call, job: Job) -> Response:
    video = await call.service.jobs.video(job)
    headers = {} if job.state.is_final else {"openai-poll-after-ms": str(poll_after_ms(video.eta_s))}
    return _json(video, headers)


def _json(body: ApiModel, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse(body.as_json(), headers={"cache-control": "no-store", **(headers or {})})


def _limit(given: str | None) -> int:
    if given is None:
        return _PAGE
    if not re.fullmatch("[0-9]{1,4}", given):
        raise RequestError("limit", given[:_MAX_SHOWN_CHARS], f"a whole number from 0 to {MAX_PAGE}")
    return int(given)
