"""The layout of releases until schema 0002, and the move of known jobs' files into the folders of their jobs.

Tries lay at the top of the directory and in ``clips/`` of the archive, files of jobs in ``jobs/`` of either.
Every step is one move that can be repeated: a rename in directories, copies and then a removal in object stores. So
nothing is lost when processes are killed, fill the disk or move at once; the next start resumes the move.

Only files of jobs in the database are moved. The others expire where they are (:mod:`.sweeper`): tries that failed
before the last one, and files of other apps, which may still run the earlier release in this directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from deployments.errors import MediaStoreError
from deployments.media.fsspec_objects import Objects
from deployments.media.layout import JOB_ID, TRY_ID

if TYPE_CHECKING:
    from deployments.media.store import MediaStore
    from deployments.media.sweeper import FindNeeds

_JOBS, _CLIPS = "jobs", "clips"


def list_old_folders(objects: Objects, folders: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return job id -> path and try id -> path in the old layout, given the ``folders`` at the top of ``objects``."""
    jobs, clips = (objects.names(name) if name in folders else [] for name in (_JOBS, _CLIPS))
    tries = {try_id: f"{_CLIPS}/{try_id}" for try_id in filter(TRY_ID.fullmatch, clips)}
    tries |= {try_id: try_id for try_id in filter(TRY_ID.fullmatch, folders)}
    return {job_id: f"{_JOBS}/{job_id}" for job_id in filter(JOB_ID.fullmatch, jobs)}, tries


def adopt_old_files(media: MediaStore, find_needs: FindNeeds, find_media_ids: Callable[[], Mapping[str, str]]) -> int:
    """Move the files of known jobs into the folders of their jobs; return the number of folders that were moved.

    No runner of an earlier release works on the store: the upgrade of the database has ensured that. Without such files
    it costs a few listings. Raise MediaStoreError if not all could be moved; nothing is lost.

    Args:
        find_needs: knows which jobs are in the database.
        find_media_ids: returns try id -> media id of all jobs.
    """
    num_moved = 0
    for objects in media.stores:
        try:
            num_moved += _adopt(objects, find_needs, find_media_ids)
        except OSError as error:
            raise MediaStoreError(
                f"files of an earlier release in {objects.label} could not be moved into the folders of their jobs: "
                f"{error}; mend this and start again: nothing is lost"
            ) from error
    return num_moved


def _adopt(objects: Objects, find_needs: FindNeeds, find_media_ids: Callable[[], Mapping[str, str]]) -> int:
    jobs, tries = list_old_folders(objects, objects.folders())
    moves = [(jobs[job_id], job_id) for job_id in find_needs(list(jobs))] if jobs else []
    media_ids = find_media_ids() if tries else {}
    moves += [(tries[try_id], media_ids[try_id]) for try_id in tries.keys() & media_ids.keys()]
    for folder, to in moves:
        objects.move(folder, to)
    return len(moves)
