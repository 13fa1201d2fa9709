"""The command line's calls to a running app: fetch a small answer, generate and save files, check every stage.

Files come from ``/v1/videos/sync``, which the typed client does not use: the app then stops the work even if this
process is killed, and reports the origin of the negative prompt.
"""

from __future__ import annotations

import asyncio
import base64
import json
import re
import tempfile
from collections.abc import AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path

import numpy as np

from cosmos3_core.actions import GeneratedActions, write_actions
from cosmos3_core.conditioning.modes import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, WITH_SOUND
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.media.file_kinds import SUFFIXES
from cosmos3_core.media.output import OutputFile, path_with_suffix
from cosmos3_core.media.probe import probe_video
from cosmos3_core.request import GenerationRequest
from deployments.api_model import JSON
from deployments.clients.asynchronous import write_parts
from deployments.clients.errors import AnswerError, AuthError
from deployments.clients.http_connection import Answer, HttpConnection
from deployments.clients.http_transport import make_body
from deployments.clients.transport import Deadline

# Bound of an answer with actions and a clip in base64.
_MAX_JSON_BYTES = 1 << 30
_READY_S = 30.0
_PROBE = GenerationRequest(
    prompt="A red car.", num_frames=5, height=64, width=96, fps=24, num_inference_steps=2, seed=1
)
# Stage in timings -> in the report.
_STAGES = {
    "tokenize": "tokenize",
    "condition": "condition",
    "denoise": "denoise",
    "decode_encode": "decode + encode",
}
# Stage in errors -> in timings.
_TIMED_STAGES = {**{stage: stage for stage in _STAGES}, "decode": "decode_encode", "encode": "decode_encode"}


@dataclass(frozen=True)
class SavedMedia:
    """The saved files of a request, and what the app reports about them.

    Attributes:
        path, actions_path: of the file and the actions; None where there is none.
        notes, warnings: changes that the app made to the request, and fields that it accepted without effect.
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
    """Fetch a small answer of an app; return its status and text. Raises as :meth:`HttpConnection.send`."""

    async def fetch() -> tuple[int, str]:
        connection, deadline = HttpConnection(url, api_key), Deadline(timeout_s)
        async with aclosing(connection), connection.send("GET", path, deadline=deadline) as answer:
            return answer.status, await answer.read_text()

    return asyncio.run(fetch())


def save_video(
    url: str, request: GenerationRequest, out: Path, *, timeout_s: float, api_key: str | None = None
) -> SavedMedia:
    """Generate a request's files with an app and save them. An interrupt stops the request.

    Args:
        request: its image or clip is read here.
        out: path; the answer decides on its ending, ``.mp4``, ``.png`` ..., ``.actions.json``.
        timeout_s: for generating, fetching and saving.

    Raises:
        RequestError: ``url`` is not a URL, ``out`` cannot be written, or the image or clip cannot be read or sent.
        UnreachableError, MediaError: the answer was cut off, or could not be written.
        Cosmos3Error: the app refused or failed, see :mod:`deployments.clients.errors`.
    """
    OutputFile(path_with_suffix(out, ".mp4"))  # refuses a place that cannot be written before the work
    body = json.dumps(make_body(request)).encode()

    async def generate() -> SavedMedia:
        connection, deadline = HttpConnection(url, api_key), Deadline(timeout_s)
        sending = connection.send("POST", "/v1/videos/sync", deadline=deadline, body=body)
        async with aclosing(connection), sending as answer:
            if answer.status == HTTPStatus.UNAUTHORIZED:
                raise _ask_for_key(api_key)
            await answer.check()
            return await _save_answer(answer, out)

    return asyncio.run(generate())


def _ask_for_key(api_key: str | None) -> AuthError:
    given = "none was given" if api_key is None else "it does not know this one"
    return AuthError(401, f"the app asks for an API key, and {given}: see --api-key-file and $COSMOS3_API_KEY")


async def _save_answer(answer: Answer, out: Path) -> SavedMedia:
    headers = answer.headers
    media_type: str | None = answer.media_type
    parts: AsyncIterable[bytes] = answer.iter_parts()
    actions = None
    try:
        if media_type == JSON:
            values = await answer.read_json(_MAX_JSON_BYTES)
            actions, video = GeneratedActions.from_json(values["actions"]), values["video"]
            media_type = None if video is None else video["media_type"]
            parts = _yield_once(b"" if video is None else base64.b64decode(video["b64_json"]))
        saved = SavedMedia(
            path=None if media_type is None else path_with_suffix(out, SUFFIXES[media_type]),
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
        raise answer.make_foreign_error() from None
    if saved.path is not None:
        saved = replace(saved, num_bytes=await write_parts(parts, saved.path))
    return saved if actions is None else replace(saved, actions_path=write_actions(actions, out))


async def _yield_once(data: bytes) -> AsyncIterator[bytes]:
    yield data


def check_app(url: str, *, timeout_s: float, report: Callable[[str], None] = print, api_key: str | None = None) -> bool:
    """Check every stage of an app, with an image and with sound if the app offers them; return whether all work."""
    try:
        status, text = get(url, "/ready", timeout_s=_READY_S)
        if status != 200:
            raise AnswerError(status, f"HTTP {status}: {text}")
        probe = _make_probe(url, api_key)
    except Cosmos3Error as error:
        report(_format_line("ready", "FAIL", error))
        return False
    report(_format_line("ready", "ok", url))
    with tempfile.TemporaryDirectory(prefix="cosmos3-check-") as directory:
        try:
            saved = save_video(url, probe, Path(directory) / "check", timeout_s=timeout_s, api_key=api_key)
        except Cosmos3Error as error:
            _report_failure(str(error), probe, report)
            return False
        for stage, name in _choose_stages(probe).items():
            report(_format_line(name, "ok", f"{saved.stage_seconds[stage]:.2f} s"))
        try:
            report(_format_line("file", "ok", _check_file(saved, probe)))
        except Cosmos3Error as error:
            report(_format_line("file", "FAIL", error))
            return False
    return True


def _make_probe(url: str, api_key: str | None) -> GenerationRequest:
    """Return a request that needs every stage of the app."""
    status, text = get(url, "/v1/models", timeout_s=_READY_S, api_key=api_key)
    if status == HTTPStatus.UNAUTHORIZED:
        raise _ask_for_key(api_key)
    try:
        modes = json.loads(text)["data"][0]["modes"]
    except (ValueError, TypeError, KeyError, IndexError):
        raise AnswerError(status, f"HTTP {status}: /v1/models lists no modes; is it a cosmos3 app?") from None
    mode, request = TEXT_TO_VIDEO, _PROBE
    if IMAGE_TO_VIDEO in modes:
        mode, request = IMAGE_TO_VIDEO, replace(request, image=np.full((64, 96, 3), 128, np.uint8))
    return replace(request, generate_sound=mode + WITH_SOUND in modes)


def _choose_stages(probe: GenerationRequest) -> dict[str, str]:
    return {stage: name for stage, name in _STAGES.items() if stage != "condition" or probe.image is not None}


def _report_failure(message: str, probe: GenerationRequest, report: Callable[[str], None]) -> None:
    """Report the failing stage, which the message names, and the earlier ones as ok."""
    named = re.search(r"stage '(\w+)'", message)
    failing = _TIMED_STAGES.get(named[1]) if named else None
    for stage, name in _choose_stages(probe).items():
        if failing is None or stage == failing:
            report(_format_line(name if failing else "request", "FAIL", message))
            return
        report(_format_line(name, "ok", ""))


def _check_file(saved: SavedMedia, probe: GenerationRequest) -> str:
    if saved.path is None:
        raise Cosmos3Error("the app's answer has no file")
    info = probe_video(saved.path)
    found: tuple[object, ...] = info.num_frames, info.height, info.width, info.fps, info.sound is not None
    if found != (probe.num_frames, probe.height, probe.width, probe.fps, probe.generate_sound):
        raise Cosmos3Error(f"the file does not match the request: {info}")
    sound = "" if info.sound is None else " with sound"
    shape = f"{info.num_frames} frames, {info.width}x{info.height}, {float(info.fps):g} fps{sound}"
    return f"{shape}, {saved.num_bytes} bytes"


def _format_line(name: str, verdict: str, detail: object) -> str:
    return f"{name:<16} {verdict:<5} {detail}".rstrip()
