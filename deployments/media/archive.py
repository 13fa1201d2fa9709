"""The archive of a media store: finished clips where they outlive the directory and every node can read them.

A folder a clip, as in the directory: a record when the clip is begun, the finished file, then a record of its end. So
who finds that record finds the file whole, and what is only begun is known on nodes that cannot see the directory it
grows in. Of an end here there is one writer in the usual case, and the last one counts where there are several: object
stores have no way to tell who was first.
"""

from __future__ import annotations

import io
import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from deployments.media.objects import ObjectsError, open_objects, shown_url
from deployments.media.record import BEGUN, ENDED, MEDIA_ID, WRITING, MediaRecord

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_FOLDER = "clips"
_BLOCK_BYTES = 1 << 20
# Before the second and the third try of what has to be written: hours of work may hang on it.
_PAUSES_S = (0.5, 2.0)
# Listing it costs money: so often in the time that a clip is kept.
_SWEEPS_PER_KEEP = 100
_MAX_KNOWN = 100_000


class MediaArchive:
    """See the module. Every method raises OSError where the archive cannot be used; its texts have no credentials.

    Args:
        url: fsspec's.

    Raises:
        ObjectsError: it cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.place = shown_url(url)
        self._objects = open_objects(url, _FOLDER)
        self._next_sweep_s = float("-inf")
        # When clips ended that were there at the last sweep: they need not be read again.
        self._ended_s: dict[str, float] = {}
        self._try_out()

    def begin(self, record: MediaRecord) -> None:
        """Have a clip be known that is being written; the file that grows cannot be read from here."""
        text = replace(record, live_name="").to_json().encode()
        _tried(lambda: self._objects.put(record.media_id, BEGUN, [text]))

    def finish(self, record: MediaRecord, path: Path) -> None:
        """Add the finished file of a clip, and then its record.

        Args:
            record: of a clip that is done.
            path: of the file on this machine.

        Raises:
            FileExistsError: it was declared failed meanwhile.
            FileNotFoundError: it was removed meanwhile.
        """
        _tried(lambda: self._objects.put_file(record.media_id, record.file_name, path))
        found = self.find(record.media_id)
        if found is None:
            raise FileNotFoundError(f"{record.media_id} was removed from the archive")
        if found.state != WRITING:
            raise FileExistsError(f"{record.media_id} has ended in the archive")
        self.add_record(ENDED, record)

    def fail(self, record: MediaRecord) -> None:
        """Declare a clip failed; harmless when it has ended or is not there.

        Args:
            record: of a clip that failed.
        """
        found = self.find(record.media_id)
        if found is not None and found.state == WRITING:
            self.add_record(ENDED, record)

    def find(self, media_id: str) -> MediaRecord | None:
        """What is known of a clip; None where there is none, or only a damaged record."""
        return self.find_record(media_id, ENDED) or self.find_record(media_id, BEGUN)

    def find_record(self, media_id: str, name: str) -> MediaRecord | None:
        """One of a clip's records, by its name."""
        try:
            record = MediaRecord.of_json(self._objects.read(media_id, name))
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return record if record.media_id == media_id else None

    def add_record(self, name: str, record: MediaRecord) -> None:
        """Write one of a clip's records."""
        _tried(lambda: self._objects.put(record.media_id, name, [record.to_json().encode()]))

    def add_file(self, record: MediaRecord, path: Path) -> None:
        """Add the file that a record of a clip is about."""
        _tried(lambda: self._objects.put_file(record.media_id, record.file_name, path))

    def open(self, record: MediaRecord) -> BinaryIO:
        """A finished file, to be read block by block; FileNotFoundError at the first where it is not there."""
        raw = _Blocks(lambda start, size: self._objects.read(record.media_id, record.file_name, start, size), record)
        return cast(BinaryIO, io.BufferedReader(raw, _BLOCK_BYTES))

    def remove(self, media_id: str) -> None:
        """Remove a clip; harmless when it is not there. No longer done first, then gone."""
        self._objects.remove(media_id, ENDED)
        self._objects.remove(media_id)

    def sweep(self, keep_s: float, now_s: float) -> int:
        """Remove clips that have been there for too long, from time to time.

        Args:
            keep_s: since a clip's end; since its begin, where that is all there is.
            now_s: seconds since 1970.

        Returns:
            How many were removed.
        """
        if now_s < self._next_sweep_s:
            return 0
        self._objects.sweep(keep_s, now_s)
        media_ids = set(filter(MEDIA_ID.fullmatch, self._objects.folders()))
        self._ended_s = {media_id: self._ended_s[media_id] for media_id in media_ids & self._ended_s.keys()}
        num_removed = 0
        for media_id in media_ids:
            if now_s - self._changed_s(media_id, now_s) > keep_s:
                self.remove(media_id)
                num_removed += 1
        self._next_sweep_s = now_s + keep_s / _SWEEPS_PER_KEEP
        return num_removed

    def _changed_s(self, media_id: str, now_s: float) -> float:
        """When a clip ended or else began; now, where it is none."""
        if media_id in self._ended_s:
            return self._ended_s[media_id]
        record = self.find(media_id)
        if record is None:
            return now_s
        if record.state != WRITING and len(self._ended_s) < _MAX_KNOWN:
            self._ended_s[media_id] = record.updated_s
        return record.updated_s

    def _try_out(self) -> None:
        name = f"try-{uuid.uuid4().hex}"
        try:
            self._objects.put(name, "a", [b"a"])
            data = self._objects.read(name, "a", 0, 2)
            self._objects.remove(name)
        except OSError as error:
            raise ObjectsError(f"the media archive {self.place} cannot be used: {error}; check media.archive") from None
        if data != b"a":
            raise ObjectsError(f"the media archive {self.place} does not give what was written; check media.archive")


class _Blocks(io.RawIOBase):
    """A file of the archive, for a buffer to read blocks of."""

    def __init__(self, read: Callable[[int, int], bytes], record: MediaRecord) -> None:
        self._read, self._num_bytes, self._position = read, record.num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"there is no position {start + offset}")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # the buffer gives one
        size = min(len(buffer), self._num_bytes - self._position)
        if size <= 0:
            return 0
        data = self._read(self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _tried(work: Callable[[], T]) -> T:
    """Its result, of a try or two more."""
    for pause_s in _PAUSES_S:
        try:
            return work()
        except FileNotFoundError:
            raise
        except OSError:
            logger.warning("the media archive failed; the next try is in %g s", pause_s, exc_info=True)
            time.sleep(pause_s)
    return work()
