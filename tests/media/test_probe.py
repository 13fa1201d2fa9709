"""What the probe says about files that are not whole videos (whole ones: test_mp4.py)."""

import pytest

from cosmos3_core.errors import MediaError
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.probe import probe_video, read_frames


def first_frame(path):
    return next(read_frames(path))


@pytest.fixture
def whole(tmp_path, clip):
    path = tmp_path / "whole.mp4"
    with Mp4Writer(path, fps=24, height=48, width=80) as writer:
        writer.write(clip)
    return path


@pytest.mark.parametrize("read", [probe_video, first_frame])
@pytest.mark.parametrize("content", [None, b"", b"not a video " * 100], ids=["missing", "empty", "text"])
def test_unreadable_files_are_media_errors(tmp_path, read, content):
    path = tmp_path / "clip.mp4"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"clip.mp4: "):
        read(path)


def test_a_truncated_file_is_not_taken_for_a_whole_one(whole):
    whole.write_bytes(whole.read_bytes()[:-1500])
    with pytest.raises(MediaError, match=r"whole.mp4: (damaged|not a video)"):
        probe_video(whole)


def test_frames_come_one_by_one(whole, clip):
    frames = read_frames(whole)
    assert next(frames).shape == clip.shape[1:]
    assert sum(1 for _ in frames) == len(clip) - 1
