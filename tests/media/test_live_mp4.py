"""The live file of an mp4 in the making: grows by whole fragments, plays as far as it came, changes nothing else."""

from pathlib import Path

import av
import numpy as np
import pytest

from cosmos3_core.errors import MediaError
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.probe import read_frames, read_sound
from cosmos3_core.media.sound import SoundFormat
from cosmos3_core.media.writer import ClipFormat, open_writer

NUM_FRAMES = 48
RATE = 48000
SAMPLES_A_FRAME = 2000  # at 24 fps
NUM_SAMPLES = NUM_FRAMES * SAMPLES_A_FRAME
SIDES = {"height": 48, "width": 80}
SOUND = SoundFormat(RATE, 2, NUM_SAMPLES)


@pytest.fixture(scope="module")
def long_clip():
    """uint8 [48, 48, 80, 3]: moves, and ends elsewhere than it began."""
    frame, row, column = np.mgrid[:NUM_FRAMES, :48, :80]
    planes = [
        127.5 + 120 * np.sin((column + speed * frame + row) / width) for speed, width in ((3, 9), (-2, 7), (1, 15))
    ]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


@pytest.fixture(scope="module")
def sweep():
    """float32 [2, 96000], as long as the clip; a click on both sides at 1 s."""
    time_s = np.arange(NUM_SAMPLES) / RATE
    samples = 0.3 * np.stack([np.sin(2 * np.pi * (200 + 900 * time_s) * time_s)] * 2).astype(np.float32)
    samples[:, RATE] = 0.95
    return samples


def boxes(data):
    """(name, content) of an mp4's outermost boxes; the last one has to be whole."""
    found, position = [], 0
    while position < len(data):
        num_bytes = int.from_bytes(data[position : position + 4], "big")
        assert num_bytes >= 8
        assert position + num_bytes <= len(data), "a box was cut off"
        found.append((data[position + 4 : position + 8].decode("ascii"), data[position + 8 : position + num_bytes]))
        position += num_bytes
    return found


def make(folder, clip, samples=None, *, live=True, fps=24, cuts=1, **options):
    """Write a clip into ``folder``; returns the paths of the file and of the live file."""
    folder.mkdir(exist_ok=True)
    path, beside = folder / "clip.mp4", folder / "live.mp4"
    if samples is not None:
        options["sound"] = SoundFormat(RATE, len(samples), samples.shape[1])
    with Mp4Writer(path, fps=fps, **SIDES, live=beside if live else None, **options) as writer:
        for part in np.array_split(clip, cuts):
            writer.write(part)
        if samples is not None:
            for part in np.array_split(samples, cuts, axis=1):
                writer.write_sound(part)
    return path, beside


def times_s(path, kind):
    with av.open(str(path)) as container:
        return [float(frame.time) for frame in container.decode(**{kind: 0})]


@pytest.mark.parametrize("with_sound", [False, True])
def test_a_live_file_grows_by_whole_fragments_and_plays_before_the_end(tmp_path, long_clip, sweep, with_sound):
    path, live = tmp_path / "clip.mp4", tmp_path / "live.mp4"
    sound = SOUND if with_sound else None
    seen, decoded = [b""], {}
    with Mp4Writer(path, fps=24, **SIDES, sound=sound, live=live) as writer:
        assert live.exists()
        for index in range(NUM_FRAMES):
            if with_sound:
                writer.write_sound(sweep[:, index * SAMPLES_A_FRAME : (index + 1) * SAMPLES_A_FRAME])
            writer.write(long_clip[index : index + 1])
            data = live.read_bytes()
            assert data.startswith(seen[-1])
            if data == seen[-1]:
                continue
            seen.append(data)
            names = [name for name, _ in boxes(data)]
            assert names == ["ftyp", "moov", *["moof", "mdat"] * ((len(names) - 2) // 2)]
            if len(seen) in (2, 6):
                assert len(names) > 2
                assert not path.exists()
                decoded[index + 1] = list(read_frames(live))
        assert min(decoded) <= 16, "frames until the first fragment"
        assert len(seen) > 12
    assert live.read_bytes().startswith(seen[-1])
    finished = list(read_frames(path))
    for frames in decoded.values():
        assert len(frames) >= 2
        assert all(np.array_equal(*pair) for pair in zip(frames, finished, strict=False))
    assert all(np.array_equal(*pair) for pair in zip(read_frames(live), finished, strict=True))
    assert len(boxes(live.read_bytes())) > len(boxes(seen[-1]))


def test_the_header_names_no_samples_and_fragments_stand_alone(tmp_path, long_clip, sweep):
    _, live = make(tmp_path, long_clip, sweep)
    found = boxes(live.read_bytes())
    moov = found[1][1]
    for table in (b"stsz", b"stts", b"stco"):
        for part in moov.split(table)[1:]:
            assert int.from_bytes(part[8:12] if table == b"stsz" else part[4:8], "big") == 0
    assert moov.count(b"trex") == 2
    for name, content in found:
        for part in content.split(b"tfhd")[1:] if name == "moof" else []:
            assert part[1] & 2, "default-base-is-moof"
            assert not part[3] & 1, "no offset from the beginning of the file"


def test_sound_is_in_step_with_the_pictures(tmp_path, long_clip, sweep):
    path, live = make(tmp_path, long_clip, sweep)
    assert times_s(live, "video") == times_s(path, "video") == [index / 24 for index in range(NUM_FRAMES)]
    with av.open(str(live)) as container:
        heard_at, heard = zip(*((frame.time, frame.to_ndarray()) for frame in container.decode(audio=0)), strict=True)
    assert heard_at[0] == 0
    heard = np.concatenate(heard, axis=1)
    assert np.abs(heard).argmax(axis=1).tolist() == [RATE, RATE]
    assert np.array_equal(heard[:, :NUM_SAMPLES], read_sound(path))
    assert NUM_SAMPLES <= heard.shape[1] < NUM_SAMPLES + 1024


@pytest.mark.parametrize("options", [{}, {"fps": 23.976}, {"fps": 60}, {"lossless": True}], ids=str)
@pytest.mark.parametrize("with_sound", [False, True])
def test_the_finished_file_does_not_depend_on_the_live_file(tmp_path, long_clip, sweep, options, with_sound):
    samples = sweep if with_sound else None
    path, live = make(tmp_path / "with", long_clip, samples, **options)
    alone, none = make(tmp_path / "without", long_clip, samples, live=False, **options)
    assert path.read_bytes() == alone.read_bytes()
    assert not none.exists()
    assert times_s(live, "video") == times_s(path, "video")


def test_cuts_and_runs_do_not_change_it(tmp_path, long_clip, sweep):
    _, whole = make(tmp_path / "whole", long_clip, sweep)
    _, again = make(tmp_path / "again", long_clip, sweep)
    _, parts = make(tmp_path / "parts", long_clip, sweep, cuts=7)
    assert whole.read_bytes() == again.read_bytes() == parts.read_bytes()


@pytest.mark.parametrize("num_frames", [1, 2, 5])
def test_clips_shorter_than_the_encoders_delay(tmp_path, long_clip, sweep, num_frames):
    path, live = make(tmp_path, long_clip[:num_frames], sweep[:, : num_frames * SAMPLES_A_FRAME])
    assert len(list(read_frames(live))) == num_frames
    assert times_s(live, "video") == times_s(path, "video")


class Interrupted(Exception):
    pass


def test_an_abandoned_clip_leaves_a_playable_live_file(tmp_path, long_clip):
    live = tmp_path / "live.mp4"
    with pytest.raises(Interrupted), Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, live=live) as writer:
        writer.write(long_clip[:30])
        before = live.read_bytes()
        raise Interrupted
    assert list(tmp_path.iterdir()) == [live]
    assert live.read_bytes().startswith(before)
    assert 2 <= len(list(read_frames(live))) < 30
    assert str(live) not in [str(Path(link).resolve()) for link in Path("/proc/self/fd").iterdir()]


def test_a_live_file_that_cannot_be_written_fails_the_clip(tmp_path, long_clip):
    writer = Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, live="/dev/full")
    with pytest.raises(MediaError, match=r"stopped at frame \d+: .*No space left"):
        writer.write(long_clip)
    assert list(tmp_path.iterdir()) == []


def test_an_invalid_path_is_refused_at_once(tmp_path):
    with pytest.raises(MediaError, match=r"the live file .* could not be created"):
        Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, live=tmp_path / "missing" / "live.mp4")
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_looks_like_a_url_is_a_file(tmp_path, long_clip, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Mp4Writer("clip.mp4", fps=24, **SIDES, live="http:live%03d.mp4") as writer:
        writer.write(long_clip[:3])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip.mp4", "http:live%03d.mp4"]


def test_only_mp4s_have_a_live_file(tmp_path, long_clip):
    kinds = {"mp4": (None, True), "png": (None, False), "wav": (SOUND, False)}
    for kind, (sound, has_live) in kinds.items():
        clip_format = ClipFormat(kind, 48, 80, 24, sound=sound)
        assert clip_format.has_live_file == has_live
        with open_writer(tmp_path / kind, clip_format, tmp_path / f"live of {kind}") as writer:
            if kind == "wav":
                writer.write_sound(np.zeros((2, NUM_SAMPLES), np.float32))
            else:
                writer.write(long_clip[:1])
        assert (tmp_path / f"live of {kind}").exists() == has_live
