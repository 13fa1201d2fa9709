"""Writes a single frame as an image file: png with FFmpeg, as the videos, jpeg and webp with Pillow."""

from __future__ import annotations

import io
from fractions import Fraction

import av
import numpy as np
import PIL.Image

from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from cosmos3_core.media.file_kinds import DEFAULT_QUALITY, IMAGE_KINDS, MAX_QUALITY
from cosmos3_core.media.output import OutputFile, Target, describe_failure
from cosmos3_core.media.pixels import Frames

LOSSLESS_WEBP_QUALITY = 100
_LOSSLESS_WEBP_EFFORT = 50  # 0 to 100; more is much slower for a few per cent

# The largest sides that the formats' headers can state.
_MAX_SIDE_PIXELS = {"png": 2**31 - 1, "jpeg": 65500, "webp": 16383}


def write_image(target: Target, frame: Frames, kind: str, quality: int = DEFAULT_QUALITY) -> None:
    """Write one frame as an 8-bit RGB image. The same frame and settings give the same bytes.

    Args:
        frame: uint8 RGB [Y, X, 3].
        kind: ``png``, which is exact; ``jpeg``, with chroma at full resolution; or ``webp``.
        quality: of jpeg and webp, 0 (smallest) to 100 (best); webp is exact at 100. Ignored for png.

    Raises:
        RequestError: the frame has another dtype or shape, a setting is out of range, or the path is unusable.
        MediaError: the encoder or the disk failed; no file is left.
        MemoryError: there is no memory for it; no file is left.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        given = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise RequestError("frame", given, "a uint8 array [Y, X, 3]", "use frames[i], one frame of a clip")
    if frame.size == 0:
        raise RequestError("frame", list(frame.shape), "at least one pixel")
    check_image(kind, frame.shape[0], frame.shape[1], quality)
    output = OutputFile(target)
    try:
        output.path.write_bytes(_encode_png(frame) if kind == "png" else _encode_lossy(frame, kind, quality))
    except (av.FFmpegError, OSError, MemoryError, ValueError) as error:  # Pillow refuses with ValueError
        output.discard()
        raise describe_failure(f"the {kind.upper()} could not be written", error) from error
    output.commit()


def check_image(kind: str, height: int, width: int, quality: int) -> None:
    """Make sure that an image format exists and can hold a picture of this size.

    Raises:
        RequestError: the kind is unknown, or a side or the quality is out of range.
    """
    checks.choice("kind", kind, IMAGE_KINDS)
    checks.integer("height", height, 1, _MAX_SIDE_PIXELS[kind])
    checks.integer("width", width, 1, _MAX_SIDE_PIXELS[kind])
    checks.integer("quality", quality, 0, MAX_QUALITY)


def _encode_lossy(frame: Frames, kind: str, quality: int) -> bytes:
    encoded = io.BytesIO()
    image = PIL.Image.fromarray(np.ascontiguousarray(frame))
    if kind == "jpeg":
        # 4:4:4, because halved chroma smears saturated edges; with Huffman tables for this picture.
        image.save(encoded, "JPEG", quality=quality, subsampling="4:4:4", optimize=True)
    elif quality == LOSSLESS_WEBP_QUALITY:
        image.save(encoded, "WEBP", lossless=True, quality=_LOSSLESS_WEBP_EFFORT)
    else:
        image.save(encoded, "WEBP", quality=quality)
    return encoded.getvalue()


def _encode_png(frame: Frames) -> bytes:
    height, width, _ = frame.shape
    context = av.CodecContext.create("png", "w")
    context.width, context.height = width, height
    context.pix_fmt = "rgb24"
    context.time_base = Fraction(1, 1)  # every encoder needs one; it is not stored
    context.sample_aspect_ratio = Fraction(1, 1)  # square pixels; unset, the file would say 0:1
    context.thread_count = 1
    # Mixed row filters: half the size of FFmpeg's default (none) on natural images.
    context.options = {"pred": "mixed"}
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    image.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(image), *context.encode(None)])
