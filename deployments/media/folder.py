"""Folders of a media store: what they are called, whose they are, which of them may go."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from deployments.media.record import BEGUN, ENDED, MEDIA_ID, WRITING, MediaRecord, read_record

JOB_FILES = "jobs"
"""Where :mod:`deployments.jobs.files` are in a store that has no archive."""

# Of the bytes that a store may have, what those count for at most: however much waits, finished clips have the rest.
_JOBS_SHARE = 0.5
_PASSING = re.compile(r"\.(new|swept)-[0-9a-f]{32}-[0-9a-f]{16}")


def passing_folder(directory: Path, kind: str, media_id: str) -> Path:
    """What a clip's folder is called while it is about to appear or to disappear.

    Args:
        directory: the store.
        kind: ``new`` or ``swept``.
        media_id: of the clip.
    """
    return directory / f".{kind}-{media_id}-{secrets.token_hex(8)}"


def folder_record(folder: Path) -> MediaRecord | None:
    """What is known of a folder's clip; None where it is none, or is damaged."""
    record = read_record(folder / ENDED) or read_record(folder / BEGUN)
    return record if record is not None and record.media_id == folder.name else None


@dataclass(frozen=True)
class _Clip:
    """As a sweep finds it."""

    record: MediaRecord
    num_bytes: int
    changed_s: float


def sweep(directory: Path, max_bytes: int, keep_s: float, now_s: float) -> int:
    """Remove clips that are too old, then the longest finished ones while there are too many bytes.

    Those that are being written are too old when none of their files has changed for ``keep_s``: they are given up.
    What is not a clip, or has no record that can be read, is left alone. Several processes may do it at once.

    Args:
        directory: the store.
        max_bytes: of all clips and files of jobs together. These, up to half of it, and clips that are being written
            count, but are not removed for it.
        keep_s: since a clip's end.
        now_s: seconds since 1970.

    Returns:
        How many clips were removed.
    """
    _remove_passing(directory, keep_s, now_s)
    clips, num_removed = [], 0
    for clip in _clips(directory):
        if now_s - clip.changed_s > keep_s:
            num_removed += _remove(directory, clip)
        else:
            clips.append(clip)
    num_job_bytes = sum(job_bytes(directory).values())
    num_bytes = sum(clip.num_bytes for clip in clips) + min(num_job_bytes, max_job_bytes(max_bytes))
    for clip in sorted(clips, key=lambda clip: clip.changed_s):
        if num_bytes <= max_bytes:
            break
        if clip.record.state != WRITING:
            num_removed += _remove(directory, clip)
            num_bytes -= clip.num_bytes
    return num_removed


def max_job_bytes(max_bytes: int) -> int:
    """How many of a store's bytes files of jobs may take from its clips."""
    return int(max_bytes * _JOBS_SHARE)


def job_bytes(directory: Path) -> dict[str, int]:
    """Of the files of each job that has some in a store's directory."""
    folder = directory / JOB_FILES
    return {job_id: sum(file.st_size for file in _files(folder / job_id)) for job_id in _names(folder)}


def _clips(directory: Path) -> Iterator[_Clip]:
    for name in filter(MEDIA_ID.fullmatch, _names(directory)):
        record = folder_record(directory / name)
        if record is None:
            continue
        files = _files(directory / name)
        changed_s = record.updated_s
        if record.state == WRITING:
            changed_s = max(changed_s, *(file.st_mtime for file in files), 0.0)
        yield _Clip(record, sum(file.st_size for file in files), changed_s)


def _names(directory: Path) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:  # unmounted, say: nothing can be removed now
        return []


def _files(folder: Path) -> list[os.stat_result]:
    """Of all files that are still there."""
    found = []
    with contextlib.suppress(OSError), os.scandir(folder) as items:
        for item in items:
            with contextlib.suppress(OSError):
                found.append(item.stat(follow_symlinks=False))
    return found


def remove_folder(directory: Path, media_id: str) -> None:
    """Remove a clip at once: whoever dies meanwhile leaves no half of it under its name.

    Args:
        directory: the store.
        media_id: of the clip.

    Raises:
        FileNotFoundError: there is none.
        OSError: it cannot be removed.
    """
    swept = passing_folder(directory, "swept", media_id)
    (directory / media_id).rename(swept)
    shutil.rmtree(swept, ignore_errors=True)


def _remove(directory: Path, clip: _Clip) -> bool:
    """Returns False where another process was first."""
    try:
        remove_folder(directory, clip.record.media_id)
    except OSError:
        return False
    return True


def _remove_passing(directory: Path, keep_s: float, now_s: float) -> None:
    """What processes left that died while a folder was to appear or to disappear."""
    for name in filter(_PASSING.fullmatch, _names(directory)):
        with contextlib.suppress(OSError):
            if now_s - (directory / name).stat().st_mtime > keep_s:
                shutil.rmtree(directory / name, ignore_errors=True)
