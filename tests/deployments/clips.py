"""Clips of media stores: begun, finished, read, swept."""

from __future__ import annotations

import time

from deployments.jobs.job import new_job_id
from deployments.media.layout import new_media_id
from deployments.media.store import MediaEntry, MediaStore

DATA = bytes(range(256)) * 5


def begin(store: MediaStore, *, is_live: bool = True) -> tuple[str, MediaEntry]:
    media_id = new_media_id(new_job_id())
    return media_id, store.create(media_id, "video/mp4", ".mp4", is_live=is_live)


def make(store: MediaStore, data: bytes = DATA) -> str:
    """Make a finished clip; return its id."""
    media_id, entry = begin(store)
    entry.path.write_bytes(data)
    entry.finish()
    return media_id


def read(store: MediaStore, media_id: str, start: int = 0, num_bytes: int = -1) -> bytes:
    """Read a finished clip, or a part of it."""
    return store.read(store.require(media_id), start, num_bytes)


def sweep(store: MediaStore, now_s: float | None = None) -> int:
    """Sweep with a database that knows none of the jobs."""
    return store.sweep(lambda _: {}, time.time() if now_s is None else now_s)
