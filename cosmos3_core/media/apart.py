"""Reading a clip in a process of its own, for services: a crafted file may bring down that process and nothing else.

FFmpeg's demuxers and decoders are large and fed by strangers here. The child has bounds of its own on memory and time;
what it dies of is the file's fault. Images are read by Pillow where they are asked for: starting a process takes a
third of a second, which a policy does not have. No torch here.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, Literal

import numpy as np

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.kinds import CLIP, a, kind_of
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.source import ClipInfo, Packed, probe_clip, read_clip
from cosmos3_core.presets import LIMITS

# Address space of the child: Python, its libraries, FFmpeg with the file and some frames. What is read comes on top.
_MEMORY_BYTES = 3 * 2**30
_CPU_S = 120
_WALL_S = 180.0
# Each may take the memory above.
_READERS = threading.BoundedSemaphore(2)
_WAIT_S = 600.0
_ROOT = Path(__file__).parents[2]
# The package is found as it was found here, installed or not.
_CHILD = f"import sys; sys.path.insert(0, {str(_ROOT)!r}); from cosmos3_core.media.apart import serve; serve()"


def probe_clip_apart(field: str, packed: Packed) -> ClipInfo:
    """:func:`probe_clip`; video files in a process of their own.

    Raises:
        RequestError: as there; or the file made the reader fail.
    """
    if not _is_video_file(packed):
        return probe_clip(field, packed)
    header, _ = _ask({"do": "probe", "field": field}, packed)
    return ClipInfo(*header["info"])


def read_clip_apart(field: str, packed: Packed, *, num_frames: int, keep: Literal["first", "last"]) -> Frames:
    """:func:`read_clip`; video files in a process of their own.

    Raises:
        RequestError: as there; or the file made the reader fail.
    """
    if not _is_video_file(packed):
        return read_clip(field, packed, num_frames=num_frames, keep=keep)
    header, frames = _ask({"do": "read", "field": field, "num_frames": num_frames, "keep": keep}, packed)
    return np.frombuffer(frames, np.uint8).reshape(header["shape"])


def _is_video_file(packed: Packed) -> bool:
    return isinstance(packed, bytes) and kind_of(packed).category == CLIP


def _ask(question: dict[str, Any], data: Any) -> tuple[dict[str, Any], memoryview]:
    """The child's answer: a line of JSON, then bytes.

    Raises:
        RequestError: the one that the child raised, or one about its end.
        MediaError: all readers were taken for too long.
    """
    command = [sys.executable, "-c", _CHILD, json.dumps(question)]
    field, given = question["field"], a(f"{kind_of(data).name} file")
    allowed = "a clip that can be decoded"
    if not _READERS.acquire(timeout=_WAIT_S):
        raise MediaError(f"no clip could be read within {_WAIT_S:.0f} s: others are being read")
    try:
        done = subprocess.run(command, input=data, capture_output=True, timeout=_WALL_S, check=False)
    except subprocess.TimeoutExpired:
        raise RequestError(field, given, allowed, f"It was not read within {_WALL_S:.0f} s.") from None
    finally:
        _READERS.release()
    line, _, rest = done.stdout.partition(b"\n")
    if done.returncode != 0 or not line:
        raise RequestError(field, given, allowed, f"It made the reader fail (exit status {done.returncode}).")
    header: dict[str, Any] = json.loads(line)
    if "error" in header:
        raise RequestError.of_parts(*header["error"])
    return header, memoryview(rest)


def serve() -> None:
    """The child: its question is its argument, the file its standard input."""
    question = json.loads(sys.argv[1])
    num_frames = int(question.get("num_frames", 0))
    _bound_this_process(num_frames)
    field, data = str(question["field"]), sys.stdin.buffer.read()
    try:
        if question["do"] == "probe":
            _answer({"info": list(probe_clip(field, data))})
            return
        frames = read_clip(field, data, num_frames=num_frames, keep=question["keep"])
    except RequestError as error:
        _answer({"error": [error.field, error.given, error.allowed, error.hint]})
    except MemoryError:
        allowed = f"a clip that is read within {_MEMORY_BYTES >> 30} GiB of memory"
        _answer({"error": [field, "a file that takes more", allowed, ""]})
    else:
        _answer({"shape": list(frames.shape)}, frames)


def _bound_this_process(num_frames: int) -> None:
    import resource

    # A chunk of frames exists twice while it is written.
    frames_bytes = 2 * 3 * min(num_frames * LIMITS.max_clip_pixels, LIMITS.max_clip_total_pixels)
    memory_bytes = _MEMORY_BYTES + frames_bytes
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_S, _CPU_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _answer(header: dict[str, Any], frames: Frames | None = None) -> None:
    out = sys.stdout.buffer
    out.write(json.dumps(header).encode() + b"\n")
    if frames is not None:
        out.write(np.ascontiguousarray(frames).data)
    out.flush()
