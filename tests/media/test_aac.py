"""The sound track of an mp4: in step with the pictures, as long as they are, and the same bytes in whatever order."""

import hashlib
import io
import subprocess
import sys
from fractions import Fraction
from types import SimpleNamespace

import av
import numpy as np
import pytest

from cosmos3_core.errors import ClosedError, MediaError, RequestError
from cosmos3_core.media.aac import AAC_SAMPLING_RATES, PacketInterleaver
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.probe import probe_video, read_frames, read_sound
from cosmos3_core.media.sound import SoundFormat
from cosmos3_core.shapes import sound_samples

STEREO = SoundFormat(48000, 2, 26000)
SIDES = {"height": 48, "width": 80}


def encode(target, clip, waveform, *, fps=24, rate=48000, num_samples=None):
    sound = SoundFormat(rate, len(waveform), num_samples or waveform.shape[1])
    with Mp4Writer(target, fps=fps, **SIDES, sound=sound) as writer:
        writer.write(clip)
        writer.write_sound(waveform)


def lag_samples(decoded, original):
    """By how many samples ``decoded`` is late; both [n]."""
    num_bins = 2 * max(len(decoded), len(original))
    spectrum = np.fft.rfft(decoded, num_bins) * np.fft.rfft(original, num_bins).conj()
    lag = int(np.fft.irfft(spectrum, num_bins).argmax())
    return lag if lag < num_bins / 2 else lag - num_bins


def edit_list(data, handler):
    """(duration, media time) of every edit of the track whose handler is ``handler``, such as b"soun"."""
    for track in data.split(b"trak")[1:]:
        if b"hdlr" + bytes(8) + handler in track:
            entries = track[track.index(b"elst") + 8 :]
            numbers = np.frombuffer(entries, ">i4", 1 + 3 * int.from_bytes(entries[:4], "big"))[1:].reshape(-1, 3)
            return [(int(duration), int(media_time)) for duration, media_time, _ in numbers]
    raise AssertionError("no such track")


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("rate", [48000, 44100, 16000])
def test_sound_is_in_step_and_exactly_as_long_as_asked(tmp_path, clip, waveform, num_channels, rate):
    path = tmp_path / "clip.mp4"
    encode(path, clip, waveform[:num_channels], rate=rate)
    sound = probe_video(path).sound
    assert (sound.codec, sound.sampling_rate, sound.num_channels, sound.num_samples) == (
        "aac",
        rate,
        num_channels,
        26000,
    )
    decoded = read_sound(path)
    assert (decoded.dtype, decoded.shape) == (np.float32, (num_channels, 26000))
    for there, here in zip(decoded, waveform, strict=False):
        assert lag_samples(there, here) == 0


def test_the_click_is_where_it_was_and_the_sides_are_not_swapped(tmp_path, clip, waveform):
    encode(tmp_path / "clip.mp4", clip, waveform)
    decoded = read_sound(tmp_path / "clip.mp4")
    assert np.abs(decoded).argmax(axis=1).tolist() == [7000, 7000]
    correlation = np.corrcoef(np.concatenate([decoded, waveform]))[:2, 2:]
    assert correlation.diagonal().min() > 0.95
    assert abs(correlation[0, 1]) < 0.2


def test_sound_does_not_begin_with_a_burst(tmp_path, clip, waveform):
    encode(tmp_path / "clip.mp4", clip, waveform)
    error = (read_sound(tmp_path / "clip.mp4") - waveform)[:, :1024]
    assert np.square(error).mean() < 1e-3 * np.square(waveform[:, :1024]).mean()  # 30 dB


def test_players_are_told_to_skip_the_encoders_delay(tmp_path, clip, waveform):
    encode(tmp_path / "clip.mp4", clip, waveform)
    data = (tmp_path / "clip.mp4").read_bytes()
    assert edit_list(data, b"soun") == [(26000, 1024)]
    assert [duration for duration, _ in edit_list(data, b"vide")] == [26000]  # 13 frames at 24 fps, in samples
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert [stream.start_time for stream in container.streams] == [0, 0]


@pytest.mark.parametrize("num_frames", [1, 5, 13])
@pytest.mark.parametrize("fps", [24, 23.976, 29.97, 12.5])
@pytest.mark.parametrize("rate", [48000, 7350])
def test_sound_and_pictures_end_together(tmp_path, clip, num_frames, fps, rate):
    num_samples = sound_samples(num_frames, fps, rate)
    encode(tmp_path / "clip.mp4", clip[:num_frames], np.zeros((2, num_samples), np.float32), fps=fps, rate=rate)
    info = probe_video(tmp_path / "clip.mp4")
    assert (info.num_frames, info.sound.num_samples) == (num_frames, num_samples)
    assert 0 <= info.duration_s - info.sound.duration_s < 1 / rate + 1e-9


@pytest.mark.parametrize("num_samples", [1, 1023, 1024, 1025, 2048])
def test_tracks_of_about_a_frame(tmp_path, clip, waveform, num_samples):
    encode(tmp_path / "clip.mp4", clip, waveform[:, :num_samples])
    assert read_sound(tmp_path / "clip.mp4").shape == (2, num_samples)


def test_what_exceeds_the_track_is_dropped_and_what_exceeds_one_is_clipped(clip, waveform):
    exact, longer, loud = io.BytesIO(), io.BytesIO(), io.BytesIO()
    encode(exact, clip, waveform[:, :5000])
    encode(longer, clip, waveform, num_samples=5000)
    assert exact.getvalue() == longer.getvalue()
    encode(loud, clip, waveform * 9)
    encode(clipped := io.BytesIO(), clip, np.clip(waveform * 9, -1, 1))
    assert loud.getvalue() == clipped.getvalue()


def test_the_pictures_are_those_of_the_silent_file(tmp_path, clip, waveform):
    encode(tmp_path / "sound.mp4", clip, waveform)
    with Mp4Writer(tmp_path / "silent.mp4", fps=24, **SIDES) as writer:
        writer.write(clip)
    assert probe_video(tmp_path / "silent.mp4").sound is None
    for heard, silent in zip(read_frames(tmp_path / "sound.mp4"), read_frames(tmp_path / "silent.mp4"), strict=True):
        np.testing.assert_array_equal(heard, silent)


# --- reproducible ----------------------------------------------------------------------------------------------------


def in_order(order, clip, waveform):
    """The file when pictures ("v") and sound ("s") come in these pieces: (kind, first, last + 1)."""
    target = io.BytesIO()
    with Mp4Writer(target, fps=24, **SIDES, sound=SoundFormat(48000, 2, waveform.shape[1])) as writer:
        for kind, first, stop in order:
            if kind == "v":
                writer.write(clip[first:stop])
            else:
                writer.write_sound(waveform[:, first:stop])
    return target.getvalue()


def test_the_order_of_sound_and_pictures_does_not_change_the_bytes(clip, waveform):
    # Long enough that x264 gives packets before its end, and that FFmpeg's own interleaving (10 s) would set in.
    frames, samples = np.tile(clip, (20, 1, 1, 1)), np.tile(waveform, (1, 20))
    num_frames, num_samples = len(frames), samples.shape[1]
    assert num_frames / 24 > 10
    pictures, sound = ("v", 0, num_frames), ("s", 0, num_samples)
    cuts = [0, 1, 4, 90, 91, 200, num_frames]
    mixed = []
    for first, stop in zip(cuts[:-1], cuts[1:], strict=True):
        late = (first * 1999, stop * 1999 if stop < num_frames else num_samples)
        mixed += [("s", *late), ("v", first, stop)] if first % 2 else [("v", first, stop), ("s", *late)]
    files = [in_order(order, frames, samples) for order in ([pictures, sound], [sound, pictures], mixed)]
    assert files[0] == files[1] == files[2]


_SUBPROCESS = """
import sys
import numpy as np
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.sound import SoundFormat
data = np.load(sys.argv[1])
with Mp4Writer(sys.argv[2], fps=24, height=48, width=80, sound=SoundFormat(48000, 2, 26000)) as writer:
    writer.write_sound(data["waveform"])
    writer.write(data["clip"])
"""


def test_two_processes_write_the_same_bytes_and_no_version(tmp_path, clip, waveform):
    np.savez(tmp_path / "data.npz", clip=clip, waveform=waveform)
    digests = []
    for name in ("first.mp4", "second.mp4"):
        command = [sys.executable, "-c", _SUBPROCESS, str(tmp_path / "data.npz"), str(tmp_path / name)]
        subprocess.run(command, check=True, timeout=60)
        digests.append(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
    assert digests[0] == digests[1]
    assert b"Lavc" not in (tmp_path / "first.mp4").read_bytes()


def test_packets_wait_until_it_is_known_which_comes_first():
    def packets(time_base, *times):
        return [SimpleNamespace(dts=time, time_base=time_base) for time in times]

    video, sound = packets(Fraction(1, 2), -1, 0, 1, 2), packets(Fraction(1, 10), -1, 4, 5, 12)
    order = PacketInterleaver(2)
    assert order.add(0, video[:3]) == []
    # -0.5 s, -0.1, 0, 0.4, 0.5 (both: the first track first); then the first track has none waiting.
    assert order.add(1, sound[:3]) == [video[0], sound[0], video[1], sound[1], video[2]]
    assert order.add(1, sound[3:]) == []
    assert order.add(0, video[3:]) == [sound[2], video[3]]
    assert order.flush() == [sound[3]]
    assert PacketInterleaver(1).add(0, video) == video


# --- failures --------------------------------------------------------------------------------------------------------


def test_too_few_samples_are_a_media_error_that_counts_them(tmp_path, clip, waveform):
    path = tmp_path / "clip.mp4"
    with (
        pytest.raises(MediaError, match="only 999 of the 26000 samples"),
        Mp4Writer(path, fps=24, **SIDES, sound=STEREO) as writer,
    ):
        writer.write(clip)
        writer.write_sound(waveform[:, :999])
    assert list(tmp_path.iterdir()) == []


def test_sound_without_pictures_is_no_mp4(tmp_path, waveform):
    with (
        pytest.raises(MediaError, match="no frame was written"),
        Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, sound=STEREO) as writer,
    ):
        writer.write_sound(waveform)
    assert list(tmp_path.iterdir()) == []


def test_a_silent_mp4_takes_no_sound(tmp_path, clip, waveform):
    with Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES) as writer:
        with pytest.raises(RequestError, match="left out of this mp4 .*SoundFormat"):
            writer.write_sound(waveform)
        writer.write(clip)
    with pytest.raises(MediaError, match="no sound"):
        read_sound(tmp_path / "clip.mp4")


def test_wrong_samples_are_refused_and_the_writer_goes_on(tmp_path, clip, waveform):
    with Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, sound=STEREO) as writer:
        with pytest.raises(RequestError, match=r"a float32 array \[2, n\]"):
            writer.write_sound(waveform[:1])
        writer.write_sound(waveform)
        writer.write(clip)
    with pytest.raises(ClosedError):
        writer.write_sound(waveform)


def test_a_failing_muxer_is_a_media_error_and_leaves_nothing(tmp_path, waveform, monkeypatch):
    writer = Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, sound=STEREO)

    def fail(packets):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer, "_container", SimpleNamespace(mux=fail, close=writer._container.close))
    with pytest.raises(MediaError, match=r"stopped at sample 2000 of sound: .*No space left"):
        writer.write_sound(waveform[:, :2000])
    assert list(tmp_path.iterdir()) == []


def test_a_rate_that_aac_lacks_is_refused(tmp_path):
    with pytest.raises(RequestError, match="sampling_rate must be one of 96000.*got 48001.*wav, which takes any rate"):
        Mp4Writer(tmp_path / "clip.mp4", fps=24, **SIDES, sound=SoundFormat(48001, 2, 100))
    assert list(tmp_path.iterdir()) == []


def test_every_rate_of_the_list_opens(tmp_path, clip, waveform):
    for rate in AAC_SAMPLING_RATES:
        encode(tmp_path / "clip.mp4", clip[:1], waveform[:, :3000], rate=rate)
        assert probe_video(tmp_path / "clip.mp4").sound.sampling_rate == rate
