"""Sound formats and wav files: exact, reproducible, whole or absent."""

import io
import wave

import numpy as np
import pytest

from cosmos3_core.errors import ClosedError, MediaError, RequestError
from cosmos3_core.media.probe import SoundInfo, probe_sound, probe_video, read_sound
from cosmos3_core.media.sound import SampleCounter, SoundFormat, WavWriter, to_pcm16

STEREO = SoundFormat(48000, 2, 26000)


def write_wav(target, samples, rate=48000, cuts=()):
    with WavWriter(target, SoundFormat(rate, len(samples), samples.shape[1])) as writer:
        for chunk in np.split(samples, cuts, axis=1):
            writer.write_sound(chunk)


@pytest.mark.parametrize("num_channels", [1, 2])
@pytest.mark.parametrize("rate", [48000, 44100, 7001])
def test_samples_come_back_within_half_a_step(tmp_path, waveform, num_channels, rate):
    samples = waveform[:num_channels]
    path = tmp_path / "sound.wav"
    write_wav(path, samples, rate)
    assert probe_sound(path) == SoundInfo("pcm_s16le", rate, num_channels, 26000, 26000 / rate)
    decoded = read_sound(path)
    assert (decoded.dtype, decoded.shape) == (np.float32, samples.shape)
    assert np.abs(decoded - samples).max() <= 0.5 / 32768 + 1e-9


def test_the_file_is_what_the_standard_library_reads(tmp_path):
    samples = np.array([[0.0, 0.5, -1.0], [0.25, -0.25, 1.0]], np.float32)
    write_wav(tmp_path / "sound.wav", samples)
    with wave.open(str(tmp_path / "sound.wav")) as file:
        assert file.getparams()[:4] == (2, 2, 48000, 3)
        frames = np.frombuffer(file.readframes(3), "<i2").reshape(3, 2)
    assert frames.tolist() == [[0, 8192], [16384, -8192], [-32768, 32767]]


def test_rounding_goes_to_the_nearest_and_stops_at_the_ends():
    steps = np.array([[0.4, 0.6, 1.5, 2.5, -0.6, 32767, 32768, 99999, -32768, -32769]])
    assert to_pcm16((steps / 32768).astype(np.float32)).tolist() == [
        [0, 1, 2, 2, -1, 32767, 32767, 32767, -32768, -32768]
    ]


def test_cuts_and_targets_do_not_change_the_bytes(tmp_path, waveform):
    write_wav(tmp_path / "whole.wav", waveform)
    write_wav(tmp_path / "cut.wav", waveform, cuts=(0, 1, 1024, 20001))
    stream = io.BytesIO()
    write_wav(stream, waveform)
    assert (tmp_path / "whole.wav").read_bytes() == (tmp_path / "cut.wav").read_bytes() == stream.getvalue()
    assert len(stream.getvalue()) == 44 + 26000 * 4
    assert len(list(tmp_path.iterdir())) == 2


def test_what_exceeds_the_track_is_dropped(tmp_path, waveform):
    path = tmp_path / "sound.wav"
    with WavWriter(path, SoundFormat(48000, 2, 100)) as writer:
        for chunk in (waveform[:, :90], waveform[:, 90:300], waveform[:, 300:]):
            writer.write_sound(chunk)
    assert read_sound(path).shape == (2, 100)


def test_too_few_samples_are_a_media_error_that_counts_them(tmp_path, waveform):
    with (
        pytest.raises(MediaError, match="only 25999 of the 26000 samples"),
        WavWriter(tmp_path / "a", STEREO) as writer,
    ):
        writer.write_sound(waveform[:, 1:])
    assert list(tmp_path.iterdir()) == []


def test_an_exception_in_the_block_leaves_the_old_file(tmp_path, waveform):
    path = tmp_path / "sound.wav"
    path.write_bytes(b"the one before")
    with pytest.raises(KeyError), WavWriter(path, STEREO) as writer:
        writer.write_sound(waveform)
        raise KeyError
    assert path.read_bytes() == b"the one before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_a_media_error_and_leaves_nothing(tmp_path, waveform, monkeypatch):
    writer = WavWriter(tmp_path / "sound.wav", STEREO)
    writer.write_sound(waveform[:, :10])

    def fail(data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer._wave, "writeframesraw", fail)
    with pytest.raises(MediaError, match="No space left"):
        writer.write_sound(waveform)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ClosedError):
        writer.write_sound(waveform)


def test_use_after_close_is_refused(tmp_path, waveform):
    writer = WavWriter(tmp_path / "sound.wav", STEREO)
    writer.write_sound(waveform)
    writer.close()
    writer.close()
    writer.abort()
    assert (tmp_path / "sound.wav").exists()
    with pytest.raises(ClosedError, match="open a new one"):
        writer.write_sound(waveform)
    with pytest.raises(ClosedError), writer:
        pass


def test_a_wav_takes_no_frames(tmp_path, waveform, clip):
    with WavWriter(tmp_path / "sound.wav", STEREO) as writer:
        with pytest.raises(RequestError, match="left out of a wav"):
            writer.write(clip)
        writer.write_sound(waveform)
    with pytest.raises(MediaError, match="no video stream"):
        probe_video(tmp_path / "sound.wav")


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros((2, 5)), r"a float32 array \[2, n\] .*float64 \[2, 5\]"),
        (np.zeros((1, 5), np.float32), r"a float32 array \[2, n\] .*float32 \[1, 5\]"),
        (np.zeros(5, np.float32), r"float32 \[5\]"),
        ([[0.0], [0.0]], "list.*convert a tensor"),
        (np.array([[0], [np.nan]], np.float32), "NaN or infinity"),
        (np.array([[np.inf], [0]], np.float32), "NaN or infinity"),
    ],
    ids=["double", "mono", "flat", "list", "nan", "inf"],
)
def test_wrong_samples_are_refused_and_not_counted(samples, message):
    counter = SampleCounter(STEREO)
    with pytest.raises(RequestError, match=message):
        counter.take(samples)
    assert counter.num_samples == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("sampling_rate", 999),
        ("sampling_rate", 48000.0),
        ("num_channels", 0),
        ("num_channels", 3),
        ("num_samples", 0),
        ("num_samples", True),
        ("num_samples", 10**9 + 1),
    ],
)
def test_wrong_formats_name_the_field(field, value):
    with pytest.raises(RequestError) as caught:
        SoundFormat(**{"sampling_rate": 48000, "num_channels": 2, "num_samples": 1, field: value})
    assert caught.value.field == field


@pytest.mark.parametrize("content", [None, b"", b"not a sound " * 100], ids=["missing", "empty", "text"])
@pytest.mark.parametrize("read", [probe_sound, read_sound])
def test_unreadable_files_are_media_errors(tmp_path, content, read):
    path = tmp_path / "sound.wav"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(MediaError, match=r"sound.wav: "):
        read(path)
