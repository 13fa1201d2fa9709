"""The engine's result -> files, in which the sound ends with the video."""

import numpy as np
import pytest
import torch

from cosmos3_core.errors import RequestError
from cosmos3_core.media.probe import probe_sound, probe_video, read_sound
from cosmos3_core.phyai import Cosmos3GenerationPostProcessor, GeneratedMedia

# 9 frames at 24 fps and 48 kHz.
NUM_SAMPLES = 18000


def make_output(num_samples=NUM_SAMPLES, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(1, 3, 9, 32, 48, generator=generator)
    sound = (torch.rand(2, num_samples, generator=generator) - 0.5).to(dtype)
    return {"video": pixels, "sound": sound, "sample_rate": 48000}


def test_pixels_alone_are_a_silent_clip(tmp_path):
    post = Cosmos3GenerationPostProcessor()
    media = post.postprocess(make_output()["video"])
    assert media.frames.shape == (9, 32, 48, 3)
    assert (media.sound, media.sampling_rate) == (None, None)
    assert probe_video(post.save_mp4(media, tmp_path / "a.mp4")).sound is None
    with pytest.raises(RequestError, match=r"media.sound must be .*got None.*made silent"):
        post.save_wav(media, tmp_path / "a.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sound_comes_along(dtype):
    output = make_output(dtype=dtype)
    media = Cosmos3GenerationPostProcessor().postprocess(output)
    assert media.sampling_rate == 48000
    assert media.sound.dtype == np.float32
    np.testing.assert_array_equal(media.sound, output["sound"].float().numpy())
    np.testing.assert_array_equal(media.frames, Cosmos3GenerationPostProcessor().postprocess(output["video"]).frames)


@pytest.mark.parametrize("num_samples", [NUM_SAMPLES, NUM_SAMPLES + 5000, NUM_SAMPLES - 1920])
def test_the_files_sound_ends_with_the_video(tmp_path, num_samples):
    post = Cosmos3GenerationPostProcessor()
    media = post.postprocess(make_output(num_samples))
    info = probe_video(post.save_mp4(media, tmp_path / "a.mp4"))
    assert (info.num_frames, info.sound.num_samples) == (9, NUM_SAMPLES)
    assert info.duration_s == info.sound.duration_s
    path = post.save_wav(media, tmp_path / "a.wav")
    assert probe_sound(path).num_samples == NUM_SAMPLES
    expected = np.zeros((2, NUM_SAMPLES), np.float32)
    expected[:, : min(num_samples, NUM_SAMPLES)] = media.sound[:, :NUM_SAMPLES]
    assert np.abs(read_sound(path) - expected).max() <= 0.5 / 32768 + 1e-9


def test_the_broadcast_rates_are_exact(tmp_path):
    post = Cosmos3GenerationPostProcessor(fps=29.97)
    path = post.save_mp4(post.postprocess(make_output()), tmp_path / "a.mp4")
    assert probe_video(path).sound.num_samples == 9 * 48000 * 1001 // 30000


@pytest.mark.parametrize("save", ["save_mp4", "save_wav"])
def test_sound_that_is_too_short_is_refused(tmp_path, save):
    post = Cosmos3GenerationPostProcessor()
    with pytest.raises(RequestError, match=r"at least 16080 samples for 9 frames .*16079 samples"):
        getattr(post, save)(post.postprocess(make_output(NUM_SAMPLES - 1921)), tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["video", "sound", "sample_rate"])
def test_a_mapping_without_a_key_names_it(key):
    output = make_output()
    del output[key]
    with pytest.raises(RequestError, match=f"missing: {key}"):
        Cosmos3GenerationPostProcessor().postprocess(output)


@pytest.mark.parametrize("sound", [torch.zeros(1, 2, 100), torch.zeros(2, 100).int()], ids=["batch", "integers"])
def test_other_sound_is_refused(sound):
    with pytest.raises(RequestError, match=r"sound must be .*\[channels, samples\]"):
        Cosmos3GenerationPostProcessor().postprocess({**make_output(), "sound": sound})


def test_frames_alone_make_media():
    assert GeneratedMedia(np.zeros((1, 2, 2, 3), np.uint8)).sound is None
