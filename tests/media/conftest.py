"""A short clip with smooth motion, fine detail and saturated colour, and sound as long."""

import numpy as np
import pytest


@pytest.fixture(scope="session")
def clip() -> np.ndarray:
    """uint8 [13, 48, 80, 3]."""
    frame, row, column = np.mgrid[:13, :48, :80]
    red = 127.5 + 127.5 * np.sin((column + 3 * frame) / 9)
    green = 127.5 + 100 * np.cos((row - 2 * frame) / 7)
    blue = 127.5 + 127.5 * np.sin((row + column) / 15 + frame / 3)
    return np.stack([red, green, blue], axis=-1).round().astype(np.uint8)


@pytest.fixture(scope="session")
def waveform() -> np.ndarray:
    """float32 [2, 26000], as long as the clip at 24 fps and 48 kHz: a sweep, another on the right, a click in both."""
    time_s = np.arange(26000) / 48000
    left, right = (
        np.sin(2 * np.pi * (start + slope * time_s) * time_s) for start, slope in ((200, 3000), (5000, -2000))
    )
    samples = 0.3 * np.stack([left, right]).astype(np.float32)
    samples[:, 7000] = 0.95
    return samples
