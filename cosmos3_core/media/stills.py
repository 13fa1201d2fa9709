"""Reads still and animated pictures with Pillow: first the header, then the pixels if the header is acceptable.

Pillow's readers are called by name, not through ``Image.open``, which would try unsupported kinds and applies a limit
of its own, global to the process. No torch here.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import ExifTags, Image, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from cosmos3_core.errors import RequestError
from cosmos3_core.media.kinds import FileKind, damage_error, refuse_failures, with_article
from cosmos3_core.media.pixels import Frames
from cosmos3_core.presets import LIMITS

_READERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "PNG": PngImageFile,
    "JPEG": JpegImageFile,
    "GIF": GifImageFile,
    "WebP": WebPImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
_ANIMATED = ("PNG", "GIF", "WebP")

# EXIF orientation -> operation that turns the picture upright; 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
_BROKEN_EXIF = (SyntaxError, ValueError, LookupError, TypeError, OSError, struct.error, Warning)


class PictureSize(NamedTuple):
    """Rows and columns of a picture, upright."""

    height: int
    width: int


@dataclass
class Still:
    """An opened file with an acceptable header; no pixel is decoded yet.

    Attributes:
        field: the request's field, for errors.
        kind: kind of the file.
        image: Pillow's image, not loaded.
        orientation: EXIF orientation, 1 to 8; 1 if Pillow applies the file's by itself.
        num_frames: 1 unless it is animated.
    """

    field: str
    kind: FileKind
    image: ImageFile.ImageFile
    orientation: int
    num_frames: int

    @property
    def upright(self) -> PictureSize:
        """Rows and columns after the rotation in the file."""
        width, height = self.image.size
        return PictureSize(width, height) if self.orientation in _SWAPS_SIDES else PictureSize(height, width)


def open_still(field: str, kind: FileKind, data: bytes, *, max_pixels: int) -> Still:
    """Read a file's header and check the sizes in it.

    Args:
        kind: kind of the file, of category "image".

    Raises:
        RequestError: the picture has too many pixels or frames, or its header is damaged.
    """
    given = with_article(f"{kind.name} file")
    with refuse_failures(field, given, "a picture that can be decoded"):
        num_frames = 1
        if kind.name == "WebP":
            # libwebp allocates the canvas before it reports its size.
            check_pixels(field, _webp_canvas(data), max_pixels)
        if kind.name == "GIF":
            num_frames = _gif_frames(field, data, max_pixels)
        image = _READERS[kind.name](io.BytesIO(data))
        width, height = image.size
        check_pixels(field, PictureSize(height, width), max_pixels)
        if kind.name in ("PNG", "WebP"):
            num_frames = int(getattr(image, "n_frames", 1))
        # Pillow turns TIFF files upright by itself and reports swapped sides.
        orientation = 1 if kind.name == "TIFF" else _orientation(kind, image, data)
        return Still(field, kind, image, orientation, num_frames)


def check_pixels(field: str, picture: PictureSize, max_pixels: int) -> None:
    """Make sure that a picture has pixels, and at most ``max_pixels`` of them.

    Raises:
        RequestError: it does not.
    """
    height, width = picture
    if not 0 < height * width <= max_pixels:
        given = f"a {width} x {height} picture"
        raise RequestError(field, given, f"1 to {max_pixels} pixels a frame", "scale it down first")


def decode_first(still: Still) -> Frames:
    """Decode the picture, or the first of an animation: uint8 RGB [Y, X, 3], upright.

    Raises:
        RequestError: the file is damaged.
    """
    return next(decode_all(still))


def decode_all(still: Still) -> Iterator[Frames]:
    """Yield every frame of an animation as shown, or the only picture: uint8 RGB [Y, X, 3], upright.

    Raises:
        RequestError: the file is damaged, or a frame's size differs from the first's.
    """
    given = with_article(f"{still.kind.name} file")
    canvas = still.image.size
    for index in range(still.num_frames):
        with refuse_failures(still.field, given, "a picture that can be decoded"):
            if index:
                still.image.seek(index)
            if still.image.size != canvas:
                raise damage_error(still.field, still.kind.name, f"frame {index} is larger than the first")
            still.image.load()
            picture: Image.Image = still.image
            if still.orientation in _UPRIGHT:
                picture = picture.transpose(_UPRIGHT[still.orientation])
            frame = to_rgb(still.field, picture)
        yield frame


def upright_rgb(field: str, image: Image.Image) -> Frames:
    """Convert a Pillow image of any mode to uint8 RGB [Y, X, 3], turned upright by its EXIF.

    Raises:
        RequestError: it has too many pixels, or is read lazily from a damaged file.
    """
    with refuse_failures(field, f"a PIL image of mode {image.mode}", "a picture that can be decoded"):
        check_pixels(field, PictureSize(image.height, image.width), LIMITS.max_image_pixels)
        image.load()
        try:
            orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
        except _BROKEN_EXIF:
            orientation = 1
        return to_rgb(field, image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image)


def to_rgb(field: str, image: Image.Image) -> Frames:
    """Convert a loaded Pillow image to uint8 RGB [Y, X, 3]: scale 16-bit grey, else ``convert("RGB")``, without alpha.

    Raises:
        RequestError: 32-bit values exceed 16 bits.
    """
    if image.mode.startswith("I"):  # I;16, I;16B and I: convert() would clip them at 255
        grey = np.asarray(image)
        if grey.min() < 0 or grey.max() > 65_535:
            raise RequestError(field, f"a PIL image of mode {image.mode}", "values from 0 to 65535")
        return np.repeat(scale_16_bits(grey.astype(np.uint16))[..., None], 3, axis=2)
    if image.mode == "F":
        return np.repeat(float_to_bytes(field, np.asarray(image))[..., None], 3, axis=2)
    if "transparency" in image.info:  # of a palette: dropped on purpose, and convert() would warn
        image = image.copy()
        del image.info["transparency"]
    return np.array(image.convert("RGB"), dtype=np.uint8)


def scale_16_bits(values: np.ndarray) -> Frames:
    """Scale uint16 to uint8 of the same shape: 65535 becomes 255, halves round up."""
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def float_to_bytes(field: str, values: np.ndarray) -> Frames:
    """Convert floats to uint8 of the same shape, their range recognized as in the reference.

    With a value below 0 the range is [-1, 1]; otherwise with none above 1 it is [0, 1]; otherwise [0, 255]. The
    reference (diffusers 0.42.1, ``_preprocess_conditioning_image``) rounds after resizing, this before.

    Raises:
        RequestError: a value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise RequestError(field, f"{values.dtype} {list(values.shape)}", "finite numbers, neither NaN nor infinity")
    low, high = values.min(), values.max()
    scaled = values.astype(np.float32)
    if low < 0:
        scaled = (scaled + 1.0) * 127.5
    elif high <= 1:
        scaled = scaled * 255.0
    return np.clip(np.rint(scaled), 0, 255).astype(np.uint8)


def _orientation(kind: FileKind, image: ImageFile.ImageFile, data: bytes) -> int:
    """Return the EXIF orientation; 1 if it cannot be read: damaged EXIF leaves the pixels intact."""
    raw = image.info.get("exif")
    if raw is None and kind.name == "PNG":
        raw = _late_png_exif(data)  # Pillow would decode all pixels to get there
    if not raw:
        return 1
    exif = Image.Exif()
    try:
        exif.load(raw)
        orientation = exif.get(ExifTags.Base.Orientation, 1)
    except _BROKEN_EXIF:
        return 1
    return orientation if orientation in _UPRIGHT else 1


def _late_png_exif(data: bytes) -> bytes | None:
    """Return the eXIf chunk at any place in the file."""
    position = 8
    while position + 8 <= len(data):
        num_bytes = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"eXIf":
            return data[position + 8 : position + 8 + num_bytes]
        position += 12 + num_bytes
    return None


def _webp_canvas(data: bytes) -> PictureSize:
    """Read the canvas from the first chunk; see "Simple" and "Extended File Format" of the WebP specification."""
    chunk, body = data[12:16], data[20:30]
    if len(body) < 10:
        raise ValueError("the header is cut off")
    if chunk == b"VP8X":
        return PictureSize(int.from_bytes(body[7:10], "little") + 1, int.from_bytes(body[4:7], "little") + 1)
    if chunk == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return PictureSize((bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1)
    if chunk == b"VP8 ":
        width, height = struct.unpack("<HH", body[6:10])
        return PictureSize(height & 0x3FFF, width & 0x3FFF)
    raise ValueError("the first chunk holds no picture")


def _gif_frames(field: str, data: bytes, max_pixels: int) -> int:
    """Walk the blocks of a GIF without decoding, and count its frames; GIF89a specification, appendix A.

    Pillow would let a frame enlarge the canvas and read a cut file as a shorter one; both are refused here.
    """
    cut = damage_error(field, "GIF", "it ends early")
    if len(data) < 13:
        raise cut
    width, height = struct.unpack("<HH", data[6:10])
    check_pixels(field, PictureSize(height, width), max_pixels)
    position = 13 + _palette_bytes(data[10])
    num_frames = 0
    while True:
        block = data[position : position + 1]
        if block == b";":
            break
        if block == b"!":
            position += 2
        elif block == b"," and position + 10 < len(data):
            left, top, columns, rows = struct.unpack("<HHHH", data[position + 1 : position + 9])
            if left + columns > width or top + rows > height:
                raise damage_error(field, "GIF", f"frame {num_frames} is larger than the canvas")
            position += 11 + _palette_bytes(data[position + 9])
            num_frames += 1
        else:
            # Some writers omit the end mark or pad with zeros; all blocks before are complete then.
            if num_frames and (not block or not data[position:].strip(b"\0")):
                break
            raise cut
        while position < len(data) and data[position]:
            position += 1 + data[position]
        if position >= len(data):
            raise cut
        position += 1
    if not num_frames:
        raise damage_error(field, "GIF", "it holds no picture")
    return num_frames


def _palette_bytes(flags: int) -> int:
    return 3 << (flags & 7) + 1 if flags & 0x80 else 0
