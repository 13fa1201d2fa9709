"""The command line's calls over HTTP: fetch a small answer, or generate files and save them.

They use ``/v1/videos/sync``, which the typed client does not: the app then stops the work even if this process is
killed, and reports the origin of the negative prompt.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cosmos3_core.actions import GeneratedActions, write_actions
from cosmos3_core.errors import RequestError
from cosmos3_core.media.file_kinds import SUFFIXES
from cosmos3_core.media.output import OutputFile
from cosmos3_core.request import GenerationRequest
from deployments.clients.asynchronous import write_parts
from deployments.clients.http_calls import JSON, Answer, HttpCalls
from deployments.clients.http_transport import make_body
from deployments.clients.transport import Deadline

# Bound of an answer with actions and a clip in base64.
_MAX_JSON_BYTES = 1 << 30


@dataclass(frozen=True)
class SavedMedia:
    """The saved files of a request, and what the app reports about them.

    Attributes:
        path: of the file; None if there are only actions.
        actions_path: of the actions; None if there are none.
        negative_origin: where the negative prompt came from.
        notes: changes that the app made to the request.
        warnings: fields that were accepted without effect.
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
    """Fetch a small answer of an app; return its status and text.

    Raises:
        RequestError: ``url`` is not a URL.
        UnreachableError: no answer came in time, or it broke off.
    """
    return asyncio.run(_get(HttpCalls(url, api_key), path, Deadline(timeout_s)))


def save_video(
    url: str, request: GenerationRequest, out: Path, *, timeout_s: float, api_key: str | None = None
) -> SavedMedia:
    """Generate a request's files with an app and save them. An interrupt stops the request.

    Args:
        request: its image or clip is read here.
        out: path without suffix; the answer decides on ``.mp4``, ``.png`` ..., ``.actions.json``.
        timeout_s: for generating, fetching and saving.

    Raises:
        RequestError: ``url`` is not a URL, ``out`` cannot be written, or the image or clip cannot be read or sent.
        UnreachableError, MediaError: the answer was cut off, or could not be written.
        Cosmos3Error: the app refused or failed, see :mod:`deployments.clients.errors`.
    """
    if not out.name:
        raise RequestError("out", str(out), "a path that ends in a name, without its ending")
    OutputFile(out.with_name(out.name + ".mp4"))  # refuses a place that cannot be written before the work
    body = json.dumps(make_body(request)).encode()
    return asyncio.run(_save_video(HttpCalls(url, api_key), body, out, Deadline(timeout_s)))


async def _get(calls: HttpCalls, path: str, deadline: Deadline) -> tuple[int, str]:
    async with aclosing(calls), calls.send("GET", path, deadline=deadline) as answer:
        return answer.status, await answer.text()


async def _save_video(calls: HttpCalls, body: bytes, out: Path, deadline: Deadline) -> SavedMedia:
    async with aclosing(calls), calls.send("POST", "/v1/videos/sync", deadline=deadline, body=body) as answer:
        await answer.check()
        return await _save_answer(answer, out)


async def _save_answer(answer: Answer, out: Path) -> SavedMedia:
    facts = _read_facts(answer)  # before a file is written
    if answer.media_type == JSON:
        path, actions_path, num_bytes = await _save_json(answer, out)
    else:
        path, actions_path = _choose_path(answer, out, answer.media_type), None
        num_bytes = await write_parts(answer.parts(), path)
    return SavedMedia(path, actions_path, num_bytes, **facts)


def _read_facts(answer: Answer) -> dict[str, Any]:
    headers = answer.headers
    try:
        return {
            "video_id": headers["x-video-id"],
            "seed": int(headers["x-seed"]),
            "negative_origin": headers["x-negative-prompt"],
            "notes": tuple(json.loads(headers["x-notes"])),
            "warnings": tuple(json.loads(headers["x-warnings"])),
            "stage_seconds": dict(json.loads(headers["x-stage-durations"])),
        }
    except (KeyError, ValueError, TypeError):
        raise answer.make_foreign_error() from None


def _choose_path(answer: Answer, out: Path, media_type: str) -> Path:
    if media_type not in SUFFIXES:
        raise answer.make_foreign_error()
    return out.with_name(out.name + SUFFIXES[media_type])


async def _save_json(answer: Answer, out: Path) -> tuple[Path | None, Path, int]:
    """Save an answer with actions; return the path of its file, the path of the actions, and the file's bytes."""
    path, data = None, b""
    values = await answer.json(_MAX_JSON_BYTES)
    try:
        actions = GeneratedActions.from_json(values["actions"])
        if (video := values["video"]) is not None:
            path = _choose_path(answer, out, video["media_type"])
            data = base64.b64decode(video["b64_json"])
    except (ValueError, TypeError, KeyError):
        raise answer.make_foreign_error() from None
    if path is not None:
        await write_parts(_yield_once(data), path)
    return path, write_actions(actions, out), len(data)


async def _yield_once(data: bytes) -> AsyncIterator[bytes]:
    yield data
