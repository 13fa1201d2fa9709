"""Check a running app with one small request, and report stage by stage."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from cosmos3_core.conditioning.modes import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, WITH_SOUND
from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.media.probe import probe_video
from cosmos3_core.request import GenerationRequest
from deployments.clients.errors import AnswerError, AuthError
from deployments.launch.http_client import SavedMedia, get, save_video

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


def check_app(url: str, *, timeout_s: float, report: Callable[[str], None] = print, api_key: str | None = None) -> bool:
    """Check every stage of an app, with an image and with sound if the app offers them; return whether all work."""
    try:
        _check_ready(url)
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


def _check_ready(url: str) -> None:
    status, text = get(url, "/ready", timeout_s=_READY_S)
    if status != 200:
        raise AnswerError(status, f"HTTP {status}: {text}")


def _make_probe(url: str, api_key: str | None) -> GenerationRequest:
    """Return a request that needs every stage of the app."""
    status, text = get(url, "/v1/models", timeout_s=_READY_S, api_key=api_key)
    if status == 401:
        given = "none was given" if api_key is None else "it does not know this one"
        raise AuthError(status, f"the app asks for an API key, and {given}: see --api-key-file and $COSMOS3_API_KEY")
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
