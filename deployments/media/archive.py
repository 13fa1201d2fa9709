"""The archive of a media store: finished files where they outlive the directory and every node can read them.

A record is written when a file is begun, then the finished file, then a record of its end. So who finds that record
finds the file whole, and what is only begun is known on nodes that cannot see the directory it grows in.
"""

from __future__ import annotations

import contextlib
import io
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

from deployments.media.layout import BEGUN, ENDED, MAX_RECORD_BYTES, WRITING, MediaRecord
from deployments.media.objects import DirectoryObjects, ObjectsError, open_objects, shown_url
from deployments.media.sweeper import FindNeeds, sweep

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

_BLOCK_BYTES = 1 << 20
# Before the second and the third try of what has to be written: hours of work may hang on it.
_PAUSES_S = (0.5, 2.0)
# Listing it costs money: so often in the time that a clip is kept.
_SWEEPS_PER_KEEP = 100


class MediaArchive:
    """The archive at a URL. Every method raises OSError where it cannot be used; its texts have no credentials.

    Args:
        url: fsspec's.

    Raises:
        ObjectsError: it cannot be used.
    """

    def __init__(self, url: str) -> None:
        self.place = shown_url(url)
        self.objects = open_objects(url)
        self._next_sweep_s = float("-inf")
        self._try_out()
        if not self.objects.creates_once:
            logger.warning(
                "the media archive %s cannot create a record exactly once: of two ends of one file at the same "
                "time, the last one counts",
                self.place,
            )

    def is_in(self, directory: Path) -> bool:
        """Return whether the archive is this very directory, where a file could not end in both."""
        return isinstance(self.objects, DirectoryObjects) and self.objects.root.resolve() == directory.resolve()

    def begin(self, record: MediaRecord) -> None:
        """Have a clip be known that is being written; the file that grows cannot be read from here."""
        text = replace(record, live_name="").to_json().encode()
        _tried(lambda: self.objects.put(record.media_id, BEGUN, [text]))

    def finish(self, record: MediaRecord, path: Path) -> None:
        """Add the finished file of a clip, and then its record.

        Args:
            record: of a clip that is done.
            path: of the file on this machine.

        Raises:
            FileExistsError: it was declared failed meanwhile.
            FileNotFoundError: it was removed meanwhile.
        """
        _tried(lambda: self.objects.put_file(record.media_id, record.file_name, path))
        found = self.find(record.media_id)
        if found is None:
            raise FileNotFoundError(f"{record.media_id} was removed from the archive")
        if found.state != WRITING:
            raise FileExistsError(f"{record.media_id} has ended in the archive")
        self._end(record)

    def fail(self, record: MediaRecord) -> None:
        """Declare a clip failed; harmless when it has ended or is not there.

        Args:
            record: of a clip that failed.
        """
        found = self.find(record.media_id)
        if found is not None and found.state == WRITING:
            with contextlib.suppress(FileExistsError):
                self._end(record)

    def _end(self, record: MediaRecord) -> None:
        """Write down a clip's end, once.

        Raises:
            FileExistsError: it has ended otherwise.
        """
        try:
            _tried(lambda: self.objects.put_new(record.media_id, ENDED, record.to_json().encode()))
        except FileExistsError:
            found = self.find_record(record.media_id, ENDED)
            if found is None:  # half of what a killed writer wrote
                self.add_record(ENDED, record)
            elif found != record:  # else it was written by a try whose answer was lost
                raise

    def find(self, media_id: str) -> MediaRecord | None:
        """What is known of a clip; None where there is none, or only a damaged record."""
        return self.find_record(media_id, ENDED) or self.find_record(media_id, BEGUN)

    def find_record(self, media_id: str, name: str) -> MediaRecord | None:
        """One of a clip's records, by its name."""
        try:
            text = self.objects.read(media_id, name, 0, MAX_RECORD_BYTES)
            record = MediaRecord.of_json(text, media_id.partition("/")[0])
        except (FileNotFoundError, ValueError, RecursionError):
            return None
        return record if record.media_id == media_id else None

    def add_record(self, name: str, record: MediaRecord) -> None:
        """Write one of a clip's records."""
        _tried(lambda: self.objects.put(record.media_id, name, [record.to_json().encode()]))

    def add_file(self, record: MediaRecord, path: Path) -> None:
        """Add the file that a record of a clip is about."""
        _tried(lambda: self.objects.put_file(record.media_id, record.file_name, path))

    def open(self, record: MediaRecord) -> BinaryIO:
        """A finished file, to be read block by block; FileNotFoundError at the first where it is not there."""
        raw = _Blocks(lambda start, size: self.objects.read(record.media_id, record.file_name, start, size), record)
        return cast(BinaryIO, io.BufferedReader(raw, _BLOCK_BYTES))

    def remove(self, media_id: str) -> None:
        """Remove a clip; harmless when it is not there. No longer done first, then gone."""
        self.objects.remove(media_id, ENDED)
        self.objects.remove(media_id)

    def sweep(self, find_needs: FindNeeds, keep_s: float, now_s: float) -> int:
        """Sweep it from time to time, see :func:`deployments.media.sweeper.sweep`."""
        if now_s < self._next_sweep_s:
            return 0
        num_removed = sweep(self.objects, find_needs, keep_s, now_s)
        self._next_sweep_s = now_s + keep_s / _SWEEPS_PER_KEEP
        return num_removed

    def _try_out(self) -> None:
        name = f".{secrets.token_hex(8)}.part"  # what a killed process leaves of it is swept
        try:
            self.objects.put(name, "a", [b"a"])
            data = self.objects.read(name, "a", 0, 2)
            self.objects.remove(name)
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
        except (FileNotFoundError, FileExistsError):
            raise
        except OSError:
            logger.warning("the media archive failed; the next try is in %g s", pause_s, exc_info=True)
            time.sleep(pause_s)
    return work()
