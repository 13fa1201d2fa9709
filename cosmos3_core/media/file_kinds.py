"""The kinds of files that this package writes: names, media types, suffixes, and ranges of quality."""

from __future__ import annotations

MEDIA_TYPES = {
    "mp4": "video/mp4",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "wav": "audio/wav",
}
"""Kind -> media type."""

SUFFIXES = {
    "video/mp4": ".mp4",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "audio/wav": ".wav",
}
"""Media type -> suffix."""

ACTIONS_SUFFIX = ".actions.json"

FILE_KINDS = tuple(MEDIA_TYPES)

IMAGE_KINDS = ("png", "jpeg", "webp")
LOSSY_IMAGE_KINDS = ("jpeg", "webp")
DEFAULT_QUALITY, MAX_QUALITY = 90, 100
"""Quality of lossy images, from 0 (smallest)."""

DEFAULT_CRF, MAX_CRF = 18, 51
"""H.264 quality, 0 (best) to 51; 18 is visually lossless."""
