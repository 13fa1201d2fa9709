"""Reads the images and clips that users give, safely and in steps. No torch here.

``pack_*`` runs in the caller's process: it turns a path, a Pillow image or arrays into a file's bytes or uint8 RGB,
which another process can take. ``probe_*`` reads the header of this ``packed`` media, so that a request is checked
before anything large is decoded. ``read_*`` decodes it. Every fault of the media is a
:class:`~cosmos3_core.errors.RequestError` of ``field``, the request's field; limits are those of
:data:`cosmos3_core.presets.LIMITS`.
"""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from av.video.reformatter import VideoReformatter
from PIL import Image

from cosmos3_core.errors import RequestError
from cosmos3_core.media.clips import OpenClip, open_clip, too_many_frames_error, upright_size
from cosmos3_core.media.kinds import (
    AUDIO,
    CLIP,
    CLIP_KINDS_TEXT,
    IMAGE_KINDS_TEXT,
    STILL,
    FileKind,
    damage_error,
    kind_of,
    with_article,
)
from cosmos3_core.media.pixels import Frames
from cosmos3_core.media.stills import (
    PictureSize,
    Still,
    check_pixels,
    decode_all,
    decode_first,
    float_to_bytes,
    open_still,
    scale_16_bits,
    upright_rgb,
)
from cosmos3_core.presets import LIMITS

Array: TypeAlias = npt.NDArray[Any]

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Array
"""An image as a user may give it: a path, a file's bytes, a Pillow image, or an array.

Arrays are [Y, X, 3], or grey [Y, X] or [Y, X, 1], or with alpha [Y, X, 4], which is dropped; uint8, uint16 (scaled), or
float in [0, 1], [-1, 1] or [0, 255].
"""

VideoSource: TypeAlias = str | os.PathLike[str] | bytes | Array | Sequence[Image.Image | Array]
"""A clip as a user may give it: a path, a file's bytes, an array [F, Y, X, channels], or frames of one size."""

Packed: TypeAlias = bytes | Frames
"""Media that can travel: a file's bytes, or uint8 RGB, [Y, X, 3] for an image and [F, Y, X, 3] for a clip."""

_Frame = TypeVar("_Frame")

_IMAGE = f"a path or the bytes of {IMAGE_KINDS_TEXT}, a PIL image, or an array [Y, X, 3]"
_VIDEO = f"a path or the bytes of {CLIP_KINDS_TEXT}, a list of frames, or an array [F, Y, X, 3]"
_CHANNELS = (1, 3, 4)


class ClipInfo(NamedTuple):
    """A clip's header, upright. ``num_frames`` is None if the header lacks it."""

    height: int
    width: int
    num_frames: int | None


def pack_image(field: str, source: ImageSource) -> Packed:
    """Turn an image that a user gives into media for another process.

    Args:
        source: the image; a file's bytes stay unread until :func:`probe_image`.

    Returns:
        The file's bytes, or uint8 RGB [Y, X, 3].

    Raises:
        RequestError: the image is of another type, unreadable, or over a limit.
    """
    if isinstance(source, np.ndarray):
        return _image_from_array(field, source)
    if isinstance(source, Image.Image):
        return upright_rgb(field, source)
    return _file_bytes(field, source, _IMAGE)


def pack_video(field: str, source: VideoSource) -> Packed:
    """Turn a clip that a user gives into media for another process.

    Args:
        source: the clip; a file's bytes stay unread until :func:`probe_clip`. The arrays of a list must have one shape
            and dtype, and all of them together decide the range of floats. A single Pillow image or array [Y, X, 3] is
            a clip of one frame.

    Returns:
        The file's bytes, or uint8 RGB [F, Y, X, 3].

    Raises:
        RequestError: the clip is of another type, unreadable, over a limit, or has frames of several sizes.
    """
    if isinstance(source, Image.Image):
        return upright_rgb(field, source)[None]
    if isinstance(source, np.ndarray):
        return _clip_from_array(field, source if source.ndim != 3 else source[None])
    if isinstance(source, Sequence) and not isinstance(source, str | bytes | bytearray):
        return _clip_from_list(field, source)
    return _file_bytes(field, source, _VIDEO)


def probe_image(field: str, packed: Packed) -> PictureSize:
    """Return an image's rows and columns, upright, from its header.

    Raises:
        RequestError: the kind of image is unsupported, its header is damaged, or it is over a limit.
    """
    if isinstance(packed, np.ndarray):
        _check_packed(field, packed, 3)
        check_pixels(field, PictureSize(*packed.shape[:2]), LIMITS.max_image_pixels)
        return PictureSize(*packed.shape[:2])
    return _open_image(field, packed).upright


def read_image(field: str, packed: Packed) -> Frames:
    """Decode an image, or the first frame of an animation: uint8 RGB [Y, X, 3], upright.

    Raises:
        RequestError: see :func:`probe_image`; or the file is damaged.
    """
    if isinstance(packed, np.ndarray):
        probe_image(field, packed)
        return packed
    return decode_first(_open_image(field, packed))


def probe_clip(field: str, packed: Packed) -> ClipInfo:
    """Return a clip's rows, columns and number of frames, from its header.

    The header is checked first. Then the first frame of a video file is decoded, because only a frame has the rotation,
    and converted, because FFmpeg cannot convert every frame that it can decode.

    Raises:
        RequestError: the kind of clip is unsupported, over a limit, or damaged.
    """
    if isinstance(packed, np.ndarray):
        _check_packed(field, packed, 4)
        return ClipInfo(packed.shape[1], packed.shape[2], packed.shape[0])
    kind = _clip_kind(field, packed)
    if kind.category == STILL:
        still = _open_animation(field, kind, packed)
        return ClipInfo(*still.upright, still.num_frames)
    with open_clip(field, kind, packed) as clip:
        first = next(clip.frames(), None)
        if first is None:
            raise damage_error(field, kind.name, "no frame can be decoded")
        clip.to_rgb(first, VideoReformatter())
        return ClipInfo(*upright_size(first), clip.num_frames)


def read_clip(field: str, packed: Packed, *, num_frames: int, keep: Literal["first", "last"]) -> Frames:
    """Decode a clip's first or last frames.

    Every frame counts once, in the order shown, for however long it is shown: a variable frame rate stays uneven. Sound
    is ignored. At most ``num_frames`` frames are in memory; with "first", decoding stops after them.

    Args:
        num_frames: number of frames to return; a shorter clip has fewer.
        keep: the end of the clip to keep.

    Returns:
        uint8 RGB [F, Y, X, 3], upright, in the order shown; 1 <= F <= ``num_frames``.

    Raises:
        RequestError: see :func:`probe_clip`; or the frames take too much memory, or the file is damaged.
    """
    assert num_frames > 0, num_frames
    if isinstance(packed, np.ndarray):
        _check_packed(field, packed, 4)
        return packed[:num_frames] if keep == "first" else packed[-num_frames:]
    kind = _clip_kind(field, packed)
    if kind.category == STILL:
        still = _open_animation(field, kind, packed)
        _check_total(field, still.upright, min(num_frames, still.num_frames))
        return _stack(_select_frames(decode_all(still), num_frames, keep), lambda frame: frame)
    with open_clip(field, kind, packed) as clip:
        reformatter = VideoReformatter()
        frames = _select_frames(_check_frames(clip, num_frames), num_frames, keep)
        return _stack(frames, lambda frame: clip.to_rgb(frame, reformatter))


def _check_frames(clip: OpenClip, num_frames: int) -> Iterator[Any]:
    """Yield the clip's frames; refuse one too large for memory, and a file that ends before the needed frames."""
    count = 0
    for frame in clip.frames():
        count += 1
        if count <= num_frames:
            expected = min(num_frames, clip.num_frames or 0) or count
            _check_total(clip.field, PictureSize(frame.height, frame.width), max(count, expected))
        yield frame
    if count == 0 or (clip.num_frames is not None and count < clip.num_frames):
        num_expected = "any" if clip.num_frames is None else clip.num_frames
        raise damage_error(clip.field, clip.kind.name, f"{count} of {num_expected} frames can be decoded")


def _select_frames(frames: Iterator[_Frame], num_frames: int, keep: str) -> deque[_Frame]:
    kept: deque[_Frame] = deque(maxlen=num_frames)
    for frame in frames:
        kept.append(frame)
        if keep == "first" and len(kept) == num_frames:
            break
    return kept


def _stack(frames: deque[_Frame], to_array: Callable[[_Frame], Frames]) -> Frames:
    """Copy all frames into one array; frees each after its copy, so that they are not in memory twice."""
    first = to_array(frames[0])
    stacked = np.empty((len(frames), *first.shape), np.uint8)
    for index in range(len(stacked)):
        stacked[index] = to_array(frames.popleft())
    return stacked


def _check_total(field: str, picture: PictureSize, num_frames: int) -> None:
    if num_frames * picture.height * picture.width > LIMITS.max_clip_total_pixels:
        given = f"{num_frames} frames of {picture.width} x {picture.height}"
        allowed = f"at most {LIMITS.max_clip_total_pixels} pixels in all frames together"
        raise RequestError(field, given, allowed, "scale the clip down first")


def _file_bytes(field: str, source: Any, allowed: str) -> bytes:
    if isinstance(source, bytearray | memoryview):
        source = bytes(source)
    if isinstance(source, str | os.PathLike):
        source = _read_path(field, source)
    if not isinstance(source, bytes):
        raise RequestError(field, type(source).__name__, allowed)
    if not 0 < len(source) <= LIMITS.max_media_bytes:
        raise _wrong_num_bytes(field, len(source))
    return source


def _read_path(field: str, path: str | os.PathLike[str]) -> bytes:
    shown = os.fspath(path)
    if "://" in str(shown):
        raise RequestError(field, shown, "the path of a file", "URLs are not fetched: download it first")
    try:
        found = os.stat(path)
        if not stat.S_ISREG(found.st_mode):  # a pipe would block, a device has no end
            raise RequestError(field, shown, "the path of a file")
        if not 0 < found.st_size <= LIMITS.max_media_bytes:
            raise _wrong_num_bytes(field, found.st_size)
        with open(path, "rb") as file:
            return file.read(LIMITS.max_media_bytes + 1)  # the file may grow meanwhile; the caller counts again
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        if isinstance(error, RequestError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise RequestError(field, shown, "the path of a file that can be read", str(reason)) from error


def _wrong_num_bytes(field: str, num_bytes: int) -> RequestError:
    return RequestError(field, f"{num_bytes} bytes", f"a file of 1 to {LIMITS.max_media_bytes} bytes")


def _open_image(field: str, packed: Any) -> Still:
    data = _file_bytes(field, packed, _IMAGE)
    kind = kind_of(data)
    if kind.category == CLIP:
        hint = "give it as a video, or one of its frames as the image"
        raise RequestError(field, with_article(f"{kind.name} file, which is a video"), IMAGE_KINDS_TEXT, hint)
    if kind.category != STILL:
        raise RequestError(field, with_article(f"file of {kind.name} kind"), IMAGE_KINDS_TEXT)
    return open_still(field, kind, data, max_pixels=LIMITS.max_image_pixels)


def _clip_kind(field: str, packed: Any) -> FileKind:
    kind = kind_of(_file_bytes(field, packed, _VIDEO))
    if kind.category == AUDIO:
        raise RequestError(field, with_article(f"{kind.name} file with no video stream"), CLIP_KINDS_TEXT)
    if kind.category not in (STILL, CLIP):
        raise RequestError(field, with_article(f"file of {kind.name} kind"), CLIP_KINDS_TEXT)
    return kind


def _open_animation(field: str, kind: FileKind, data: bytes) -> Still:
    still = open_still(field, kind, data, max_pixels=LIMITS.max_clip_pixels)
    if still.num_frames > LIMITS.max_clip_frames:
        raise too_many_frames_error(field, still.num_frames)
    return still


def _check_packed(field: str, packed: Array, num_axes: int) -> None:
    if packed.dtype != np.uint8 or packed.ndim != num_axes or packed.shape[-1] != 3 or not packed.size:
        allowed = f"uint8 RGB, {'[Y, X, 3]' if num_axes == 3 else '[F, Y, X, 3]'}"
        raise RequestError(field, _describe(packed), allowed)


def _describe(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _image_from_array(field: str, array: Array) -> Frames:
    if array.ndim == 2:
        array = array[..., None]
    if array.ndim != 3 or array.shape[2] not in _CHANNELS:
        raise RequestError(field, _describe(array), "an array [Y, X, 3], [Y, X, 4], [Y, X, 1] or [Y, X]")
    check_pixels(field, PictureSize(*array.shape[:2]), LIMITS.max_image_pixels)
    return _rgb_bytes(field, array)


def _clip_from_array(field: str, array: Array) -> Frames:
    if array.ndim != 4 or array.shape[3] not in _CHANNELS or not array.shape[0]:
        hint = "give a grey clip as [F, Y, X, 1]"
        raise RequestError(field, _describe(array), "an array [F, Y, X, 3], [F, Y, X, 4] or [F, Y, X, 1]", hint)
    num_frames, height, width, _ = array.shape
    if num_frames > LIMITS.max_clip_frames:
        raise too_many_frames_error(field, num_frames)
    check_pixels(field, PictureSize(height, width), LIMITS.max_clip_pixels)
    _check_total(field, PictureSize(height, width), num_frames)
    return _rgb_bytes(field, array)


def _clip_from_list(field: str, frames: Sequence[Any]) -> Frames:
    if not 0 < len(frames) <= LIMITS.max_clip_frames:
        raise RequestError(field, f"{len(frames)} frames", f"1 to {LIMITS.max_clip_frames} frames")
    first = frames[0]
    if isinstance(first, Image.Image):
        for frame in frames:
            if not isinstance(frame, Image.Image):
                raise RequestError(field, type(frame).__name__, "PIL images only, as the first frame is one")
        check_pixels(field, PictureSize(first.height, first.width), LIMITS.max_clip_pixels)
        _check_total(field, PictureSize(first.height, first.width), len(frames))
        top = upright_rgb(field, first)
        clip = np.empty((len(frames), *top.shape), np.uint8)
        for index, frame in enumerate(frames):
            pixels = upright_rgb(field, frame)
            if pixels.shape != top.shape:
                raise _size_error(field, index, pixels, top)
            clip[index] = pixels
        return clip
    for index, frame in enumerate(frames):
        if not isinstance(frame, np.ndarray):
            raise RequestError(field, type(frame).__name__, "PIL images or numpy arrays as frames")
        if frame.dtype != first.dtype or frame.shape != first.shape:
            raise _size_error(field, index, frame, first)
    if first.ndim not in (2, 3):
        raise RequestError(field, _describe(first), "frames [Y, X, 3], [Y, X, 4], [Y, X, 1] or [Y, X]")
    check_pixels(field, PictureSize(*first.shape[:2]), LIMITS.max_clip_pixels)
    _check_total(field, PictureSize(*first.shape[:2]), len(frames))
    clip = np.stack(frames)
    return _clip_from_array(field, clip[..., None] if clip.ndim == 3 else clip)


def _size_error(field: str, index: int, frame: Array, first: Array) -> RequestError:
    return RequestError(field, f"frame {index} is {_describe(frame)}", f"{_describe(first)}, as the first frame is")


def _rgb_bytes(field: str, array: Array) -> Frames:
    """Convert an array [..., 1, 3 or 4] of a supported dtype to uint8 [..., 3]."""
    if not array.size:
        raise RequestError(field, _describe(array), "at least one pixel")
    if array.shape[-1] == 4:
        array = array[..., :3]
    if array.dtype == np.uint16:
        array = scale_16_bits(array)
    elif np.issubdtype(array.dtype, np.floating):
        array = float_to_bytes(field, array)
    elif array.dtype != np.uint8:
        raise RequestError(field, _describe(array), "uint8, uint16 or float values")
    if array.shape[-1] == 1:
        array = np.repeat(array, 3, axis=-1)
    return np.ascontiguousarray(array)
