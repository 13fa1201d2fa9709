"""What the command line asks of an app over HTTP: a small answer, or a file made while it waits."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path

from cosmos3_core.actions import GeneratedActions, write_actions
from cosmos3_core.errors import RequestError
from cosmos3_core.media.file_kinds import SUFFIXES
from cosmos3_core.media.output import OutputFile
from cosmos3_core.request import GenerationRequest
from deployments.clients.deadline import Deadline
from deployments.clients.http_body import body_of
from deployments.clients.http_calls import JSON, Answer, HttpCalls
from deployments.clients.saving import write_parts

# Of actions with a clip in base64.
_MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class SavedMedia:
    """What a server made, and what it said about it.

    Attributes:
        path: where the file was saved; None where there is none, only actions.
        actions_path: where generated actions were saved; None where there are none.
        num_bytes: of the file.
        video_id: by which the server knows it.
        seed: that it was made with.
        negative_origin: where the negative prompt came from.
        notes: what was changed on the way.
        warnings: fields that were accepted without effect.
        stage_seconds: stage -> seconds, in the order of the path.
    """

    path: Path | None
    actions_path: Path | None
    num_bytes: int
    video_id: str
    seed: int
    negative_origin: str
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    stage_seconds: dict[str, float]


def get(url: str, path: str, *, timeout_s: float, api_key: str | None = None) -> tuple[int, str]:
    """A small answer of the app: its status and text.

    Raises:
        RequestError: not a URL.
        UnreachableError: see the class.
    """
    return asyncio.run(_get(HttpCalls(url, api_key), path, Deadline(timeout_s)))


def save_video(
    url: str, request: GenerationRequest, out: Path, *, timeout_s: float, api_key: str | None = None
) -> SavedMedia:
    """Have a request served and save what comes of it. Who is interrupted stops it.

    Args:
        url: of the app.
        request: what is asked for; its image or clip is read here.
        out: path without its ending: the answer decides on ``.mp4``, ``.png`` ..., ``.actions.json``.
        timeout_s: for all of it.
        api_key: None where the app asks for none.

    Raises:
        RequestError: not a URL, no place for the file, or an image or clip that cannot be read or sent.
        UnreachableError, MediaError: the answer did not come whole, or could not be written.
        Cosmos3Error: the server refused or failed, see :mod:`deployments.clients.errors`.
    """
    if not out.name:
        raise RequestError("out", str(out), "a path that ends in a name, without its ending")
    OutputFile(out.with_name(out.name + ".mp4"))  # a place that does not exist is refused before the work, not after it
    body = json.dumps(body_of(request)).encode()
    return asyncio.run(_save_video(HttpCalls(url, api_key), body, out, Deadline(timeout_s)))


async def _get(calls: HttpCalls, path: str, deadline: Deadline) -> tuple[int, str]:
    try:
        async with calls.answer("GET", path, deadline=deadline) as answer:
            return answer.status, await answer.text()
    finally:
        await calls.aclose()


async def _save_video(calls: HttpCalls, body: bytes, out: Path, deadline: Deadline) -> SavedMedia:
    try:
        async with calls.answer("POST", "/v1/videos/sync", deadline=deadline, body=body) as answer:
            await answer.check()
            return await _saved(answer, out)
    finally:
        await calls.aclose()


async def _saved(answer: Answer, out: Path) -> SavedMedia:
    about = _about(answer)
    if answer.media_type == JSON:
        path, actions_path, num_bytes = await _save_json(answer, out)
    else:
        path, actions_path = _file_path(answer, out, answer.media_type), None
        num_bytes = await write_parts(answer.parts(), path)
    return replace(about, path=path, actions_path=actions_path, num_bytes=num_bytes)


def _about(answer: Answer) -> SavedMedia:
    """What the server says of a file that is not saved yet."""
    headers = answer.headers
    try:
        return SavedMedia(
            path=None,
            actions_path=None,
            num_bytes=0,
            video_id=headers["x-video-id"],
            seed=int(headers["x-seed"]),
            negative_origin=headers["x-negative-prompt"],
            notes=tuple(json.loads(headers["x-notes"])),
            warnings=tuple(json.loads(headers["x-warnings"])),
            stage_seconds=dict(json.loads(headers["x-stage-durations"])),
        )
    except (KeyError, ValueError, TypeError):
        raise answer.foreign() from None


def _file_path(answer: Answer, out: Path, media_type: str) -> Path:
    if media_type not in SUFFIXES:
        raise answer.foreign()
    return out.with_name(out.name + SUFFIXES[media_type])


async def _save_json(answer: Answer, out: Path) -> tuple[Path | None, Path, int]:
    """Write what an answer with actions holds. Returns the file's path, that of the actions, the file's size."""
    path, data = None, b""
    told = await answer.json(_MAX_JSON_BYTES)
    try:
        actions = GeneratedActions.from_json(told["actions"])
        if (video := told["video"]) is not None:
            path = _file_path(answer, out, video["media_type"])
            data = base64.b64decode(video["b64_json"])
    except (ValueError, TypeError, KeyError):
        raise answer.foreign() from None
    if path is not None:
        await write_parts(_only(data), path)
    return path, write_actions(actions, out), len(data)


async def _only(data: bytes) -> AsyncIterator[bytes]:
    yield data
