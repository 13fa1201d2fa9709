"""The media store: a directory of clips, shared by the processes, and by the nodes where there are several.

A clip is one try of a job's file, in a folder of its own inside the job's (:mod:`deployments.media.layout`). Writers
never wait for readers; readers may come and go at any time.

Of a clip's end there is one record, made by a hard link, which exactly one of several processes can make: a clip that
is done never fails later, nor the other way round.

Where there is an archive (:mod:`deployments.media.archive`), a clip is done when it is there as well, and what the
directory does not have is looked for there: nodes need no directory in common then, and a new machine finds the clips
of the old one. What grows can be read in the directory only.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import secrets
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from cosmos3_core import checks
from cosmos3_core.errors import MediaError, RequestError
from deployments.errors import MediaStoreError
from deployments.media.archive import MediaArchive
from deployments.media.layout import (
    BEGUN,
    DONE,
    ENDED,
    FAILED,
    MEDIA_ID,
    WRITING,
    MediaRecord,
    put_record,
    read_end_or_begin,
)
from deployments.media.objects import DirectoryObjects, ObjectsError
from deployments.media.sweeper import FindNeeds, sweep

if TYPE_CHECKING:
    from deployments.config import MediaConfig

logger = logging.getLogger("ray.serve")

_MAX_REASON_CHARS = 2000
_READ_BYTES = 1 << 20
# A job's folder that is removed while a clip appears in it is made again.
_MAX_CREATES = 5


def own_directory() -> Path:
    """A directory of this user, for the processes of one machine; made where it is not. It outlives restarts.

    Raises:
        MediaStoreError: the user has no home to make it in, or something else is in its place.
    """
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
    # A home may be open to others: what is kept here must not be led elsewhere, nor read by them.
    if path.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise MediaStoreError(f"{path} is there, but not a directory of this user alone; {hint}")
    return path


class MediaStore:
    """Clips in a directory, and its archive. Any number of stores may be open on one directory.

    Args:
        directory: made where it is not.
        max_bytes: :meth:`sweep` keeps the directory's folders below it; those that must stay count up to half of it.
        keep_s: how long a clip stays after its end.
        archive: fsspec's URL of one; None for none.

    Attributes:
        directory, keep_s: as given.
        objects: all that is in the directory.
        archive: the one at the URL.

    Raises:
        MediaStoreError: the directory or the archive cannot be made or used.
    """

    @classmethod
    def of(cls, config: MediaConfig) -> MediaStore:
        """Open the store of a configuration; every process opens its own.

        Raises:
            MediaStoreError: its directory cannot be made, or its archive not be used.
        """
        directory = own_directory() if config.directory is None else config.directory
        return cls(directory, config.max_bytes, config.keep_s, config.archive)

    def __init__(self, directory: Path, max_bytes: int, keep_s: float, archive: str | None = None) -> None:
        self.directory = directory
        self.keep_s = keep_s
        self.objects = DirectoryObjects(directory)
        self._max_bytes = max_bytes
        self._try_out()
        try:
            self.archive = None if archive is None else MediaArchive(archive)
        except ObjectsError as error:
            raise MediaStoreError(str(error)) from None
        if self.archive is not None and self.archive.is_in(directory):
            raise MediaStoreError(
                f"media.archive must be another place than media.directory (got {directory} for both)"
            )

    def create(self, media_id: str, media_type: str, suffix: str, *, is_live: bool) -> MediaEntry:
        """Begin a clip.

        Args:
            media_id: of :func:`deployments.media.layout.new_media_id`; one clip's and no other's.
            media_type: MIME type of its files.
            suffix: ending of their names.
            is_live: whether there will be a file that grows.

        Raises:
            MediaError: it cannot be written, or is there already.
        """
        now_s = time.time()
        record = MediaRecord(
            media_id=media_id,
            state=WRITING,
            reason="",
            media_type=media_type,
            file_name=f"clip{suffix}",
            live_name=f"live{suffix}" if is_live else "",
            num_bytes=0,
            sha256="",
            created_s=now_s,
            updated_s=now_s,
        )
        fresh = self.fresh_folder()
        try:
            fresh.mkdir()
            put_record(fresh / BEGUN, record)
            self._give_name(fresh, media_id)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise MediaError(f"the media store cannot take {media_id}: {error}") from error
        if self.archive is not None:
            try:
                self.archive.begin(record)
            except OSError as error:
                self.fail(media_id, "the media archive failed")
                raise MediaError(f"the media archive cannot take {media_id}: {error}") from error
        return MediaEntry(self, record)

    def find(self, media_id: str) -> MediaRecord | None:
        """What is known of a clip; None where there is none, or the id is no id.

        A clip that only the archive knows and that is being written has no ``live_name``: it grows out of sight.

        Raises:
            MediaError: the directory does not have it, and the archive cannot be asked.
        """
        if not isinstance(media_id, str) or not MEDIA_ID.fullmatch(media_id):
            return None
        record = read_end_or_begin(self.directory / media_id)
        if record is None and self.archive is not None:
            try:
                return self.archive.find(media_id)
            except OSError as error:
                raise MediaError(f"the media archive cannot be asked for {media_id}: {error}") from error
        return record

    def expect(self, media_id: str) -> MediaRecord:
        """What is known of a clip that another process has just begun or finished.

        Raises:
            MediaStoreError: nothing; so the other one's store is not this one.
            MediaError: as :meth:`find`.
        """
        record = self.find(media_id)
        if record is not None:
            return record
        missing = f"the encoder's file {media_id} is not to be seen in {self.directory}"
        if self.archive is not None:
            raise MediaStoreError(f"{missing}, nor in {self.archive.place}: all nodes need the same media.archive")
        raise MediaStoreError(
            f"{missing}: media.directory must be one directory for all nodes, on a file system that they share; "
            "or set media.archive"
        )

    def fail(self, media_id: str, reason: str) -> None:
        """Say that there will be no file: whoever watches is told. For the writer, and for who sees that it died.

        Harmless when the clip has ended, or is not there. Where it cannot be written, the log has it: who calls this is
        busy with an error already, and who watches finds out by a file that does not grow.

        Args:
            media_id: of the clip.
            reason: in words.
        """
        try:
            record = self.find(media_id)
            if record is None or record.state != WRITING:
                return
            failed = replace(record, state=FAILED, reason=reason[:_MAX_REASON_CHARS], updated_s=time.time())
            with contextlib.suppress(FileNotFoundError):  # it has just been swept, or is in another directory
                self._end(failed)
            if self.archive is not None:
                self.archive.fail(failed)
        except FileExistsError:  # it has just ended
            pass
        except (OSError, MediaError):
            logger.exception("the failure of %s could not be written down", media_id)

    def remove(self, media_id: str) -> None:
        """Remove a clip at once; harmless when it is not there. One that is being written is declared failed first.

        Out of the archive as well; what another node has in a directory of its own goes with the next sweep after
        ``keep_s`` there.

        Args:
            media_id: of the clip; what is no id is not there.

        Raises:
            MediaError: it cannot be removed.
        """
        if not isinstance(media_id, str) or not MEDIA_ID.fullmatch(media_id):
            return
        self.fail(media_id, "it was removed")
        try:
            self.objects.remove(media_id)
            if self.archive is not None:
                self.archive.remove(media_id)
        except OSError as error:
            raise MediaError(f"{media_id} cannot be removed: {error}") from error

    def read(self, media_id: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """A finished file, or a part of it; empty behind its end.

        Args:
            media_id: of the clip.
            start: first byte.
            num_bytes: at most so many; None for all.

        Raises:
            RequestError: there is no such file yet, or not any more; or ``start`` is no position.
            MediaError: it cannot be read.
        """
        checks.integer("start", start, 0, sys.maxsize)
        record = self.find(media_id)
        if record is None or record.state != DONE:
            raise _no_file(media_id)
        start = min(start, record.num_bytes)
        try:
            with self.open(record) as file:
                file.seek(start)
                return file.read(-1 if num_bytes is None else num_bytes)
        except FileNotFoundError:  # swept just now
            raise _no_file(media_id) from None
        except OSError as error:
            raise MediaError(f"the file of {media_id} cannot be read: {error}") from error

    def open(self, record: MediaRecord) -> BinaryIO:
        """A finished file, to be read from wherever it is, a block at a time.

        Whoever has it open from the directory can read it to its end even if it is removed.

        Raises:
            OSError: it cannot be read. From the archive, reading raises it: FileNotFoundError where it is not there.
        """
        try:
            return self.file_path(record).open("rb", buffering=0)
        except FileNotFoundError:
            if self.archive is None:
                raise
            return self.archive.open(record)

    def file_path(self, record: MediaRecord) -> Path:
        """Of the finished file in the directory, where it is there."""
        return self.directory / record.media_id / record.file_name

    def live_path(self, record: MediaRecord) -> Path:
        """Of the file that grows, of a clip that has one."""
        assert record.live_name, "it has none"
        return self.directory / record.media_id / record.live_name

    def sweep(self, find_needs: FindNeeds, now_s: float) -> int:
        """Sweep the directory, and the archive less often; see :func:`deployments.media.sweeper.sweep`.

        Raises:
            MediaError: either cannot be swept.
            Exception: whatever ``find_needs`` raised.
        """
        try:
            num_removed = sweep(self.objects, find_needs, self.keep_s, now_s, self._max_bytes)
        except OSError as error:
            raise MediaError(f"the media directory {self.directory} cannot be swept: {error}") from error
        if self.archive is None:
            return num_removed
        try:
            return num_removed + self.archive.sweep(find_needs, self.keep_s, now_s)
        except OSError as error:
            raise MediaError(f"the media archive cannot be swept: {error}") from error

    def sweep_cache(self, now_s: float) -> int:
        """Sweep the directory of a store with an archive, where files of no job are; without a database of jobs."""
        assert self.archive is not None, "without one, only the database knows what is needed"
        return sweep(self.objects, None, self.keep_s, now_s, self._max_bytes)

    def fresh_folder(self) -> Path:
        """Name a folder that is about to appear; the sweeper removes what is left of it."""
        return self.directory / f".{secrets.token_hex(8)}.part"

    def _give_name(self, fresh: Path, media_id: str) -> None:
        """Have a folder appear in its job's.

        Raises:
            OSError: there is one, or it cannot be done.
        """
        for _ in range(_MAX_CREATES):
            (self.directory / media_id).parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # the job's folder was removed for being empty
                fresh.rename(self.directory / media_id)
                return
        raise OSError(f"the folder of {media_id} was removed {_MAX_CREATES} times while the clip appeared in it")

    def _end(self, record: MediaRecord) -> None:
        """Write down a clip's end.

        Raises:
            FileExistsError: it has ended.
            OSError: it was swept, or cannot be written.
        """
        put_record(self.directory / record.media_id / ENDED, record)

    def _try_out(self) -> None:
        folder = self.fresh_folder()
        try:
            folder.mkdir(parents=True)
            (folder / "a").touch()
            os.link(folder / "a", folder / "b")
        except OSError as error:
            raise MediaStoreError(
                f"the media store {self.directory} cannot be used, it needs a file system with hard links: {error}"
            ) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class MediaEntry:
    """A clip that is being written; for one writer.

    Attributes:
        path: where the finished file goes, before :meth:`finish`.
        live_path: where the file goes that grows meanwhile; None where there is none.
    """

    def __init__(self, store: MediaStore, record: MediaRecord) -> None:
        self._store = store
        self._record = record
        self.path = store.file_path(record)
        self.live_path = store.live_path(record) if record.live_name else None

    def finish(self) -> MediaRecord:
        """Say that the finished file is there; reads it once for its hash, and takes it to the archive.

        Raises:
            MediaError: it is not, or the clip was swept or declared failed meanwhile; or the archive failed.
        """
        media_id = self._record.media_id
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())  # or a crash of the machine leaves an empty one that is done
                while part := file.read(_READ_BYTES):
                    digest.update(part)
                    num_bytes += len(part)
            now_s, sha256 = time.time(), digest.hexdigest()
            record = replace(self._record, state=DONE, num_bytes=num_bytes, sha256=sha256, updated_s=now_s)
            self._archive(record)
            self._store._end(record)
        except FileExistsError:
            self._unarchive()
            raise MediaError(f"{media_id} was declared failed while it was written") from None
        except OSError as error:
            self._unarchive()
            raise MediaError(f"the finished file of {media_id} is not in the media store: {error}") from error
        return record

    def _archive(self, record: MediaRecord) -> None:
        """Before the directory's record of the end, so that a clip that is done is in the archive."""
        if self._store.archive is not None:
            self._store.archive.finish(record, self.path)

    def _unarchive(self) -> None:
        """What was taken there of a clip that is not done goes; where that fails too, with the sweep."""
        if self._store.archive is not None:
            try:
                self._store.archive.remove(self._record.media_id)
            except OSError:
                logger.exception("%s could not be removed from the media archive", self._record.media_id)


def _no_file(media_id: str) -> RequestError:
    return RequestError("media_id", media_id, "the id of a finished file, as long as it is kept")
