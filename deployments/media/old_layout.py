"""Moves files from where they were until schema 0002 into the folders of their jobs.

There, tries lay at the top of the directory and in ``clips/`` of the archive, files of jobs in ``jobs/`` of either.
Every step is one move that can be done again: in directories a rename, in object stores copies and then a removal. So
processes that are killed, find the disk full or do it at once lose nothing; the next start goes on.

A try that no job in the database has (one that failed before the last, or another database's) becomes the try of a job
that does not exist, ``video_gen_<try>/<try>``, and expires there. The database that it is of finds it there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from deployments.errors import MediaStoreError
from deployments.media.layout import JOB_ID, TRY_ID
from deployments.media.objects import Objects
from deployments.media.store import MediaStore

_JOBS, _CLIPS = "jobs", "clips"


def adopt_old_files(media: MediaStore, find_media_ids: Callable[[], Mapping[str, str]]) -> int:
    """Move everything into the folder of its job; costs a few listings where nothing is left to be moved.

    Args:
        media: the store; no runner of an earlier release works on it, which the database's upgrade has made sure of.
        find_media_ids: the ids of tries that jobs have -> their media ids.

    Returns:
        How many folders were moved.

    Raises:
        MediaStoreError: not all could be moved; nothing is lost.
        JobsError: whatever ``find_media_ids`` raised.
    """
    places: list[tuple[str, Objects, str]] = [(str(media.directory), media.objects, "")]
    if media.archive is not None:
        places.append((media.archive.place, media.archive.objects, _CLIPS))
    num_moved = 0
    for name, objects, tries in places:
        try:
            num_moved += _adopt(objects, tries, find_media_ids)
        except OSError as error:
            raise MediaStoreError(
                f"files of an earlier release in {name} could not be moved into the folders of their jobs: {error}; "
                "mend this and start again: nothing is lost"
            ) from error
    return num_moved


def _adopt(objects: Objects, tries: str, find_media_ids: Callable[[], Mapping[str, str]]) -> int:
    num_moved = 0
    for job_id in filter(JOB_ID.fullmatch, objects.names(_JOBS)):
        objects.move(f"{_JOBS}/{job_id}", job_id)
        num_moved += 1
    media_ids = find_media_ids()
    for try_id in filter(TRY_ID.fullmatch, objects.names(tries) if tries else objects.folders()):
        stray = f"video_gen_{try_id}/{try_id}"
        objects.move(f"{tries}/{try_id}" if tries else try_id, media_ids.get(try_id, stray))
        num_moved += 1
    folders = set(objects.folders())
    for try_id, media_id in media_ids.items():
        if (stray := f"video_gen_{try_id}") in folders:  # another database's start has put it there
            objects.move(f"{stray}/{try_id}", media_id)
            num_moved += 1
    return num_moved
