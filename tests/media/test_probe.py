"""What the probe says about files that are not whole videos (whole ones: test_mp4.py)."""

import pytest

from cosmos3_core.errors import MediaError
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.probe import SoundInfo, probe_sound, probe_video, read_frames, read_sound
from cosmos3_core.media.sound import SoundFormat


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


@pytest.fixture
def with_sound(tmp_path, clip, waveform):
    path = tmp_path / "sound.mp4"
    with Mp4Writer(path, fps=24, height=48, width=80, sound=SoundFormat(48000, 2, 26000)) as writer:
        writer.write(clip)
        writer.write_sound(waveform)
    return path


def test_sound_is_reported_where_there_is_any(whole, with_sound):
    assert probe_video(whole).sound is None
    assert probe_sound(whole) is None
    expected = SoundInfo("aac", 48000, 2, 26000, 26000 / 48000)
    assert probe_video(with_sound).sound == probe_sound(with_sound) == expected
    assert probe_video(with_sound).num_frames == 13


@pytest.mark.parametrize("read", [probe_video, probe_sound, read_sound])
def test_truncated_sound_is_not_taken_for_whole(with_sound, read):
    with_sound.write_bytes(with_sound.read_bytes()[:-4000])
    with pytest.raises(MediaError, match=r"sound.mp4: (damaged|not a video)"):
        read(with_sound)
