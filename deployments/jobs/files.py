"""What belongs to a job and is too large for the database: its input media, and the state that it goes on from.

In the media archive where there is one, else in a directory beside the clips. Every file says how long it is and what
its hash is: what is damaged, or half written, is told from what is whole.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos3_core.errors import MediaError
from deployments.jobs.job import JOB_ID
from deployments.media.folder import JOB_FILES
from deployments.media.objects import DirectoryObjects, Objects, open_objects

_NAME = re.compile(r"[a-z]{1,16}")
# Of an array: numbers, and nothing that would have to be unpickled.
_DTYPE = re.compile(r"[<>|=][biuf][0-9]{1,2}")
_MAX_HEADER_BYTES = 512
_MAX_NUM_AXES = 8
# Jobs that a sweep asks about at a time.
_MAX_ASKED = 500

JobData = bytes | npt.NDArray[Any]
"""What a file holds."""


class JobFiles:
    """Files of jobs, by the job's id and a name of 1 to 16 letters a-z. For threads; any number of processes may do it.

    Args:
        directory: of the media store; used where there is no archive.
        archive_url: fsspec's URL of the archive, where there is one.

    Raises:
        ObjectsError: there is no such archive.
    """

    def __init__(self, directory: Path, archive_url: str | None) -> None:
        self._objects: Objects = (
            DirectoryObjects(directory / JOB_FILES) if archive_url is None else open_objects(archive_url, JOB_FILES)
        )

    def put(self, job_id: str, name: str, data: bytes | memoryview | npt.NDArray[Any]) -> None:
        """Write a file, in the place of what was there; whoever is killed meanwhile leaves that.

        Args:
            job_id: of the job.
            name: of the file.
            data: bytes, or an array of numbers.

        Raises:
            ValueError: no such id, name or array.
            MediaError: it cannot be written.
        """
        _check(job_id, name)
        if isinstance(data, np.ndarray):
            header, payload = _Header(time.time(), data.dtype.str, data.shape), _bytes_of(data)
        else:
            header, payload = _Header(time.time()), memoryview(data).cast("B")
        try:
            self._objects.put(job_id, name, [header.line(payload), payload])
        except OSError as error:
            raise MediaError(f"{name} of {job_id} cannot be written: {error}") from error

    def get(self, job_id: str, name: str) -> JobData:
        """What a file holds; an array cannot be changed.

        Raises:
            ValueError: no such id or name.
            MediaError: there is no such file, it is damaged, or cannot be read.
        """
        _check(job_id, name)
        try:
            written = self._objects.read(job_id, name)
        except FileNotFoundError:
            raise MediaError(f"{job_id} has no {name}") from None
        except OSError as error:
            raise MediaError(f"{name} of {job_id} cannot be read: {error}") from error
        header = _Header.of(written)
        payload = memoryview(written)[written.find(b"\n") + 1 :]
        if header is None or not written.startswith(header.line(payload)):
            raise MediaError(f"{name} of {job_id} is damaged: it is not what was written")
        if not header.dtype:
            return bytes(payload)
        return np.frombuffer(payload, np.dtype(header.dtype)).reshape(header.shape)

    def exists(self, job_id: str, name: str) -> bool:
        """Whether there is such a file, damaged or not.

        Raises:
            ValueError: no such id or name.
            MediaError: the store cannot be read.
        """
        _check(job_id, name)
        try:
            return name in self._objects.names(job_id)
        except OSError as error:
            raise MediaError(f"files of {job_id} cannot be listed: {error}") from error

    def remove(self, job_id: str, name: str | None = None) -> None:
        """Remove a file of a job, or all of them; harmless where there is none.

        Raises:
            ValueError: no such id or name.
            MediaError: they cannot be removed.
        """
        _check(job_id, name or "a")
        try:
            self._objects.remove(job_id, name)
        except OSError as error:
            raise MediaError(f"files of {job_id} cannot be removed: {error}") from error

    def sweep(self, needed: Callable[[Sequence[str]], Mapping[str, bool]], older_than_s: float, now_s: float) -> int:
        """Remove files that jobs do not need any more, those of no job, and what killed writers left.

        Args:
            needed: ids of up to 500 jobs -> of those that are there, whether their files are to stay.
            older_than_s: the last file of one that is not there is at least so old: files come before their job.
            now_s: seconds since 1970.

        Returns:
            Of how many jobs.

        Raises:
            MediaError: the store cannot be used.
            Exception: whatever ``needed`` raised.
        """
        num_removed = 0
        try:
            self._objects.sweep(older_than_s, now_s)
            there = list(filter(JOB_ID.fullmatch, self._objects.folders()))
            for first in range(0, len(there), _MAX_ASKED):
                some = there[first : first + _MAX_ASKED]
                found = needed(some)
                for job_id in some:
                    is_kept = found.get(job_id)
                    if is_kept is None:
                        is_kept = now_s - self._written_s(job_id) <= older_than_s
                    if not is_kept:
                        self._objects.remove(job_id)
                        num_removed += 1
        except OSError as error:
            raise MediaError(f"files of jobs cannot be swept: {error}") from error
        return num_removed

    def _written_s(self, job_id: str) -> float:
        """When the last file of a job was written; 0 where none can tell."""
        written_s = 0.0
        for name in self._objects.names(job_id):
            try:
                header = _Header.of(self._objects.read(job_id, name, 0, _MAX_HEADER_BYTES))
            except FileNotFoundError:  # removed just now
                continue
            if header is not None:
                written_s = max(written_s, header.written_s)
        return written_s


@dataclass(frozen=True)
class _Header:
    """The first line of a file.

    Attributes:
        written_s: seconds since 1970.
        dtype: of an array, as numpy writes it; "" of bytes.
        shape: of an array.
    """

    written_s: float
    dtype: str = ""
    shape: tuple[int, ...] = ()

    def line(self, payload: memoryview) -> bytes:
        """With the hash of it all: of what follows and of itself."""
        values = [self.written_s, self.dtype, list(self.shape), payload.nbytes]
        digest = hashlib.sha256(json.dumps(values).encode())
        digest.update(payload)
        return json.dumps([*values, digest.hexdigest()]).encode() + b"\n"

    @classmethod
    def of(cls, data: bytes) -> _Header | None:
        """The one that a file begins with; None where it has none."""
        try:
            written_s, dtype, shape, _, _ = json.loads(data[: data.index(b"\n", 0, _MAX_HEADER_BYTES)])
            return cls(float(written_s), str(dtype), tuple(map(int, shape)))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    if not _DTYPE.fullmatch(array.dtype.str) or array.ndim > _MAX_NUM_AXES:
        raise ValueError(f"{array.dtype} {list(array.shape)} is no array of numbers of at most {_MAX_NUM_AXES} axes")
    # A view of no bytes cannot be cast.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _check(job_id: str, name: str = "a") -> None:
    if not isinstance(job_id, str) or not JOB_ID.fullmatch(job_id):
        raise ValueError(f"job_id={job_id!r}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name={name!r}")
