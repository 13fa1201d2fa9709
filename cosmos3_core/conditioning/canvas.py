"""The canvases of action conditioning: the choice for a clip, and the part that the clip fills. No torch here.

Sizes are in pixels; ``field`` is the request's field, for errors.

Source: diffusers 0.42.1, ``_ACTION_RESOLUTION_BINS`` and ``_prepare_action_video_conditioning``; exactly the same
choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from cosmos3_core import checks
from cosmos3_core.errors import RequestError

SIDE_MULTIPLE = 16
"""Pixels; a clip's sides are first scaled down to multiples of this."""


class Canvas(NamedTuple):
    """Rows and columns of pixels."""

    height: int
    width: int


ACTION_TIERS: Mapping[int, tuple[Canvas, ...]] = MappingProxyType(
    {
        256: (Canvas(256, 256), Canvas(256, 320), Canvas(320, 256), Canvas(192, 320), Canvas(320, 192)),
        480: (Canvas(640, 640), Canvas(544, 736), Canvas(736, 544), Canvas(480, 832), Canvas(832, 480)),
        704: (Canvas(960, 960), Canvas(832, 1088), Canvas(1088, 832), Canvas(704, 1280), Canvas(1280, 704)),
        720: (Canvas(960, 960), Canvas(832, 1104), Canvas(1104, 832), Canvas(720, 1280), Canvas(1280, 720)),
    }
)
"""Tier -> its canvases; of two that fit equally well, the first one is taken."""


def floor_size(height: int, width: int, *, field: str = "video") -> Canvas:
    """Return the size of a clip with each side rounded down to a multiple of :data:`SIDE_MULTIPLE`.

    Raises:
        RequestError: a side is shorter than that.
    """
    if min(height, width) < SIDE_MULTIPLE:
        raise RequestError(field, f"{width} x {height} pixels", f"sides of at least {SIDE_MULTIPLE} pixels")
    return Canvas(height - height % SIDE_MULTIPLE, width - width % SIDE_MULTIPLE)


def action_canvas(height: int, width: int, tier: int, *, field: str = "video") -> Canvas:
    """Return the canvas of a tier whose height / width is closest to the clip's, after :func:`floor_size`.

    Raises:
        RequestError: the tier is unknown, or the clip is too small.
    """
    checks.choice("resolution_tier", tier, tuple(ACTION_TIERS))
    rows, columns = floor_size(height, width, field=field)
    return min(ACTION_TIERS[tier], key=lambda canvas: abs(canvas.height / canvas.width - rows / columns))


def covering_size(height: int, width: int, to_height: int, to_width: int) -> Canvas:
    """Return the smallest size of a picture, in its proportions, that covers a target on both sides.

    Source: diffusers 0.42.1, ``_preprocess_conditioning_image``.
    """
    scale = max(to_width / width, to_height / height)
    return Canvas(math.ceil(scale * height), math.ceil(scale * width))


def content_size(height: int, width: int, canvas: Canvas | tuple[int, int], *, field: str = "video") -> Canvas:
    """Return the size of a clip on its canvas, from the top left corner; it is never enlarged, and the rest is padding.

    Raises:
        RequestError: the clip is too small.
    """
    rows, columns = floor_size(height, width, field=field)
    scale = min(canvas[1] / columns, canvas[0] / rows, 1.0)
    # Halves round up, as in the reference; round() would round them to even.
    return Canvas(max(1, int(scale * rows + 0.5)), max(1, int(scale * columns + 0.5)))
