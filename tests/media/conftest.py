"""A short clip with smooth motion, fine detail and saturated colour."""

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
