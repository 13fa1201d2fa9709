"""The media store: a directory of clips, shared by the processes, and by the nodes where there are several.

A folder a clip, named by an id that is made here. In it lie the file that grows while the clip is encoded, the finished
file and records of what is known (:mod:`deployments.media_record`): one of its begin, later one of its end. Writers
never wait for readers; readers may come and go at any time.

Many processes may write, read and sweep at the same time, without locks. A folder appears with its record in it and
disappears by one rename. Of its end there is one record, made by a hard link, which exactly one of several can make: a
clip that is done never fails later, nor the other way round.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
import uuid
from dataclasses import dataclass, replace
from pathlib import Path

from cosmos3_core import checks
from cosmos3_core.errors import Cosmos3Error, MediaError, RequestError
from deployments.media_folder import BEGUN, ENDED, folder_record, passing_folder, sweep
from deployments.media_record import DONE, FAILED, MEDIA_ID, WRITING, MediaRecord, put_record

logger = logging.getLogger("ray.serve")

_MAX_REASON_CHARS = 2000
_READ_BYTES = 1 << 20


class MediaStoreError(Cosmos3Error):
    """The store's directory cannot be used; says why and what to do."""


def new_media_id() -> str:
    """An id for a clip; nobody can guess it."""
    return uuid.uuid4().hex


def own_directory() -> Path:
    """A directory of this user in the temporary one, for the processes of one machine; made where it is not.

    Raises:
        MediaStoreError: something of another user is in its place.
    """
    path = Path(tempfile.gettempdir()) / f"cosmos3-media-{os.getuid()}"
    hint = "set media.directory to another one"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        facts = path.lstat()
    except OSError as error:
        raise MediaStoreError(f"{path} cannot be made: {error}; {hint}") from error
    # Anybody may write to the temporary directory: what is kept here must not be led elsewhere, nor read by others.
    if path.is_symlink() or facts.st_uid != os.getuid() or facts.st_mode & 0o077:
        raise MediaStoreError(f"{path} is there, but not a directory of this user alone; {hint}")
    return path


@dataclass(frozen=True)
class MediaSpec:
    """Where a store is and how much it keeps; every process opens its own.

    Attributes:
        directory: None = :func:`own_directory` of the process that opens it.
        max_bytes, keep_s: see :class:`MediaStore`.
    """

    directory: Path | None
    max_bytes: int
    keep_s: float

    def open(self) -> MediaStore:
        """The store.

        Raises:
            MediaStoreError: its directory cannot be made.
        """
        return MediaStore(own_directory() if self.directory is None else self.directory, self.max_bytes, self.keep_s)


class MediaStore:
    """See the module. Any number of them may be open on one directory.

    Args:
        directory: made where it is not.
        max_bytes: :meth:`sweep` keeps the files below it; clips that are being written count, but are not removed.
        keep_s: how long a clip stays after its last change; one whose writer lets it lie longer counts as given up.

    Attributes:
        directory, keep_s: as given.

    Raises:
        MediaStoreError: the directory cannot be made or used.
    """

    def __init__(self, directory: Path, max_bytes: int, keep_s: float) -> None:
        self.directory = directory
        self.keep_s = keep_s
        self._max_bytes = max_bytes
        self._try_out()

    def create(self, media_id: str, media_type: str, suffix: str, *, is_live: bool) -> MediaEntry:
        """Begin a clip.

        Args:
            media_id: of :func:`new_media_id`; one clip's and no other's.
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
        fresh = passing_folder(self.directory, "new", media_id)
        try:
            fresh.mkdir()
            put_record(fresh / BEGUN, record)
            fresh.rename(self.directory / media_id)
        except OSError as error:
            shutil.rmtree(fresh, ignore_errors=True)
            raise MediaError(f"the media store cannot take {media_id}: {error}") from error
        return MediaEntry(self, record)

    def find(self, media_id: str) -> MediaRecord | None:
        """What is known of a clip; None where there is none, or the id is no id."""
        if not isinstance(media_id, str) or not MEDIA_ID.fullmatch(media_id):
            return None
        return folder_record(self.directory / media_id)

    def expect(self, media_id: str) -> MediaRecord:
        """What is known of a clip that another process has just begun or finished.

        Raises:
            MediaStoreError: nothing; so the other one's store is not this one.
        """
        record = self.find(media_id)
        if record is None:
            raise MediaStoreError(
                f"the encoder's file {media_id} is not to be seen in {self.directory}: media.directory must be one "
                "directory for all nodes, on a file system that they share"
            )
        return record

    def fail(self, media_id: str, reason: str) -> None:
        """Say that there will be no file: whoever watches is told. For the writer, and for who sees that it died.

        Harmless when the clip has ended, or is not there. Where it cannot be written, the log has it: who calls this is
        busy with an error already, and who watches finds out by a file that does not grow.

        Args:
            media_id: of the clip.
            reason: in words.
        """
        record = self.find(media_id)
        if record is None or record.state != WRITING:
            return
        try:
            self._end(replace(record, state=FAILED, reason=reason[:_MAX_REASON_CHARS]))
        except (FileExistsError, FileNotFoundError):  # it has just ended, or been swept
            pass
        except OSError:
            logger.exception("the failure of %s could not be written down", media_id)

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
            with self.file_path(record).open("rb") as file:
                file.seek(start)
                return file.read(-1 if num_bytes is None else num_bytes)
        except FileNotFoundError:  # swept just now
            raise _no_file(media_id) from None
        except OSError as error:
            raise MediaError(f"the file of {media_id} cannot be read: {error}") from error

    def file_path(self, record: MediaRecord) -> Path:
        """Of the finished file."""
        return self.directory / record.media_id / record.file_name

    def live_path(self, record: MediaRecord) -> Path:
        """Of the file that grows, of a clip that has one."""
        assert record.live_name, "it has none"
        return self.directory / record.media_id / record.live_name

    def sweep(self, now_s: float) -> int:
        """See :func:`deployments.media_folder.sweep`."""
        return sweep(self.directory, self._max_bytes, self.keep_s, now_s)

    def _end(self, record: MediaRecord) -> None:
        """Write down a clip's end.

        Raises:
            FileExistsError: it has ended.
            OSError: it was swept, or cannot be written.
        """
        put_record(self.directory / record.media_id / ENDED, replace(record, updated_s=time.time()))

    def _try_out(self) -> None:
        folder = passing_folder(self.directory, "new", new_media_id())
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
        """Say that the finished file is there; reads it once for its hash.

        Raises:
            MediaError: it is not, or the clip was swept or declared failed meanwhile.
        """
        media_id = self._record.media_id
        digest, num_bytes = hashlib.sha256(), 0
        try:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())  # or a crash of the machine leaves an empty one that is done
                while part := file.read(_READ_BYTES):
                    digest.update(part)
                    num_bytes += len(part)
            record = replace(self._record, state=DONE, num_bytes=num_bytes, sha256=digest.hexdigest())
            self._store._end(record)
        except FileExistsError:
            raise MediaError(f"{media_id} was declared failed while it was written") from None
        except OSError as error:
            raise MediaError(f"the finished file of {media_id} is not in the media store: {error}") from error
        return record


def _no_file(media_id: str) -> RequestError:
    return RequestError("media_id", media_id, "the id of a finished file, as long as it is kept")
