"""Clips read in another process: same result, and a crash of that process is the file's fault."""

from __future__ import annotations

import io
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media import child_reader
from cosmos3_core.media.child_reader import probe_clip_in_child, read_clip_in_child
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.source import probe_clip, read_clip


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    frames = np.random.default_rng(0).integers(0, 256, (7, 48, 64, 3), dtype=np.uint8)
    with Mp4Writer(path, fps=24, height=48, width=64) as writer:
        writer.write(frames)
    return path.read_bytes()


def test_another_process_reads_the_same_frames_and_facts(clip: bytes) -> None:
    assert probe_clip_in_child("video", clip) == probe_clip("video", clip)
    frames = read_clip_in_child("video", clip, num_frames=3, keep="last")
    assert np.array_equal(frames, read_clip("video", clip, num_frames=3, keep="last"))


def test_a_refusal_has_the_same_message(clip: bytes) -> None:
    for damaged in (clip[:500], clip[: len(clip) // 2]):
        with pytest.raises(RequestError) as here:
            probe_clip("video", damaged)
        with pytest.raises(RequestError) as there:
            probe_clip_in_child("video", damaged)
        assert str(there.value) == str(here.value)
        assert (there.value.field, there.value.given, there.value.hint) == (
            here.value.field,
            here.value.given,
            here.value.hint,
        )


def test_frames_need_no_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a process was started"))
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    assert probe_clip_in_child("video", frames).num_frames == 2
    assert read_clip_in_child("video", frames, num_frames=1, keep="first").shape == (1, 16, 16, 3)


def test_invalid_sources_are_refused_alike() -> None:
    for data in (b"no file at all", b""):
        with pytest.raises(RequestError) as here:
            probe_clip("video", data)
        with pytest.raises(RequestError) as there:
            probe_clip_in_child("video", data)
        assert str(there.value) == str(here.value)


def test_animations_are_read_in_another_process() -> None:
    frames = [Image.new("RGB", (16, 16), (shade, 0, 0)) for shade in (10, 200)]
    gif = io.BytesIO()
    frames[0].save(gif, "GIF", save_all=True, append_images=frames[1:])
    assert probe_clip_in_child("video", gif.getvalue()) == probe_clip("video", gif.getvalue())


@pytest.mark.parametrize("end", ["os.abort()", "os._exit(3)", "sys.stdout.close()"])
def test_a_reader_that_dies_is_the_files_fault(end: str, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_reader, "_CHILD", f"import os, sys; sys.stdin.buffer.read(); {end}")
    with pytest.raises(RequestError, match="it made the reader fail"):
        probe_clip_in_child("video", clip)


def test_a_reader_that_is_killed_is_not_the_files_fault(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_reader, "_CHILD", "import os; os.kill(os.getpid(), 9)")
    with pytest.raises(MediaError, match="killed"):
        probe_clip_in_child("video", clip)


def test_a_hanging_reader_is_killed(clip: bytes, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    script = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    monkeypatch.setattr(child_reader, "_CHILD", script)
    monkeypatch.setattr(child_reader, "_WALL_S", 3.0)
    with pytest.raises(RequestError, match="not read within 3 s"):
        probe_clip_in_child("video", clip)
    assert not os.path.exists(f"/proc/{pid_file.read_text()}")


@pytest.mark.parametrize("bound", [1 << 30, 16 << 30])
def test_the_readers_memory_is_bounded(bound: int, clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    hungry = f"""
import sys
sys.path.insert(0, {str(child_reader._ROOT)!r})
import cosmos3_core.media.child_reader as child_reader
child_reader._MEMORY_BYTES = {bound}
child_reader.probe_clip = lambda field, data: (len(bytearray(3 << 29)) >> 29, 1, 1)
child_reader.serve()
"""
    monkeypatch.setattr(child_reader, "_CHILD", hungry)
    if bound > 3 << 29:
        assert probe_clip_in_child("video", clip).height == 3, "it has the memory"
        return
    with pytest.raises(RequestError, match="a clip that is read within 1 GiB"):
        probe_clip_in_child("video", clip)


def test_the_readers_time_is_bounded(clip: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"""
import sys
sys.path.insert(0, {str(child_reader._ROOT)!r})
import cosmos3_core.media.child_reader as child_reader
child_reader._CPU_S = 1
def spin(field, data):
    while True: pass
child_reader.probe_clip = spin
child_reader.serve()
"""
    monkeypatch.setattr(child_reader, "_CHILD", script)
    with pytest.raises((RequestError, MediaError)):
        probe_clip_in_child("video", clip)
