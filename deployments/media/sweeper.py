"""The one sweeper of folders of jobs, in a directory and in an archive; :mod:`.layout` says what goes when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deployments.media.job_files import read_written_s
from deployments.media.layout import BEGUN, ENDED, JOB_ID, MAX_RECORD_BYTES, TRY_ID, WRITING, MediaRecord
from deployments.media.objects import DirectoryObjects, Objects

FindNeeds = Callable[[Sequence[str]], Mapping[str, float | None]]
"""Ids of up to 500 jobs -> of those that are known, for how many seconds more they need their folders.

0 = not any more, None = at least until they end.
"""

# Files are there before their job is: those of a job that is not there after so long belong to none.
ORPHAN_S = 3600.0
# Of the bytes that there may be, what folders count for at most that must stay: finished ones have the rest.
_PINNED_SHARE = 0.5
_MAX_JOBS_AT_ONCE = 500


@dataclass(frozen=True)
class _Folder:
    """A job's folder.

    Attributes:
        left_s: seconds until it goes.
        is_spare: whether it may go earlier, for bytes.
    """

    job_id: str
    left_s: float
    is_spare: bool


def sweep(objects: Objects, find_needs: FindNeeds, keep_s: float, now_s: float, max_bytes: float | None = None) -> int:
    """Remove folders that are not needed any more, and the first to expire while there are too many bytes.

    Several processes may do it at once. What is no folder of a job is left alone.

    Args:
        objects: where the folders are.
        find_needs: of jobs; asked after the folders were listed.
        keep_s: how long folders of unknown jobs stay after their last change.
        now_s: seconds since 1970.
        max_bytes: of all folders; None: any number.

    Returns:
        How many folders this call removed.

    Raises:
        OSError: the store cannot be used.
        Exception: whatever ``find_needs`` raised.
    """
    objects.sweep(keep_s, now_s)
    job_ids = list(filter(JOB_ID.fullmatch, objects.folders()))
    kept, num_removed = [], 0
    for first in range(0, len(job_ids), _MAX_JOBS_AT_ONCE):
        some = job_ids[first : first + _MAX_JOBS_AT_ONCE]
        needs = find_needs(some)
        for job_id in some:
            folder = _known(job_id, needs[job_id]) if job_id in needs else _unknown(objects, job_id, keep_s, now_s)
            if folder.left_s <= 0:
                num_removed += objects.remove(job_id)
            else:
                kept.append(folder)
    if max_bytes is not None and isinstance(objects, DirectoryObjects):
        num_removed += _make_room(objects, kept, max_bytes)
    return num_removed


def _known(job_id: str, left_s: float | None) -> _Folder:
    return _Folder(job_id, math.inf if left_s is None else left_s, left_s is not None)


def _unknown(objects: Objects, job_id: str, keep_s: float, now_s: float) -> _Folder:
    """Find out from the files how long a folder stays whose job the database does not know."""
    changed_s, has_job_files, is_written = 0.0, False, False
    for name in objects.names(job_id):
        if not TRY_ID.fullmatch(name):
            has_job_files = True
            changed_s = max(changed_s, read_written_s(objects, job_id, name))
        elif record := _read_record(objects, f"{job_id}/{name}"):
            is_written |= record.state == WRITING
            changed_s = max(changed_s, record.updated_s)
    if isinstance(objects, DirectoryObjects) and (is_written or not changed_s):  # what grows, or has no record
        changed_s = max(changed_s, objects.measure(job_id)[1])
    stays_s = max(keep_s, ORPHAN_S) if has_job_files else keep_s
    return _Folder(job_id, changed_s + stays_s - now_s, not (has_job_files or is_written))


def _read_record(objects: Objects, media_id: str) -> MediaRecord | None:
    for name in (ENDED, BEGUN):
        try:
            text = objects.read(media_id, name, 0, MAX_RECORD_BYTES)
            record = MediaRecord.of_json(text, media_id.partition("/")[0])
        except (FileNotFoundError, ValueError, RecursionError):
            continue
        if record.media_id == media_id:
            return record
    return None


def _make_room(objects: DirectoryObjects, folders: Sequence[_Folder], max_bytes: float) -> int:
    sizes = {folder.job_id: objects.measure(folder.job_id)[0] for folder in folders}
    spare = sorted((folder for folder in folders if folder.is_spare), key=lambda folder: folder.left_s)
    num_spare = sum(sizes[folder.job_id] for folder in spare)
    num_bytes = num_spare + min(sum(sizes.values()) - num_spare, int(max_bytes * _PINNED_SHARE))
    num_removed = 0
    for folder in spare:
        if num_bytes <= max_bytes:
            break
        num_removed += objects.remove(folder.job_id)
        num_bytes -= sizes[folder.job_id]
    return num_removed
