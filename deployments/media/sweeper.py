"""The one sweeper of folders of jobs, in a directory and in an archive; :mod:`.layout` says what goes when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deployments.media.job_files import read_written_s
from deployments.media.layout import BEGUN, ENDED, JOB_ID, MAX_RECORD_BYTES, TRY_ID, WRITING, MediaRecord
from deployments.media.objects import DirectoryObjects, Objects
from deployments.media.old_layout import list_old_folders

FindNeeds = Callable[[Sequence[str]], Mapping[str, float | None]]
"""Ids of jobs -> of those that are known, for how many seconds more they need their folders.

0 = not any more, None = at least until they end.
"""

# Files are there before their job is: those of a job that is not there after so long belong to none.
ORPHAN_S = 3600.0
# Of the bytes that there may be, what folders count for at most that must stay: finished ones have the rest.
_PINNED_SHARE = 0.5


@dataclass(frozen=True)
class _Folder:
    """A job's folder.

    Attributes:
        path: of it.
        left_s: seconds until it goes.
        is_spare: whether it may go earlier, for bytes.
    """

    path: str
    left_s: float
    is_spare: bool


def sweep(
    objects: Objects, find_needs: FindNeeds | None, keep_s: float, now_s: float, max_bytes: float | None = None
) -> int:
    """Remove folders that are not needed any more, and the first to expire while there are too many bytes.

    Several processes may do it at once. What is no folder of a job is left alone.

    Args:
        objects: where the folders are.
        find_needs: of jobs; called after the folders were listed. None: there is no database here, and all files of
            jobs stay.
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
    folders = objects.folders()
    job_ids = list(filter(JOB_ID.fullmatch, folders))
    needs = {} if find_needs is None else find_needs(job_ids)
    orphans_s = math.inf if find_needs is None else max(keep_s, ORPHAN_S)
    kept, num_removed = [], _sweep_old(objects, folders, keep_s, orphans_s, now_s)
    for job_id in job_ids:
        if job_id in needs:
            folder = _judge_known(objects, job_id, needs[job_id])
        else:
            folder = _judge_unknown(objects, job_id, keep_s, orphans_s, now_s)
        if folder.left_s <= 0:
            num_removed += objects.remove(job_id)
        else:
            kept.append(folder)
    if max_bytes is not None and isinstance(objects, DirectoryObjects):
        num_removed += _make_room(objects, kept, max_bytes)
    return num_removed


def _judge_known(objects: Objects, job_id: str, left_s: float | None) -> _Folder:
    if left_s is not None:
        return _Folder(job_id, left_s, True)
    if isinstance(objects, DirectoryObjects):
        objects.touch(job_id)  # apps with other databases in this directory see that it is needed
    return _Folder(job_id, math.inf, False)


def _judge_unknown(objects: Objects, path: str, keep_s: float, orphans_s: float, now_s: float) -> _Folder:
    """Find out from the files how long a folder stays whose job the database does not know.

    Args:
        objects: where it is.
        path: of the folder.
        keep_s, orphans_s: how long it stays after its last change, with tries alone and with files of a job.
        now_s: seconds since 1970.
    """
    changed_s, has_job_files, is_written = 0.0, False, False
    for name in objects.names(path):
        if not TRY_ID.fullmatch(name):
            has_job_files = True
            changed_s = max(changed_s, read_written_s(objects, path, name))
        elif record := _read_record(objects, f"{path}/{name}"):
            is_written |= record.state == WRITING
            changed_s = max(changed_s, record.updated_s)
    if isinstance(objects, DirectoryObjects):
        if is_written or not changed_s:  # what grows, or has no record
            changed_s = max(changed_s, objects.measure(path)[1])
        if has_job_files:
            changed_s = max(changed_s, objects.touched_s(path))
    stays_s = orphans_s if has_job_files else keep_s
    # What does not say how old it is may be new: an object store cannot tell, so it stays.
    return _Folder(path, changed_s + stays_s - now_s if changed_s else math.inf, not (has_job_files or is_written))


def _sweep_old(objects: Objects, folders: Sequence[str], keep_s: float, orphans_s: float, now_s: float) -> int:
    """Remove what is too old of what no start of this release has moved (:mod:`.old_layout`)."""
    num_removed = 0
    jobs, tries = list_old_folders(objects, folders)
    for path in jobs.values():
        if _judge_unknown(objects, path, keep_s, orphans_s, now_s).left_s <= 0:
            num_removed += objects.remove(path)
    for path in tries.values():
        if (record := _read_record(objects, path)) is None:
            continue
        changed_s = record.updated_s
        if record.state == WRITING and isinstance(objects, DirectoryObjects):
            changed_s = max(changed_s, objects.measure(path)[1])
        if changed_s + keep_s <= now_s:
            num_removed += objects.remove(path)
    return num_removed


def _read_record(objects: Objects, path: str) -> MediaRecord | None:
    """Read what is known of a try, by the path of its folder; None where there is only a damaged record, or none."""
    job_id, _, try_id = path.rpartition("/")
    if not JOB_ID.fullmatch(job_id):  # in the old layout, which does not say whose it is
        job_id = f"video_gen_{try_id}"
    for name in (ENDED, BEGUN):
        try:
            record = MediaRecord.of_json(objects.read(path, name, 0, MAX_RECORD_BYTES), job_id)
        except (FileNotFoundError, ValueError, RecursionError):
            continue
        if record.media_id == f"{job_id}/{try_id}":
            return record
    return None


def _make_room(objects: DirectoryObjects, folders: Sequence[_Folder], max_bytes: float) -> int:
    sizes = {folder.path: objects.measure(folder.path)[0] for folder in folders}
    spare = sorted((folder for folder in folders if folder.is_spare), key=lambda folder: folder.left_s)
    num_spare = sum(sizes[folder.path] for folder in spare)
    num_bytes = num_spare + min(sum(sizes.values()) - num_spare, int(max_bytes * _PINNED_SHARE))
    num_removed = 0
    for folder in spare:
        if num_bytes <= max_bytes:
            break
        num_removed += objects.remove(folder.path)
        num_bytes -= sizes[folder.path]
    return num_removed
