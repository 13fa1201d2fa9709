"""Image files: png exact, jpeg and webp close; all, reproducible, whole or absent."""

import io

import numpy as np
import PIL.Image
import pytest

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media import image as image_module
from cosmos3_core.media.image import write_image
from cosmos3_core.media.probe import read_frames


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("frame", [noise(48, 80), noise(1, 1), noise(7, 33)], ids=["even", "pixel", "odd"])
def test_pixels_come_back_exactly(tmp_path, frame):
    path = tmp_path / "frame.png"
    write_image(path, frame, "png")
    np.testing.assert_array_equal(next(read_frames(path)), frame)
    with PIL.Image.open(path) as image:
        assert image.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(image), frame)


def test_bytes_are_reproducible_and_a_stream_gets_the_same(tmp_path, clip):
    paths = tmp_path / "a.png", tmp_path / "b.png"
    for path in paths:
        write_image(path, clip[3], "png")
    stream = io.BytesIO()
    write_image(stream, clip[3], "png")
    assert paths[0].read_bytes() == paths[1].read_bytes() == stream.getvalue()
    assert sorted(tmp_path.iterdir()) == sorted(paths)


def test_a_view_in_another_memory_order(tmp_path, clip):
    write_image(tmp_path / "view.png", clip[0][::-1, ::-1], "png")
    np.testing.assert_array_equal(next(read_frames(tmp_path / "view.png")), clip[0][::-1, ::-1])


@pytest.mark.parametrize(
    "frame",
    [np.zeros((1, 8, 8, 3), np.uint8), np.zeros((8, 8, 3), np.float32), np.zeros((8, 8, 4), np.uint8), "a.png"],
    ids=["clip", "float", "alpha", "text"],
)
def test_wrong_frames_are_refused(tmp_path, frame):
    with pytest.raises(RequestError, match=r"a uint8 array \[Y, X, 3\]"):
        write_image(tmp_path / "frame.png", frame, "png")
    assert list(tmp_path.iterdir()) == []


def test_an_empty_frame_is_refused(tmp_path):
    with pytest.raises(RequestError, match="at least one pixel"):
        write_image(tmp_path / "frame.png", np.zeros((0, 8, 3), np.uint8), "png")


def test_a_missing_directory_is_named(tmp_path, clip):
    with pytest.raises(RequestError, match="create the directory first"):
        write_image(tmp_path / "missing" / "frame.png", clip[0], "png")


# --- jpeg and webp ---------------------------------------------------------------------------------------------------


def pixels_of(path, kind):
    with PIL.Image.open(path) as image:
        assert (image.format.lower(), image.mode) == (kind, "RGB")
        return np.asarray(image)


def mean_error(first, second):
    return np.abs(first.astype(int) - second).mean()


@pytest.mark.parametrize("kind", ["jpeg", "webp"])
def test_quality_is_closer_and_larger(tmp_path, clip, kind):
    errors, sizes = [], []
    for quality in (0, 30, 90):
        path = tmp_path / f"{quality}"
        write_image(path, clip[3], kind, quality)
        errors.append(mean_error(pixels_of(path, kind), clip[3]))
        sizes.append(path.stat().st_size)
    assert errors[0] > errors[1] > errors[2]
    assert sizes[0] < sizes[1] < sizes[2]
    assert errors[2] < 3


def test_jpeg_keeps_chroma_at_full_resolution(tmp_path):
    stripes = np.zeros((32, 32, 3), np.uint8)
    stripes[:, ::2, 0] = stripes[:, 1::2, 2] = 255  # halved, red and blue columns would all be purple
    write_image(tmp_path / "a.jpg", stripes, "jpeg", 100)
    assert mean_error(pixels_of(tmp_path / "a.jpg", "jpeg"), stripes) < 2


@pytest.mark.parametrize("frame", [noise(48, 80), noise(1, 1), noise(7, 33)], ids=["even", "pixel", "odd"])
def test_webp_is_exact_at_100(tmp_path, frame):
    write_image(tmp_path / "a.webp", frame, "webp", 100)
    np.testing.assert_array_equal(pixels_of(tmp_path / "a.webp", "webp"), frame)


@pytest.mark.parametrize(("kind", "quality"), [("jpeg", 90), ("webp", 90), ("webp", 100), ("png", 90)])
def test_bytes_of_every_kind_are_reproducible_in_any_memory_order(tmp_path, clip, kind, quality):
    first, second = io.BytesIO(), io.BytesIO()
    write_image(first, clip[3], kind, quality)
    write_image(second, np.asfortranarray(clip[3]), kind, quality)
    write_image(tmp_path / "a", clip[3], kind, quality)
    assert first.getvalue() == second.getvalue() == (tmp_path / "a").read_bytes()


def test_png_knows_no_quality(clip):
    files = [io.BytesIO() for _ in range(3)]
    write_image(files[0], clip[0], "png")
    write_image(files[1], clip[0], "png", 0)
    write_image(files[2], clip[0], "png", 100)
    assert files[0].getvalue() == files[1].getvalue() == files[2].getvalue()


@pytest.mark.parametrize(
    ("kind", "quality", "field"), [("gif", 90, "kind"), ("jpeg", -1, "quality"), ("webp", True, "quality")]
)
def test_wrong_settings_name_the_field(tmp_path, clip, kind, quality, field):
    with pytest.raises(RequestError) as caught:
        write_image(tmp_path / "a", clip[0], kind, quality)
    assert caught.value.field == field
    assert list(tmp_path.iterdir()) == []


def test_a_side_that_the_format_cannot_state_is_refused(tmp_path):
    with pytest.raises(RequestError, match="width must be .*1 to 16383 .*16384"):
        write_image(tmp_path / "a.webp", np.zeros((1, 16384, 3), np.uint8), "webp")


@pytest.mark.parametrize(("failure", "raised"), [(OSError, MediaError), (MemoryError, MemoryError)])
def test_a_failing_encoder_leaves_nothing(tmp_path, clip, monkeypatch, failure, raised):
    def fail(*_):
        raise failure("encoder error -2")

    monkeypatch.setattr(image_module, "_encode_lossy", fail)
    with pytest.raises(raised, match="the JPEG could not be written: encoder error"):
        write_image(tmp_path / "a.jpg", clip[0], "jpeg")
    assert list(tmp_path.iterdir()) == []
