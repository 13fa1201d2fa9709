"""The sound of an mp4 as an m4a: the same packets at the same times, and what has none."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from cosmos3_core.errors import MediaError
from cosmos3_core.media.probe import probe_sound, read_sound
from cosmos3_core.media.sound import SoundFormat
from cosmos3_core.media.sound_track import NoSoundTrack, write_sound_track
from cosmos3_core.media.writer import ClipFormat, open_writer


def make_clip(path: Path, clip: np.ndarray, waveform: np.ndarray | None, rate: int = 48000) -> Path:
    sound = None if waveform is None else SoundFormat(rate, *waveform.shape)
    with open_writer(path, ClipFormat("mp4", *clip.shape[1:3], 24.0, sound=sound)) as writer:
        writer.write(clip)
        if waveform is not None:
            writer.write_sound(waveform)
    return path


def packets(path: Path) -> list[tuple[Any, ...]]:
    with av.open(str(path)) as container:
        stream = container.streams.audio[0]
        facts = stream.time_base, stream.duration, stream.start_time
        found = [(it.pts, it.dts, it.duration, bytes(it)) for it in container.demux(stream) if it.dts is not None]
    return [facts, *found]


@pytest.mark.parametrize(("num_channels", "rate"), [(2, 48000), (1, 44100), (2, 16000)])
def test_the_packets_are_the_same(
    tmp_path: Path, clip: np.ndarray, waveform: np.ndarray, num_channels: int, rate: int
) -> None:
    path = make_clip(tmp_path / "a.mp4", clip, waveform[:num_channels], rate)
    with path.open("rb") as source:
        write_sound_track(tmp_path / "a.m4a", source)
    assert packets(tmp_path / "a.m4a") == packets(path)
    assert len(packets(path)) > 20
    assert probe_sound(tmp_path / "a.m4a") == probe_sound(path)
    np.testing.assert_array_equal(read_sound(tmp_path / "a.m4a"), read_sound(path))
    with av.open(str(tmp_path / "a.m4a")) as container:
        assert not container.streams.video
    assert (tmp_path / "a.m4a").read_bytes()[4:12] == b"ftypM4A "


def test_the_same_clip_gives_the_same_bytes(tmp_path: Path, clip: np.ndarray, waveform: np.ndarray) -> None:
    path = make_clip(tmp_path / "a.mp4", clip, waveform)
    targets = [io.BytesIO(), io.BytesIO()]
    for target in targets:
        with path.open("rb") as source:
            write_sound_track(target, source)
    assert targets[0].getvalue() == targets[1].getvalue() != b""


def test_a_silent_clip_has_no_sound_track(tmp_path: Path, clip: np.ndarray) -> None:
    with make_clip(tmp_path / "a.mp4", clip, None).open("rb") as source, pytest.raises(NoSoundTrack):
        write_sound_track(tmp_path / "a.m4a", source)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_damage_is_reported_and_leaves_no_file(tmp_path: Path, clip: np.ndarray, waveform: np.ndarray) -> None:
    whole = make_clip(tmp_path / "a.mp4", clip, waveform).read_bytes()
    for damaged in (b"", whole[:100], b"no mp4" * 100):
        with pytest.raises(MediaError):
            write_sound_track(tmp_path / "a.m4a", io.BytesIO(damaged))
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
