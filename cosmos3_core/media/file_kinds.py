"""The kinds of files that are made: their names, media types and suffixes."""

from __future__ import annotations

MEDIA_TYPES = {
    "mp4": "video/mp4",
    "png": "image/png",
    "jpeg": "image/jpeg",
    "webp": "image/webp",
    "wav": "audio/wav",
}
"""By kind."""

SUFFIXES = {
    "video/mp4": ".mp4",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
    "audio/wav": ".wav",
}
"""By media type."""

FILE_KINDS = tuple(MEDIA_TYPES)
