"""Reads of finished clips."""

from __future__ import annotations

from deployments.media.store import MediaStore


def read(store: MediaStore, media_id: str, start: int = 0, num_bytes: int = -1) -> bytes:
    """Read a finished clip, or a part of it."""
    return store.read(store.expect(media_id), start, num_bytes)
