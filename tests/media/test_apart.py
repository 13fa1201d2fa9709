"""A clip that is read in another process is read as here; what that process dies of is the file's fault."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from cosmos3_core.errors import RequestError
from cosmos3_core.media import apart
from cosmos3_core.media.apart import probe_clip_apart, read_clip_apart
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.source import probe_clip, read_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (7, 48, 64, 3), dtype=np.uint8)
    with Mp4Writer(path, fps=24, height=48, width=64) as writer:
        writer.write(frames)
    return path.read_bytes()


def test_the_same_frames_and_facts(clip: bytes) -> None:
    assert probe_clip_apart("video", clip) == probe_clip("video", clip)
    frames = read_clip_apart("video", clip, num_frames=3, keep="last")
    assert np.array_equal(frames, read_clip("video", clip, num_frames=3, keep="last"))


def test_a_refusal_says_what_it_says_here(clip: bytes) -> None:
    for damaged in (clip[:500], clip[: len(clip) // 2]):
        with pytest.raises(RequestError) as here:
            probe_clip("video", damaged)
        with pytest.raises(RequestError) as there:
            probe_clip_apart("video", damaged)
        assert str(there.value) == str(here.value)
        assert (there.value.field, there.value.given, there.value.hint) == (
            here.value.field,
            here.value.given,
            here.value.hint,
        )


def test_frames_and_stills_need_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    assert probe_clip_apart("video", frames).num_frames == 2
    assert read_clip_apart("video", frames, num_frames=1, keep="first").shape == (1, 16, 16, 3)
    with pytest.raises(RequestError, match="video"):
        probe_clip_apart("video", b"no file at all")


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(3)", "sys.stdout.close()"])
def test_a_reader_that_dies_is_the_files_fault(end: str, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_CHILD", f"import os, sys; sys.stdin.buffer.read(); {end}")
    with pytest.raises(RequestError, match="It made the reader fail"):
        probe_clip_apart("video", clip)


def test_a_reader_that_hangs_is_ended(clip: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    monkeypatch.setattr(apart, "_CHILD", script)
    monkeypatch.setattr(apart, "_WALL_S", 3.0)
    with pytest.raises(RequestError, match="not read within 3 s"):
        probe_clip_apart("video", clip)
    assert not os.path.exists(f"/proc/{pid_file.read_text()}")


def test_the_readers_memory_is_bounded_and_not_ours(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(apart, "_CHILD", apart._CHILD.replace("serve()", "").rstrip("; ") + _HUNGRY)
    with pytest.raises(RequestError, match="a clip that is read within"):
        probe_clip_apart("video", clip)


# The child, with a reader that wants more than it may have.
_HUNGRY = """
import cosmos3_core.media.apart as apart
apart._MEMORY_BYTES = 1 << 30
apart.probe_clip = lambda field, data: bytearray(4 << 30)
apart.serve()
"""
