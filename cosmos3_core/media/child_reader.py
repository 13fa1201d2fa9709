"""Reads a clip in a child process, for services: a crafted file can crash that process and nothing else.

FFmpeg's demuxers and decoders are large, their input here is untrusted, and a small file can be hours of work. The
child has bounds of its own on memory and time, and its death is reported as the file's fault. Callers bound the number
of children. Images are read in the calling process, by Pillow: starting a child takes a third of a second, too long for
a policy. No torch here.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.kinds import kind_of, with_article
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.source import ClipInfo, Packed, probe_clip, read_clip
from cosmos3_core.presets import LIMITS

# Address space of the child: Python, its libraries, FFmpeg with the file and some frames; the result comes on top.
_MEMORY_BYTES = 3 * 2**30
_CPU_S = 60
_WALL_S = 120.0
_ROOT = Path(__file__).parents[2]
# The child imports this very package, installed or not. Threads of numerical libraries would take address space.
_CHILD = (
    "import os, sys; os.environ.update(OPENBLAS_NUM_THREADS='1', OMP_NUM_THREADS='1'); "
    f"sys.path.insert(0, {str(_ROOT)!r}); from cosmos3_core.media.child_reader import serve; serve()"
)


def probe_clip_in_child(field: str, packed: Packed) -> ClipInfo:
    """Run :func:`probe_clip` in a child process.

    Raises:
        RequestError: see :func:`probe_clip`; or the file made the child fail.
        MediaError: the child was killed from outside.
    """
    if not isinstance(packed, bytes):
        return probe_clip(field, packed)
    header, _ = _run_child({"command": "probe", "field": field}, packed, _WALL_S)
    return ClipInfo(*header["info"])


def read_clip_in_child(
    field: str, packed: Packed, *, num_frames: int, keep: Literal["first", "last"], limit_s: float = _WALL_S
) -> Frames:
    """Run :func:`read_clip` in a child process, for at most ``limit_s`` seconds.

    Raises:
        RequestError: see :func:`read_clip`; or the file made the child fail, or took longer.
        MediaError: the child was killed from outside.
    """
    if not isinstance(packed, bytes):
        return read_clip(field, packed, num_frames=num_frames, keep=keep)
    request = {"command": "read", "field": field, "num_frames": num_frames, "keep": keep}
    header, frames = _run_child(request, packed, min(limit_s, _WALL_S))
    return np.frombuffer(frames, np.uint8).reshape(header["shape"])


def _run_child(request: dict[str, Any], data: bytes, limit_s: float) -> tuple[dict[str, Any], memoryview]:
    """Return the child's answer: a line of JSON, then bytes.

    Raises:
        RequestError: the child raised it, died or took too long.
        MediaError: the child was killed from outside.
    """
    command = [sys.executable, "-c", _CHILD, json.dumps(request)]
    field, given = request["field"], with_article(f"{kind_of(data).name} file")
    allowed = "a clip that can be decoded"
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=limit_s, check=False)
    except subprocess.TimeoutExpired:
        raise RequestError(field, given, allowed, f"it was not read within {limit_s:.0f} s") from None
    if done.returncode == -signal.SIGKILL:
        raise MediaError("the process that read a clip was killed; the machine may be out of memory")
    line = done.stdout[: max(0, done.stdout.find(b"\n"))]
    if done.returncode != 0 or not line:
        raise RequestError(field, given, allowed, f"it made the reader fail (exit status {done.returncode})")
    header: dict[str, Any] = json.loads(line)
    if "error" in header:
        raise RequestError.of_parts(*header["error"])
    return header, memoryview(done.stdout)[len(line) + 1 :]


def serve() -> None:
    """Run as the child process: the request is the argument, the file the standard input."""
    request = json.loads(sys.argv[1])
    num_frames = int(request.get("num_frames", 0))
    _bound_this_process(num_frames)
    field, data = str(request["field"]), sys.stdin.buffer.read()
    try:
        if request["command"] == "probe":
            _reply({"info": list(probe_clip(field, data))})
            return
        frames = read_clip(field, data, num_frames=num_frames, keep=request["keep"])
    except RequestError as error:
        _reply({"error": [error.field, error.given, error.allowed, error.hint]})
    except MemoryError:
        allowed = f"a clip that is read within {_MEMORY_BYTES >> 30} GiB of memory"
        _reply({"error": [field, "a file that takes more", allowed, ""]})
    else:
        _reply({"shape": list(frames.shape)}, frames)


def _bound_this_process(num_frames: int) -> None:
    import resource

    # The result exists twice while it is written.
    frames_bytes = 2 * 3 * min(num_frames * LIMITS.max_clip_pixels, LIMITS.max_clip_total_pixels)
    memory_bytes = _MEMORY_BYTES + frames_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _reply(header: dict[str, Any], frames: Frames | None = None) -> None:
    out = sys.stdout.buffer
    out.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        out.write(np.ascontiguousarray(frames).data)
    out.flush()
