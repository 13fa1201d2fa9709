"""JobFiles: the files of a job that are too large for the database: its input media and its saved state.

Each file holds its own length and hash, so that a damaged or half-written file is noticed.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from cosmos3_core.errors import MediaError
from deployments.media.fsspec_objects import Objects
from deployments.media.layout import is_job_id

_NAME = re.compile(r"[a-z]{1,16}")
# Arrays of numbers only: no type needs unpickling.
_DTYPE = re.compile(r"[<>|=][biuf][0-9]{1,2}")
_MAX_HEADER_BYTES = 512
_MAX_NUM_AXES = 8

JobData = bytes | npt.NDArray[Any]
"""Content of a file."""


class JobFiles:
    """Files of jobs, by the job's id and a name of 1 to 16 letters a-z. For any number of threads and processes.

    Every method raises ``ValueError`` for another id or name, and ``MediaError`` if the store cannot be used.

    Args:
        objects: the archive if there is one, else the media directory.
    """

    def __init__(self, objects: Objects) -> None:
        self._objects = objects

    def put(self, job_id: str, name: str, data: bytes | memoryview | npt.NDArray[Any]) -> None:
        """Write or replace a file, as a whole or not at all; raise ValueError for an array that is not of numbers."""
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
        """Return the content of a file, an array read-only; raise MediaError if it is missing or damaged."""
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
        """Return whether there is such a file, damaged or not."""
        _check(job_id, name)
        try:
            return name in self._objects.names(job_id)
        except OSError as error:
            raise MediaError(f"files of {job_id} cannot be listed: {error}") from error

    def remove(self, job_id: str, name: str | None = None) -> None:
        """Remove a file of a job, or all of them but not its tries; harmless if there are none."""
        _check(job_id, name or "a")
        try:
            for each in [name] if name else filter(_NAME.fullmatch, self._objects.names(job_id)):
                self._objects.remove(job_id, each)
        except OSError as error:
            raise MediaError(f"files of {job_id} cannot be removed: {error}") from error


@dataclass(frozen=True)
class _Header:
    """The first line of a file."""

    written_s: float  # since 1970
    dtype: str = ""  # of an array, as numpy writes it; "" for bytes
    shape: tuple[int, ...] = ()

    def line(self, payload: memoryview) -> bytes:
        """Return the line, with the hash of itself and of the payload."""
        values = [self.written_s, self.dtype, list(self.shape), payload.nbytes]
        digest = hashlib.sha256(json.dumps(values).encode())
        digest.update(payload)
        return json.dumps([*values, digest.hexdigest()]).encode() + b"\n"

    @classmethod
    def of(cls, data: bytes) -> _Header | None:
        """Return the header of a file; None if it has none."""
        try:
            written_s, dtype, shape, _, _ = json.loads(data[: data.index(b"\n", 0, _MAX_HEADER_BYTES)])
            return cls(float(written_s), str(dtype), tuple(map(int, shape)))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None


def read_written_s(objects: Objects, job_id: str, name: str) -> float:
    """Read when a file of a job was written, in seconds since 1970; 0 if it is damaged or gone."""
    try:
        header = _Header.of(objects.read(job_id, name, 0, _MAX_HEADER_BYTES))
    except FileNotFoundError:
        return 0.0
    return 0.0 if header is None else header.written_s


def _bytes_of(array: npt.NDArray[Any]) -> memoryview:
    if not _DTYPE.fullmatch(array.dtype.str) or array.ndim > _MAX_NUM_AXES:
        raise ValueError(
            f"data must be an array of numbers of at most {_MAX_NUM_AXES} axes (got {array.dtype} {list(array.shape)})"
        )
    # A view of no bytes cannot be cast.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


def _check(job_id: str, name: str = "a") -> None:
    if not is_job_id(job_id):
        raise ValueError(f"job_id must be the id of a job (got {job_id!r})")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ValueError(f"name must be 1 to 16 letters a-z (got {name!r})")
