"""The sweeper of jobs' folders, in a directory and in an archive; :mod:`.layout` says what is removed when."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from deployments.media.fsspec_objects import Objects
from deployments.media.job_files import read_written_s
from deployments.media.layout import DONE, JOB_ID, LIVE_KEPT_S, TRY_ID, WRITING, find_record
from deployments.media.old_layout import list_old_folders

FindNeeds = Callable[[Sequence[str]], Mapping[str, float | None]]
"""Ids of jobs -> for those in the database, for how many seconds more they need their folders.

0 = no longer, None = at least until they end.
"""

# Age at which files without a job count as abandoned: files are written before their job.
ORPHAN_S = 3600.0
# Folders that must stay count for at most this share of ``max_bytes``, so that finished ones have the rest.
_PINNED_SHARE = 0.5


@dataclass(frozen=True)
class _Folder:
    """A job's folder."""

    path: str
    left_s: float  # until it is removed
    may_go_early: bool  # it may be removed earlier, to free bytes


def sweep(
    objects: Objects, find_needs: FindNeeds | None, keep_s: float, now_s: float, max_bytes: float = math.inf
) -> int:
    """Remove folders that are no longer needed, and the first to expire while there are too many bytes.

    Several processes may sweep at once. Anything but folders of jobs stays.

    Args:
        find_needs: called after the folders were listed. None: there is no database here, and files of jobs stay.
        keep_s: how long folders of unknown jobs stay after their last change.
        max_bytes: of all folders, where they can be measured.

    Returns:
        The number of folders that this call removed.
    """
    objects.sweep(keep_s, now_s)
    names = objects.folders()
    job_ids = list(filter(JOB_ID.fullmatch, names))
    needs = {} if find_needs is None else find_needs(job_ids)
    unknown = _UnknownFolders(objects, keep_s, math.inf if find_needs is None else max(keep_s, ORPHAN_S), now_s)
    folders = unknown.assess_old(names)
    for job_id in job_ids:
        if job_id not in needs:
            folders.append(unknown.assess(job_id))
        elif (left_s := needs[job_id]) is not None:
            folders.append(_Folder(job_id, left_s, True))
        else:
            objects.touch(job_id)  # apps with other databases in this directory see that it is needed
            folders.append(_Folder(job_id, math.inf, False))
    num_removed = sum(objects.remove(folder.path) for folder in folders if folder.left_s <= 0)
    kept = [folder for folder in folders if folder.left_s > 0 and JOB_ID.fullmatch(folder.path)]
    if max_bytes == math.inf:  # an archive: files do not grow there, and listing costs money
        return num_removed
    for folder in kept:
        _remove_live_files(objects, folder.path, now_s)
    return num_removed + _make_room(objects, kept, max_bytes)


@dataclass(frozen=True)
class _UnknownFolders:
    """Assesses folders of jobs that the database does not know, by their files."""

    objects: Objects
    keep_s: float  # from its last change, for a folder with tries alone
    orphans_s: float  # the same for one with files of a job
    now_s: float

    def assess(self, path: str) -> _Folder:
        """Compute how long a job's folder stays."""
        changed_s, has_job_files, is_written = 0.0, False, False
        for name in self.objects.names(path):
            if not TRY_ID.fullmatch(name):
                has_job_files = True
                changed_s = max(changed_s, read_written_s(self.objects, path, name))
            elif record := find_record(self.objects, f"{path}/{name}"):
                is_written |= record.state == WRITING
                changed_s = max(changed_s, record.updated_s)
        if is_written or has_job_files or not changed_s:  # it grows, or apps touch it, or it has no record
            changed_s = max(changed_s, self.objects.measure(path)[1])
        stays_s = self.orphans_s if has_job_files else self.keep_s
        return _Folder(path, self._compute_left_s(changed_s, stays_s), not (has_job_files or is_written))

    def assess_old(self, names: Sequence[str]) -> list[_Folder]:
        """Compute how long folders stay that are still in the old layout."""
        jobs, tries = list_old_folders(self.objects, names)
        folders = [self.assess(path) for path in jobs.values()]
        for path in tries.values():
            # Any job's id: the old layout does not name the job.
            if record := find_record(self.objects, path, f"video_gen_{'0' * 32}"):
                grown_s = self.objects.measure(path)[1] if record.state == WRITING else 0.0
                folders.append(_Folder(path, self._compute_left_s(max(record.updated_s, grown_s), self.keep_s), False))
        return folders

    def _compute_left_s(self, changed_s: float, stays_s: float) -> float:
        # A folder of unknown age may be new: it stays.
        return changed_s + stays_s - self.now_s if changed_s else math.inf


def _remove_live_files(objects: Objects, folder: str, now_s: float) -> None:
    """Remove the live files of finished clips that no reader has touched for :data:`.layout.LIVE_KEPT_S`."""
    for name in filter(TRY_ID.fullmatch, objects.names(folder)):
        place = f"{folder}/{name}"
        live = [file for file in objects.names(place) if file.startswith("live.")]
        if live and now_s - objects.measure(place)[1] > LIVE_KEPT_S:
            record = find_record(objects, place)
            if record is not None and record.state == DONE:
                objects.remove(place, live[0])


def _make_room(objects: Objects, folders: Sequence[_Folder], max_bytes: float) -> int:
    sizes = {folder.path: objects.measure(folder.path)[0] for folder in folders}
    spare = sorted((folder for folder in folders if folder.may_go_early), key=lambda folder: folder.left_s)
    num_spare = sum(sizes[folder.path] for folder in spare)
    num_bytes = num_spare + min(sum(sizes.values()) - num_spare, int(max_bytes * _PINNED_SHARE))
    num_removed = 0
    for folder in spare:
        if num_bytes <= max_bytes:
            break
        num_removed += objects.remove(folder.path)
        num_bytes -= sizes[folder.path]
    return num_removed
