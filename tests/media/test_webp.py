"""Animated WebP of previews: what is in it, and that it stays small."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import PIL.ImageSequence
import pytest

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media import webp
from cosmos3_core.media.webp import MAX_BYTES, MAX_FRAMES, animate_webp


def open_webp(data):
    return PIL.Image.open(io.BytesIO(data), formats=["WEBP"])


def ramp(num_frames, height, width):
    """Frames that grow brighter, darker to the left."""
    columns = np.linspace(0, 120, width, dtype=np.float64)
    rows = [
        np.broadcast_to((columns + 100 * index / num_frames)[:, None], (height, width, 3))
        for index in range(num_frames)
    ]
    return np.stack(rows).astype(np.uint8)


@pytest.mark.parametrize(
    ("height", "width", "scaled"),
    [(45, 80, (256, 144)), (80, 45, (144, 256)), (1, 1, (256, 256)), (1, 300, (256, 1)), (400, 600, (256, 171))],
)
def test_frames_are_scaled_to_a_longest_side_and_decode_in_order(height, width, scaled):
    frames = ramp(5, height, width)
    data = animate_webp(frames, fps=4.0)
    with open_webp(data) as image:
        assert image.size == scaled
        assert image.n_frames == 5
        shown = [np.asarray(it.convert("RGB")).mean() for it in PIL.ImageSequence.Iterator(image)]
        assert image.info["duration"] == 250
        assert image.info["loop"] == 0
    assert np.allclose(shown, frames.mean(axis=(1, 2, 3)), atol=4)
    assert animate_webp(frames, fps=4.0) == data


def test_a_single_frame_is_a_still():
    frame = ramp(1, 12, 20)
    with open_webp(animate_webp(frame, fps=24.0)) as image:
        assert not image.is_animated
        assert abs(np.asarray(image.convert("RGB")).mean() - frame.mean()) < 4


@pytest.mark.parametrize("shape", [(MAX_FRAMES, 64, 64, 3), (MAX_FRAMES, 256, 256, 3)])
def test_noise_of_the_largest_size_stays_within_the_bound(shape):
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    data = animate_webp(frames, fps=1.0)
    assert len(data) <= MAX_BYTES
    with open_webp(data) as image:
        assert image.size == (256, 256)
        # As many frames as fit: all of what is smooth between latent positions, some of noise in every pixel.
        assert image.n_frames == (MAX_FRAMES if shape[1] == 64 else MAX_FRAMES // 2)


def test_what_cannot_be_made_small_is_refused(monkeypatch):
    monkeypatch.setattr(webp, "MAX_BYTES", 20)
    with pytest.raises(MediaError, match="one frame alone takes more than 20 bytes"):
        animate_webp(ramp(3, 4, 4), fps=1.0)


@pytest.mark.parametrize(
    ("frames", "fps", "field"),
    [
        (np.zeros((0, 4, 4, 3), np.uint8), 1.0, "frames"),
        (np.zeros((MAX_FRAMES + 1, 4, 4, 3), np.uint8), 1.0, "frames"),
        (np.zeros((1, 0, 4, 3), np.uint8), 1.0, "frames"),
        (np.zeros((1, 4, 4, 3), np.float32), 1.0, "frames"),
        (np.zeros((1, 4, 4, 3), np.uint8), 0.0, "fps"),
        (np.zeros((1, 4, 4, 3), np.uint8), float("nan"), "fps"),
    ],
)
def test_other_frames_and_rates_are_refused(frames, fps, field):
    with pytest.raises(RequestError, match=f"^{field} must be "):
        animate_webp(frames, fps)
