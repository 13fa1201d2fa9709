"""Small pictures of a file of this package: its first frame, or a sheet of evenly spaced frames.

Files are read from a seekable stream, and a clip's frames one at a time: memory does not grow with a clip's length.
No torch here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import BinaryIO

import av
import numpy as np
import PIL.Image
from av.video.reformatter import VideoReformatter

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.image import write_image
from cosmos3_core.media.kinds import CLIP, STILL, FileKind, kind_of
from cosmos3_core.media.output import Target
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.probe import frame_to_rgb
from cosmos3_core.media.stills import decode_first, open_still
from cosmos3_core.presets import LIMITS

THUMBNAIL_SIDE = 480
"""The longer side of a thumbnail, in pixels; smaller pictures keep their size."""
MAX_TILES = 100
"""Frames on a sheet."""
TILE_SIDE = 192
"""The longer side of a frame on a sheet, in pixels; a sheet has at most ``MAX_TILES * TILE_SIDE**2`` of them."""

_THUMBNAIL_QUALITY = 85
_SHEET_QUALITY = 85
_SIGNATURE_BYTES = 512
# Each decoding thread would hold frames of its own.
_NUM_THREADS = 1


def write_thumbnail(target: Target, source: BinaryIO) -> None:
    """Write the first frame of a clip, or an image, as a webp whose longer side is :data:`THUMBNAIL_SIDE` at most.

    Args:
        source: an mp4, png, jpeg or webp, seekable.

    Raises:
        RequestError: the target is unusable.
        MediaError: the source has no picture or is damaged, or the webp could not be written.
        OSError: the source cannot be read.
    """
    if _kind(source).category == STILL:
        frame = _still(source)
    else:
        with contextlib.closing(_pick_frames(source, max_frames=1)) as frames:
            frame = next(frames)
    write_image(target, _shrink(frame, THUMBNAIL_SIDE), "webp", _THUMBNAIL_QUALITY)


def write_spritesheet(target: Target, source: BinaryIO) -> None:
    """Write frames of a clip as one jpeg, row by row in a grid that is as square as possible.

    At most :data:`MAX_TILES` frames are evenly spaced from the first to the last. The rest of the last row is black.

    Args:
        source: an mp4, seekable.

    Raises:
        RequestError: the target is unusable.
        MediaError: the source has no frames or is damaged, or the jpeg could not be written.
        OSError: the source cannot be read.
    """
    with contextlib.closing(_pick_frames(source, max_frames=MAX_TILES)) as frames:
        tiles = [_shrink(frame, TILE_SIDE) for frame in frames]
    num_columns = sheet_columns(len(tiles))
    height, width, _ = tiles[0].shape
    sheet = np.zeros((-(-len(tiles) // num_columns) * height, num_columns * width, 3), np.uint8)
    for index, tile in enumerate(tiles):
        row, column = divmod(index, num_columns)
        sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
    write_image(target, sheet, "jpeg", _SHEET_QUALITY)


def sheet_columns(num_tiles: int) -> int:
    """Return the columns of a sheet: as many as its rows, or one more."""
    num_columns = 1
    while num_columns**2 < num_tiles:
        num_columns += 1
    return num_columns


def pick_indices(num_frames: int, max_frames: int) -> list[int]:
    """Return the frames of a clip to show: all, or ``max_frames`` evenly spaced from the first to the last."""
    num_picked = min(num_frames, max_frames)
    if num_picked == 1:
        return [0]
    last_frame, last_picked = num_frames - 1, num_picked - 1
    # Halves up, in integers.
    return [(2 * index * last_frame + last_picked) // (2 * last_picked) for index in range(num_picked)]


def _kind(source: BinaryIO) -> FileKind:
    source.seek(0)
    kind = kind_of(source.read(_SIGNATURE_BYTES))
    source.seek(0)
    if kind.category not in (STILL, CLIP):
        raise MediaError(f"there are no pictures in a {kind.name} file")
    return kind


def _still(source: BinaryIO) -> Frames:
    """Return an image file's pixels, uint8 RGB [Y, X, 3]."""
    kind, data = _kind(source), source.read()
    try:
        return decode_first(open_still("source", kind, data, max_pixels=LIMITS.max_image_pixels))
    except RequestError as error:
        raise MediaError(f"the {kind.name} file cannot be decoded: {error}") from error


def _pick_frames(source: BinaryIO, *, max_frames: int) -> Generator[Frames, None, None]:
    """Yield the frames of a clip that :func:`pick_indices` picks, uint8 RGB [Y, X, 3], one at a time."""
    if _kind(source).category != CLIP:
        raise MediaError("there are no frames in an image file")
    reformatter, num_picked = VideoReformatter(), 0
    try:
        with av.open(source, mode="r", format="mp4") as container:
            if not container.streams.video:
                raise MediaError("there is no video stream in this file")
            stream = container.streams.video[0]
            stream.codec_context.thread_count = _NUM_THREADS
            picked = pick_indices(stream.frames, max_frames) if stream.frames else []
            for index, frame in enumerate(container.decode(stream)):
                if num_picked == len(picked):
                    break
                if index == picked[num_picked]:
                    num_picked += 1
                    yield frame_to_rgb(frame, reformatter)
    except av.FFmpegError as error:
        raise MediaError(f"not a clip that can be decoded: {error}") from error
    if not picked or num_picked < len(picked):
        raise MediaError(f"only {num_picked} of {len(picked)} frames can be decoded")


def _shrink(frame: Frames, side: int) -> Frames:
    """Return the picture scaled down to a longer side of at most ``side`` pixels."""
    height, width, _ = frame.shape
    if max(height, width) <= side:
        return frame
    size = [max(1, (2 * side * pixels + max(height, width)) // (2 * max(height, width))) for pixels in (width, height)]
    image = PIL.Image.fromarray(frame).resize((size[0], size[1]), PIL.Image.Resampling.LANCZOS)
    return np.asarray(image)
