"""Small pictures of our files: which frames, how large, in what place, and in how much memory."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from cosmos3_core.errors import MediaError
from cosmos3_core.media.image import write_image
from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.sound import SoundFormat
from cosmos3_core.media.thumbnail import (
    MAX_TILES,
    THUMBNAIL_SIDE,
    TILE_SIDE,
    pick_indices,
    sheet_columns,
    write_spritesheet,
    write_thumbnail,
)
from cosmos3_core.media.writer import ClipFormat, open_writer


def grey_level(index: int, num_frames: int) -> int:
    return round(20 + 215 * index / max(1, num_frames - 1))


def make_clip(path: Path, num_frames: int, height: int, width: int) -> Path:
    """Frame i is grey with its level, the left half of a quarter of it; white in the lower right corner."""
    with open_writer(path, ClipFormat("mp4", height, width, 24.0, crf=5)) as writer:
        for index in range(num_frames):
            frame = np.full((1, height, width, 3), grey_level(index, num_frames), np.uint8)
            frame[:, :, : width // 2] //= 4
            frame[:, height * 3 // 4 :, width * 3 // 4 :] = 255
            writer.write(frame)
    return path


def make(write: Callable[..., None], source: Path) -> PIL.Image.Image:
    target = io.BytesIO()
    with source.open("rb") as file:
        write(target, file)
    target.seek(0)
    image = PIL.Image.open(target)
    image.load()
    return image


def check_picture(pixels: np.ndarray, level: int) -> None:
    """Whether a shrunk frame is the one of this level, whole and upright, within what jpeg, webp and edges blur."""
    height, width, _ = pixels.shape
    values = pixels.astype(int)
    upper = slice(height // 8, height * 5 // 8)
    assert np.abs(values[upper, width // 8 : width * 3 // 8] - level // 4).max() <= 12
    assert np.abs(values[upper, width * 5 // 8 : width * 7 // 8] - level).max() <= 12
    assert values[-height // 8 :, -width // 8 :].min() >= 240


@pytest.mark.parametrize(
    ("height", "width", "shown"),
    [
        (720, 1280, (270, 480)),
        (1280, 720, (480, 270)),
        (48, 80, (48, 80)),
        (482, 100, (480, 100)),
        (480, 480, (480, 480)),
    ],
)
def test_a_clips_thumbnail_is_its_first_frame(tmp_path: Path, height: int, width: int, shown: tuple[int, int]) -> None:
    image = make(write_thumbnail, make_clip(tmp_path / "a.mp4", 3, height, width))
    assert image.format == "WEBP"
    assert image.size == shown[::-1]
    assert max(image.size) <= THUMBNAIL_SIDE
    check_picture(np.asarray(image.convert("RGB")), grey_level(0, 3))


@pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
def test_an_images_thumbnail_is_the_image(tmp_path: Path, kind: str) -> None:
    frame = np.full((600, 800, 3), 160, np.uint8)
    frame[:, :400] = 40
    frame[450:, 600:] = 255
    write_image(tmp_path / f"a.{kind}", frame, kind)
    image = make(write_thumbnail, tmp_path / f"a.{kind}")
    assert (image.format, image.size) == ("WEBP", (480, 360))
    check_picture(np.asarray(image.convert("RGB")), 160)


def test_a_line_of_pixels_keeps_one(tmp_path: Path) -> None:
    write_image(tmp_path / "a.png", np.full((1, 2000, 3), 99, np.uint8), "png")
    assert make(write_thumbnail, tmp_path / "a.png").size == (480, 1)


@pytest.mark.parametrize(
    ("num_frames", "columns", "rows"), [(1, 1, 1), (2, 2, 1), (5, 3, 2), (24, 5, 5), (189, 10, 10)]
)
def test_a_sheet_has_frames_of_all_the_clip(tmp_path: Path, num_frames: int, columns: int, rows: int) -> None:
    image = make(write_spritesheet, make_clip(tmp_path / "a.mp4", num_frames, 120, 240))
    height, width = 96, TILE_SIDE
    assert (image.format, image.size) == ("JPEG", (columns * width, rows * height))
    sheet = np.asarray(image)
    indices = pick_indices(num_frames, MAX_TILES)
    for place in range(columns * rows):
        row, column = divmod(place, columns)
        tile = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        if place < len(indices):
            check_picture(tile, grey_level(indices[place], num_frames))
        else:
            assert tile[8:, 8:].max() <= 8, "nothing is there"


def test_a_sheet_is_bounded(tmp_path: Path) -> None:
    image = make(write_spritesheet, make_clip(tmp_path / "a.mp4", 101, 256, 256))
    assert image.width * image.height == MAX_TILES * TILE_SIDE**2


def test_frames_are_picked_evenly() -> None:
    for num_frames in [*range(1, 320), 10_001]:
        for max_frames in (1, 2, 7, MAX_TILES):
            picked = pick_indices(num_frames, max_frames)
            assert len(picked) == min(num_frames, max_frames)
            assert picked[0] == 0
            assert len(picked) == 1 or picked[-1] == num_frames - 1
            steps = {after - before for before, after in zip(picked[:-1], picked[1:], strict=True)}
            assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)


def test_grids_are_as_square_as_can_be() -> None:
    for num_tiles in range(1, MAX_TILES + 1):
        columns = sheet_columns(num_tiles)
        rows = -(-num_tiles // columns)
        assert rows <= columns <= rows + 1


def test_the_same_clip_gives_the_same_bytes(tmp_path: Path) -> None:
    clip = make_clip(tmp_path / "a.mp4", 9, 64, 64)
    for write in (write_thumbnail, write_spritesheet):
        first, second = io.BytesIO(), io.BytesIO()
        for target in (first, second):
            with clip.open("rb") as source:
                write(target, source)
        assert first.getvalue() == second.getvalue() != b""


def test_sound_and_images_have_no_such_pictures(tmp_path: Path) -> None:
    with open_writer(tmp_path / "a.wav", ClipFormat("wav", 0, 0, 0, sound=SoundFormat(8000, 1, 100))) as writer:
        writer.write_sound(np.zeros((1, 100), np.float32))
    write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), "png")
    for write in (write_thumbnail, write_spritesheet):
        with pytest.raises(MediaError, match="there are no pictures in a WAV file"):
            make(write, tmp_path / "a.wav")
    with pytest.raises(MediaError, match="there are no frames in an image file"):
        make(write_spritesheet, tmp_path / "a.png")


@pytest.mark.parametrize("write", [write_thumbnail, write_spritesheet])
def test_damage_is_reported_and_leaves_no_file(tmp_path: Path, write: Callable[..., None]) -> None:
    whole = make_clip(tmp_path / "a.mp4", 9, 64, 64).read_bytes()
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "cut").write_bytes(whole[:200])
    (tmp_path / "no frames").write_bytes(whole[: whole.index(b"mdat") + 4])
    (tmp_path / "png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 50)
    for name in ("empty", "cut", "no frames", "png"):
        with (tmp_path / name).open("rb") as source, pytest.raises(MediaError):
            write(tmp_path / "out", source)
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.mp4", "cut", "empty", "no frames", "png"]


def test_memory_does_not_grow_with_the_clip(tmp_path: Path) -> None:
    """A child's own peak: 140 frames more are 83 MB, and 80 pictures more on the sheet 94 MB before they are shrunk."""
    program = (
        "import sys, io\nfrom cosmos3_core.media.thumbnail import write_spritesheet\n"
        "with open(sys.argv[1], 'rb') as source:\n    write_spritesheet(io.BytesIO(), source)\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])\n"
    )
    peaks_kb = []
    for num_frames in (20, 160):
        path = tmp_path / f"{num_frames}.mp4"
        with Mp4Writer(path, fps=24, height=512, width=768, preset="ultrafast") as writer:
            for _ in range(num_frames // 10):
                writer.write(np.zeros((10, 512, 768, 3), np.uint8))
        command = [sys.executable, "-c", program, str(path)]
        peaks_kb.append(int(subprocess.run(command, check=True, capture_output=True, timeout=100).stdout))
    assert peaks_kb[1] - peaks_kb[0] < 60_000
