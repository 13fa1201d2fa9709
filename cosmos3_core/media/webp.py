"""Writes a few small frames as an animated WebP of bounded size: the preview of a clip in the making."""

from __future__ import annotations

import io

import numpy as np
import PIL.Image
import PIL.WebPImagePlugin  # only this plugin; otherwise the first file makes Pillow import all of them, in 0.1 s

from cosmos3_core import checks
from cosmos3_core.errors import MediaError, RequestError
from cosmos3_core.media.pixels import Frames, check_frames

MEDIA_TYPE = "image/webp"
MAX_FRAMES = 12
LONGEST_SIDE = 256
MAX_BYTES = 48 * 2**10

# Tried in turn until the file is small enough.
_QUALITIES = (60, 30, 10, 0)
_EFFORT = 2  # of 6; more takes twice as long for a few per cent of size
_MS_PER_S = 1000


def animate_webp(frames: Frames, fps: float) -> bytes:
    """Encode frames as a WebP that loops, scaled to a longest side of 256 pixels; one frame becomes a still.

    Scaling up is smooth, for few pixels. A file above 48 kB is encoded again in lower quality, then without its later
    frames. A frame that equals the one before merges with it.

    Args:
        frames: uint8 RGB [F, Y, X, 3], 1 to 12.
        fps: frames per second, 0.01 to 1000.

    Raises:
        RequestError: the frames have another dtype or shape, are none or too many, or ``fps`` is out of range.
        MediaError: the encoder failed, or one frame alone is too large.
    """
    check_frames(frames)
    if not 1 <= len(frames) <= MAX_FRAMES or frames.size == 0:
        raise RequestError("frames", list(frames.shape), f"1 to {MAX_FRAMES} frames of at least one pixel")
    frame_ms = max(1, round(_MS_PER_S / checks.real("fps", fps, 0.01, 1000)))
    images = [_scale(frame) for frame in frames]
    try:
        while images:
            for quality in _QUALITIES:
                encoded = _encode(images, frame_ms, quality)
                if len(encoded) <= MAX_BYTES:
                    return encoded
            images = images[: len(images) // 2]
    except (OSError, ValueError) as error:  # Pillow refuses with ValueError
        raise MediaError(f"the WebP could not be written: {error}") from error
    raise MediaError(f"one frame alone takes more than {MAX_BYTES} bytes as a WebP")


def _scale(frame: Frames) -> PIL.Image.Image:
    height, width, _ = frame.shape
    factor = LONGEST_SIDE / max(height, width)
    scaled = max(1, round(width * factor)), max(1, round(height * factor))
    return PIL.Image.fromarray(np.ascontiguousarray(frame)).resize(scaled, PIL.Image.Resampling.BICUBIC)


def _encode(images: list[PIL.Image.Image], frame_ms: int, quality: int) -> bytes:
    encoded = io.BytesIO()
    first, *others = images
    is_animated = {"save_all": True, "append_images": others, "duration": frame_ms, "loop": 0} if others else {}
    first.save(encoded, "WEBP", quality=quality, method=_EFFORT, **is_animated)
    return encoded.getvalue()
