"""A single frame -> a PNG file, through the same library as the videos."""

from __future__ import annotations

from fractions import Fraction

import av
import numpy as np

from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.output import OutputFile, Target
from cosmos3_core.media.pixels import Frames


def write_png(target: Target, frame: Frames) -> None:
    """Write one frame as an 8-bit RGB PNG, exactly. The same frame gives the same bytes.

    Args:
        target: a path in an existing directory (an existing file is replaced), or a binary stream, which is left open.
        frame: uint8 RGB [Y, X, 3].

    Raises:
        RequestError: another dtype or shape, or an unusable path.
        MediaError: the encoder or the disk failed; no file is left.
    """
    if not isinstance(frame, np.ndarray) or frame.dtype != np.uint8 or frame.ndim != 3 or frame.shape[2] != 3:
        given = f"{frame.dtype} {list(frame.shape)}" if isinstance(frame, np.ndarray) else type(frame).__name__
        raise RequestError("frame", given, "a uint8 array [Y, X, 3]", "One frame of a clip is frames[i].")
    if frame.size == 0:
        raise RequestError("frame", list(frame.shape), "at least one pixel")
    output = OutputFile(target)
    try:
        output.path.write_bytes(_encode_png(frame))
    except (av.FFmpegError, OSError) as error:
        output.discard()
        raise MediaError(f"the PNG could not be written: {error}") from error
    output.commit()


def _encode_png(frame: Frames) -> bytes:
    height, width, _ = frame.shape
    context = av.CodecContext.create("png", "w")
    context.width, context.height = width, height
    context.pix_fmt = "rgb24"
    context.time_base = Fraction(1, 1)  # demanded of every encoder, not stored
    context.sample_aspect_ratio = Fraction(1, 1)  # square pixels; unset, the file would say 0:1
    context.thread_count = 1
    # Mixed row filters: half the size of FFmpeg's default (none) on natural images.
    context.options = {"pred": "mixed"}
    image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    image.pts = 0
    return b"".join(bytes(packet) for packet in [*context.encode(image), *context.encode(None)])
