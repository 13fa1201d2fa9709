"""PNG files: exact, reproducible, whole or absent."""

import io

import numpy as np
import PIL.Image
import pytest

from cosmos3_core.errors import RequestError
from cosmos3_core.media.image import write_png
from cosmos3_core.media.probe import read_frames


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("frame", [noise(48, 80), noise(1, 1), noise(7, 33)], ids=["even", "pixel", "odd"])
def test_pixels_come_back_exactly(tmp_path, frame):
    path = tmp_path / "frame.png"
    write_png(path, frame)
    np.testing.assert_array_equal(next(read_frames(path)), frame)
    with PIL.Image.open(path) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), frame)


def test_bytes_are_reproducible_and_a_stream_gets_the_same(tmp_path, clip):
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path in paths:
        write_png(path, clip[3])
    stream = io.BytesIO()
    write_png(stream, clip[3])
    assert paths[0].read_bytes() == paths[1].read_bytes() == stream.getvalue()
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_view_in_another_memory_order(tmp_path, clip):
    write_png(tmp_path / "view.png", clip[0][::-1, ::-1])
    np.testing.assert_array_equal(next(read_frames(tmp_path / "view.png")), clip[0][::-1, ::-1])


@pytest.mark.parametrize(
    "frame",
    [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), "a.png"],
    ids=["clip", "float", "alpha", "text"],
)
def test_wrong_frames_are_refused(tmp_path, frame):
    with pytest.raises(RequestError, match=r"a uint8 array \[Y, X, 3\]"):
        write_png(tmp_path / "frame.png", frame)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_frame_is_refused(tmp_path):
    with pytest.raises(RequestError, match="at least one pixel"):
        write_png(tmp_path / "frame.png", np.zeros((0, 8, 3), np.uint8))


def test_a_missing_directory_is_named(tmp_path, clip):
    with pytest.raises(RequestError, match="Create the directory first"):
        write_png(tmp_path / "missing" / "frame.png", clip[0])
