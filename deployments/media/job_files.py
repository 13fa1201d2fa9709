"""JobFiles: what belongs to a job and is too large for the database, its input media and its saved state.

In the job's folder, in the media archive where there is one, else in the media directory. Every file says how long it
is and what its hash is: so a damaged or half written one is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos3_core.errors import MediaError
from deployments.media.layout import JOB_ID
from deployments.media.objects import DirectoryObjects, Objects, open_objects

_NAME = re.compile(r"[a-z]{1,16}")
# Types of arrays: numbers, and nothing that would have to be unpickled.
_DTYPE = re.compile(r"[<>|=][biuf][0-9]{1,2}")
_MAX_HEADER_BYTES = 512
_MAX_NUM_AXES = 8

JobData = bytes | npt.NDArray[Any]
"""Content of a file."""


class JobFiles:
    """Files of jobs, by the job's id and a name of 1 to 16 letters a-z. For any number of threads and processes.

    Args:
        directory: of the media store; used where there is no archive.
        archive_url: fsspec's URL of the archive, where there is one.

    Raises:
        ObjectsError: there is no such archive.
    """

    def __init__(self, directory: Path, archive_url: str | None) -> None:
        self._objects: Objects = DirectoryObjects(directory) if archive_url is None else open_objects(archive_url)

    def put(self, job_id: str, name: str, data: bytes | memoryview | npt.NDArray[Any]) -> None:
        """Write or replace a file; a writer that is killed leaves the earlier one.

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
        """Return the content of a file; an array is read-only.

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
        """Return whether there is such a file, damaged or not.

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
        """Remove a file of a job, or all of them but tries of its result; harmless where there is none.

        Raises:
            ValueError: no such id or name.
            MediaError: they cannot be removed.
        """
        _check(job_id, name or "a")
        try:
            names = [name] if name else filter(_NAME.fullmatch, self._objects.names(job_id))
            for each in names:
                self._objects.remove(job_id, each)
        except OSError as error:
            raise MediaError(f"files of {job_id} cannot be removed: {error}") from error


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
        """Return the line, with the hash of itself and of the payload."""
        values = [self.written_s, self.dtype, list(self.shape), payload.nbytes]
        digest = hashlib.sha256(json.dumps(values).encode())
        digest.update(payload)
        return json.dumps([*values, digest.hexdigest()]).encode() + b"\n"

    @classmethod
    def of(cls, data: bytes) -> _Header | None:
        """Return the header of a file; None where it has none."""
        try:
            written_s, dtype, shape, _, _ = json.loads(data[: data.index(b"\n", 0, _MAX_HEADER_BYTES)])
            return cls(float(written_s), str(dtype), tuple(map(int, shape)))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None


def read_written_s(objects: Objects, job_id: str, name: str) -> float:
    """Read when a file of a job was written, in seconds since 1970; 0 where it does not say so, or is gone."""
    try:
        header = _Header.of(objects.read(job_id, name, 0, _MAX_HEADER_BYTES))
    except FileNotFoundError:
        return 0.0
    return 0.0 if header is None else header.written_s


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
