"""One small request through every stage of a running app, reported stage by stage."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from cosmos3_core.errors import Cosmos3Error
from cosmos3_core.media.probe import probe_video
from cosmos3_core.request import GenerationRequest
from deployments.http_client import AnswerError, SavedMedia, get, save_video

_READY_S = 30.0
_PROBE = GenerationRequest(
    prompt="A red car.", num_frames=5, height=64, width=96, fps=24, num_inference_steps=2, seed=1
)
# Stages as errors name them and as answers time them -> as they are reported.
_STAGES = {"tokenize": "tokenize", "denoise": "denoise", "decode_encode": "decode + encode"}
_FAILING = {"tokenize": "tokenize", "denoise": "denoise", "decode": "decode_encode", "encode": "decode_encode"}


def check_app(url: str, *, timeout_s: float, tell: Callable[[str], None] = print) -> bool:
    """Whether every stage does its part.

    Args:
        url: of the app.
        timeout_s: for the request.
        tell: takes a line per stage.
    """
    try:
        _check_ready(url)
    except Cosmos3Error as error:
        tell(_line("ready", "FAIL", error))
        return False
    tell(_line("ready", "ok", url))
    with tempfile.TemporaryDirectory(prefix="cosmos3-check-") as directory:
        try:
            saved = save_video(url, _PROBE, Path(directory) / "check", timeout_s=timeout_s)
        except Cosmos3Error as error:
            _tell_failure(str(error), tell)
            return False
        for stage, name in _STAGES.items():
            tell(_line(name, "ok", f"{saved.stage_seconds[stage]:.2f} s"))
        try:
            tell(_line("file", "ok", _check_file(saved)))
        except Cosmos3Error as error:
            tell(_line("file", "FAIL", error))
            return False
    return True


def _check_ready(url: str) -> None:
    status, text = get(url, "/ready", timeout_s=_READY_S)
    if status != 200:
        raise AnswerError(status, f"HTTP {status}: {text}")


def _tell_failure(message: str, tell: Callable[[str], None]) -> None:
    """Errors of a stage name it; those before it did their part."""
    named = re.search(r"stage '(\w+)'", message)
    failing = _FAILING.get(named[1]) if named else None
    for stage, name in _STAGES.items():
        if failing is None or stage == failing:
            tell(_line(name if failing else "request", "FAIL", message))
            return
        tell(_line(name, "ok", ""))


def _check_file(saved: SavedMedia) -> str:
    if saved.path is None:
        raise Cosmos3Error("the app answers without a file")
    info = probe_video(saved.path)
    found: tuple[object, ...] = info.num_frames, info.height, info.width, info.fps
    if found != (_PROBE.num_frames, _PROBE.height, _PROBE.width, _PROBE.fps):
        raise Cosmos3Error(f"the file holds something else than was asked for: {info}")
    return f"{info.num_frames} frames, {info.width}x{info.height}, {float(info.fps):g} fps, {saved.num_bytes} bytes"


def _line(name: str, verdict: str, detail: object) -> str:
    return f"{name:<16} {verdict:<5} {detail}".rstrip()
