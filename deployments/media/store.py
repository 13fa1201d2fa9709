"""The media store: the files that jobs make, in a directory and, if there is one, in an archive.

A clip is one try of a job's file, in a folder of its own inside the job's (:mod:`deployments.media.layout`). Writers
never wait for readers. Only one of several processes can create the record of a clip's end, so a clip that is done
never fails later, nor the other way round.

With an archive, a clip is done when it is done there, and files missing from the directory are read from it: nodes need
no directory in common, and a new machine finds the clips of the old one. Files that grow are in the directory only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cosmos3_core.errors import MediaError
from deployments.errors import MediaStoreError
from deployments.media.fsspec_objects import Objects, ObjectsError, check_usable, open_objects
from deployments.media.layout import (
    BEGUN,
    DONE,
    ENDED,
    FAILED,
    WRITING,
    MediaRecord,
    find_record,
    is_job_id,
    is_media_id,
    write_end,
)
from deployments.media.objects import DirectoryObjects
from deployments.media.sweeper import FindNeeds, sweep

if TYPE_CHECKING:
    from deployments.config import MediaConfig

logger = logging.getLogger("ray.serve")

_MAX_REASON_CHARS = 2000
# Sweeps of the archive in the time that a clip is kept: listing it costs money.
_ARCHIVE_SWEEPS_PER_KEEP = 100


def resolve_directory(config: MediaConfig) -> Path:
    """Return the configured directory, or this user's own, created if missing, for the processes of one machine.

    Raise MediaStoreError if the user has no home to make it in, or something else is in its place.
    """
    if config.directory is not None:
        return config.directory.absolute()
    hint = "set media.directory to another one"
    try:
        path = Path.home() / ".local" / "state" / "cosmos3"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
    except RuntimeError as error:
        raise MediaStoreError(f"this user has no home directory for its media: {error}; {hint}") from error
    except OSError as error:
        raise MediaStoreError(f"the directory of this user's media cannot be made: {error}; {hint}") from error
    # A home may be open to others, who must not read these files or lead them elsewhere.
    if path.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise MediaStoreError(f"{path} is there, but not a directory of this user alone; {hint}")
    return path


class MediaStore:
    """Clips in a directory and its archive. Any number of stores may be open on one directory.

    Args:
        max_bytes: :meth:`sweep` keeps the directory's folders below it; those that must stay count up to half of it.
        keep_s: how long a clip stays after its end.
        archive: fsspec's URL of the archive; None for none.

    Attributes:
        objects, archive: contents of the directory, and of the archive if there is one.

    Raises:
        MediaStoreError: the directory or the archive cannot be made or used.
    """

    @classmethod
    def of(cls, config: MediaConfig) -> MediaStore:
        """Open the store of a configuration; every process opens its own."""
        return cls(resolve_directory(config), config.max_bytes, config.keep_s, config.archive)

    def __init__(self, directory: Path, max_bytes: int, keep_s: float, archive: str | None = None) -> None:
        self.directory, self.keep_s, self._max_bytes = directory, keep_s, max_bytes
        self.objects = DirectoryObjects(directory)
        self.archive = None if archive is None else self._open_archive(archive)
        self._next_archive_sweep_s = float("-inf")
        for key, objects in zip(("media.directory", "media.archive"), self.stores, strict=False):
            try:
                check_usable(objects)
            except OSError as error:
                raise MediaStoreError(f"{key} {objects.label} cannot be used: {error}; check {key}") from None

    @property
    def stores(self) -> list[Objects]:
        """The directory, then the archive if there is one."""
        return [self.objects] if self.archive is None else [self.objects, self.archive]

    def _open_archive(self, url: str) -> Objects:
        try:
            archive = open_objects(url)
        except ObjectsError as error:
            raise MediaStoreError(str(error)) from None
        # A clip could not end in both if they were one.
        if isinstance(archive, DirectoryObjects) and archive.root.resolve() == self.directory.resolve():
            raise MediaStoreError(
                f"media.archive must be another place than media.directory (got {self.directory} for both)"
            )
        if not archive.has_atomic_create:
            logger.warning(
                "the media archive %s cannot create a record exactly once: of two ends of one file at the same "
                "time, the last one counts",
                archive.label,
            )
        return archive

    def check(self) -> None:
        """Write, read and remove an object in the directory and in the archive; raise OSError if one does not work."""
        for objects in self.stores:
            check_usable(objects)

    def create(self, media_id: str, media_type: str, suffix: str, *, is_live: bool) -> MediaEntry:
        """Begin a clip under a fresh id; raise MediaError if it cannot be written, or is there already.

        ``is_live``: whether there will be a file that grows.
        """
        now_s = time.time()
        record = MediaRecord(
            media_id=media_id,
            state=WRITING,
            media_type=media_type,
            file_name=f"clip{suffix}",
            live_name=f"live{suffix}" if is_live else "",
            created_s=now_s,
            updated_s=now_s,
        )
        try:
            self.objects.create(media_id, BEGUN, record.to_json())
        except OSError as error:
            raise MediaError(f"the media store cannot take {media_id}: {error}") from error
        if self.archive is not None:
            try:  # the file that grows cannot be read from there
                self.archive.put(media_id, BEGUN, [replace(record, live_name="").to_json()])
            except OSError as error:
                self.fail(media_id, "the media archive failed")
                raise MediaError(f"the media archive cannot take {media_id}: {error}") from error
        return MediaEntry(self, record)

    def find(self, media_id: str) -> MediaRecord | None:
        """Return the record of a clip; None if there is none. Raise MediaError if the store cannot be read.

        A clip of another node that is being written has no ``live_name``.
        """
        if not is_media_id(media_id):
            return None
        try:
            return next(filter(None, (find_record(objects, media_id) for objects in self.stores)), None)
        except OSError as error:
            raise MediaError(f"{media_id} cannot be looked up: {error}") from error

    def require(self, media_id: str) -> MediaRecord:
        """Return the record of a clip that another process has just begun or finished.

        Raise MediaStoreError if there is none, so that the process has another store.
        """
        record = self.find(media_id)
        if record is not None:
            return record
        missing = f"the encoder's file {media_id} is not in {self.directory}"
        if self.archive is not None:
            raise MediaStoreError(f"{missing}, nor in {self.archive.label}: all nodes need the same media.archive")
        raise MediaStoreError(
            f"{missing}: media.directory must be one directory for all nodes, on a file system that they share; "
            "or set media.archive"
        )

    def fail(self, media_id: str, reason: str) -> None:
        """Declare a clip failed to its readers. Harmless if it has ended or is not there."""
        try:
            record = self.find(media_id)
            if record is None or record.state != WRITING:
                return
            failed = replace(record, state=FAILED, reason=reason[:_MAX_REASON_CHARS], updated_s=time.time())
            for objects in self.stores:
                # It has just ended, or was removed, or is in another node's directory.
                with contextlib.suppress(FileExistsError, FileNotFoundError):
                    write_end(objects, failed)
        except (OSError, MediaError):  # the caller handles an error already; readers give up a file that does not grow
            logger.exception("the failure of %s could not be written", media_id)

    def remove(self, media_id: str) -> None:
        """Remove a clip, if it is there; one that is being written is declared failed first.

        Raise MediaError if it cannot be removed. A sweep on another node removes the copy in its directory.
        """
        if not is_media_id(media_id):
            return
        self.fail(media_id, "it was removed")
        try:
            self.objects.remove(media_id)
            if self.archive is not None:
                self.archive.remove(media_id, ENDED)  # it must not count as done while its file disappears
                self.archive.remove(media_id)
        except OSError as error:
            raise MediaError(f"{media_id} cannot be removed: {error}") from error

    def remove_folder(self, job_id: str, media_id: str) -> None:
        """Remove all files of a job, after its clip ("" for none); raise MediaError if they cannot be removed."""
        assert is_job_id(job_id), "it comes from the database"
        self.remove(media_id)
        try:
            for objects in self.stores:
                objects.remove(job_id)
        except OSError as error:
            raise MediaError(f"the files of {job_id} cannot be removed: {error}") from error

    def open(self, record: MediaRecord) -> BinaryIO:
        """Open a finished file; raise FileNotFoundError if it is missing, as reading from an archive may too.

        A file in the directory can be read to its end even if it is removed meanwhile.
        """
        folder, name = record.media_id, record.file_name
        try:
            return self.objects.open(folder, name, record.num_bytes)
        except FileNotFoundError:
            if self.archive is None:
                raise
            return self.archive.open(folder, name, record.num_bytes)

    def read(self, record: MediaRecord, start: int = 0, num_bytes: int = -1) -> bytes:
        """Return a part of a finished file, empty past its end.

        Raise FileNotFoundError if it was removed, MediaError if it cannot be read.
        """
        try:
            with self.open(record) as file:
                file.seek(min(start, record.num_bytes))
                return file.read(num_bytes)
        except FileNotFoundError:
            raise
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise MediaError(f"the file {record.media_id} cannot be read: {why}") from error

    def file_path(self, record: MediaRecord) -> Path:
        """Return the path of the finished file in the directory, whether it is there or not."""
        return self.directory / record.media_id / record.file_name

    def live_path(self, record: MediaRecord) -> Path:
        """Return the path of the file that grows, of a clip that has one."""
        assert record.live_name, "it has none"
        return self.directory / record.media_id / record.live_name

    def sweep(self, find_needs: FindNeeds | None, now_s: float) -> int:
        """Sweep the directory, and the archive less often; return the number of folders that were removed.

        Without ``find_needs`` there is no database here: only the directory is swept, as the archive's cache.
        """
        assert find_needs is not None or self.archive is not None, "the directory is no cache"
        try:
            num_removed = sweep(self.objects, find_needs, self.keep_s, now_s, self._max_bytes)
            if self.archive is not None and find_needs is not None and now_s >= self._next_archive_sweep_s:
                num_removed += sweep(self.archive, find_needs, self.keep_s, now_s)
                self._next_archive_sweep_s = now_s + self.keep_s / _ARCHIVE_SWEEPS_PER_KEEP
        except OSError as error:
            raise MediaError(f"the media store cannot be swept: {error}") from error
        return num_removed


class MediaEntry:
    """A clip that is being written, by one writer.

    Attributes:
        path: of the finished file, to be written before :meth:`finish`.
        live_path: of the file that grows meanwhile; None if there is none.
    """

    def __init__(self, store: MediaStore, record: MediaRecord) -> None:
        self._store, self._record = store, record
        self.path = store.file_path(record)
        self.live_path = store.live_path(record) if record.live_name else None

    def finish(self) -> MediaRecord:
        """Declare the clip done: hash its finished file, copy it to the archive, write the end there and here.

        Raise MediaError if the file is missing, the clip was removed or declared failed, or the archive failed.
        """
        media_id, archive = self._record.media_id, self._store.archive
        try:
            num_bytes, sha256 = hash_file(self.path)
            record = replace(self._record, state=DONE, num_bytes=num_bytes, sha256=sha256, updated_s=time.time())
            if archive is not None:
                archive.put_file(media_id, record.file_name, self.path)
                write_end(archive, record)
            write_end(self._store.objects, record)
        except OSError as error:
            self._leave_archive()
            if isinstance(error, FileExistsError):
                raise MediaError(f"{media_id} was declared failed while it was written") from None
            raise MediaError(f"the finished file of {media_id} is not in the media store: {error}") from error
        return record

    def _leave_archive(self) -> None:
        """Remove an unfinished clip from the archive; if that fails too, a sweep will."""
        if self._store.archive is not None:
            try:
                self._store.archive.remove(self._record.media_id)
            except OSError:
                logger.exception("%s could not be removed from the media archive", self._record.media_id)


def hash_file(path: Path) -> tuple[int, str]:
    """Force a file to the disk, or a crash of the machine may leave it empty; return its length and SHA-256 in hex."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        return file.tell(), sha256
