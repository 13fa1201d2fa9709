"""Files where releases until schema 0002 put them: those of known jobs are moved into the folders of their jobs.

There, tries lay at the top of the directory and in ``clips/`` of the archive, files of jobs in ``jobs/`` of either.
Every step is one move that can be done again: in directories a rename, in object stores copies and then a removal. So
processes that are killed, find the disk full or do it at once lose nothing; the next start goes on.

Only what the database knows is moved. All else stays where it is and expires there by its age (:mod:`.sweeper`): tries
that failed before the last, and files of other apps, which may still run the earlier release in this directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from deployments.errors import MediaStoreError
from deployments.media.layout import JOB_ID, TRY_ID
from deployments.media.objects import Objects

if TYPE_CHECKING:
    from deployments.media.store import MediaStore
    from deployments.media.sweeper import FindNeeds

_JOBS, _CLIPS = "jobs", "clips"


def list_old_folders(objects: Objects, folders: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """List what is left in the old layout.

    Args:
        objects: where it is.
        folders: that are there.

    Returns:
        Ids of jobs and ids of tries, each with the path of its folder.
    """
    jobs, clips = (objects.names(name) if name in folders else [] for name in (_JOBS, _CLIPS))
    tries = {try_id: f"{_CLIPS}/{try_id}" for try_id in filter(TRY_ID.fullmatch, clips)}
    tries |= {try_id: try_id for try_id in filter(TRY_ID.fullmatch, folders)}
    return {job_id: f"{_JOBS}/{job_id}" for job_id in filter(JOB_ID.fullmatch, jobs)}, tries


def adopt_old_files(media: MediaStore, find_needs: FindNeeds, find_media_ids: Callable[[], Mapping[str, str]]) -> int:
    """Move the files of known jobs into the folders of their jobs; costs a few listings where none is left.

    Args:
        media: the store; no runner of an earlier release works on it, which the database's upgrade has made sure of.
        find_needs: of jobs; those that are known.
        find_media_ids: the ids of tries that jobs have -> their media ids.

    Returns:
        How many folders were moved.

    Raises:
        MediaStoreError: not all could be moved; nothing is lost.
        JobsError: whatever ``find_needs`` or ``find_media_ids`` raised.
    """
    places: list[tuple[str, Objects]] = [(str(media.directory), media.objects)]
    if media.archive is not None:
        places.append((media.archive.place, media.archive.objects))
    num_moved = 0
    for name, objects in places:
        try:
            num_moved += _adopt(objects, find_needs, find_media_ids)
        except OSError as error:
            raise MediaStoreError(
                f"files of an earlier release in {name} could not be moved into the folders of their jobs: {error}; "
                "mend this and start again: nothing is lost"
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
