"""The layout of jobs' files, in the media directory and in the archive alike.

    video_gen_<32 hex>/         a job, by its id; all its files are in here
        image, video            media of its request, each with its length and hash (:mod:`.job_files`)
        checkpoint              the saved state that a runner resumes from
        <32 hex>/               one try of its result; its media id is JOB/TRY (:mod:`.store`)
            begun.json          record of its begin
            live.mp4            grows while it is encoded; readers may follow it; removed once all have read it
            clip.mp4            the finished file
            ended.json          record of its end, done or failed; created once
            thumbnail.json      record of a variant, and thumbnail-<16 hex>.webp, its file (:mod:`.variants`)
    .<16 hex>.part              a file or folder about to appear or disappear

Records and files of jobs appear and disappear as a whole (:mod:`.objects`), and a finished file is whole once the end
says done. So any number of processes work on the layout without locks, and one that is killed leaves the state before
or after a change.

With an archive, files of jobs are in the archive alone, and the directory of each node is a cache of tries, in which
files grow. A file is done when it is done in the archive. Its end is created exactly once where the backend can do
that: directories by a hard link, s3fs by ``If-None-Match``. Backends that look first and then write (fsspec's default)
may accept two concurrent ends, of which the last counts; opening such an archive logs a warning.

The sweeper (:mod:`.sweeper`) counts and removes whole folders of jobs, by their state in the database:

    not ended                   never removed, however old or large
    completed                   removed when it expires; the first to expire go earlier if there are too many bytes
    failed, cancelled           removed at once
    not in the database         removed when nothing in it has changed for ``media.keep_s``, and for an hour at least if
                                it has files of a job, which are written before the job. Finished tries may go
                                earlier, to free bytes. Object stores that report no age keep it.

Apps with databases of their own may share a directory: each touches the folders that its unfinished jobs need, so that
the others keep them. Without an archive the Directors sweep, which know the database. With one, encoders sweep the
directory of their node too: all it has is in the archive, but for tries that are being written, and files of jobs from
before there was an archive, which stay.

Until schema 0002 tries lay at the top (``<32 hex>/``; in the archive ``clips/<32 hex>/``) and files of jobs in
``jobs/<id>/``. :mod:`.old_layout` moves those of known jobs here; the rest expires where it is.
"""

from __future__ import annotations

import contextlib
import json
import re
import uuid
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Annotated, Final, Literal

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    from deployments.media.fsspec_objects import Objects

WRITING: Final = "writing"
DONE: Final = "done"
FAILED: Final = "failed"
"""States of a try."""

JOB_ID = re.compile(r"video_gen_[0-9a-f]{32}")
"""Pattern of job ids, in vLLM-Omni's form; random, so that they cannot be guessed."""

TRY_ID = re.compile(r"[0-9a-f]{32}")
MEDIA_ID = re.compile(f"{JOB_ID.pattern}/{TRY_ID.pattern}")
"""Pattern of media ids. Only ids become parts of paths."""


def is_job_id(value: object) -> bool:
    """Return whether a value is the id of a job."""
    return isinstance(value, str) and JOB_ID.fullmatch(value) is not None


def is_media_id(value: object) -> bool:
    """Return whether a value is the id of a try of a job's file."""
    return isinstance(value, str) and MEDIA_ID.fullmatch(value) is not None


BEGUN, ENDED = "begun.json", "ended.json"
"""Records of a try; the second one counts if both are there."""

LIVE_KEPT_S = 300.0
"""Seconds that a live file stays after the end of its clip and its last reader; readers touch it twice in that time."""

_Seconds = Annotated[float, Field(ge=0, le=1e18)]
_MAX_RECORD_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False))
class MediaRecord:
    """One try of a job's file.

    Attributes:
        media_id: see :data:`MEDIA_ID`.
        state: ``writing``, then ``done`` or ``failed``, once and for all.
        reason: of a failure, in words.
        media_type: MIME type of both files.
        file_name: of the finished file, in the try's folder; there when ``done``.
        live_name: of the file that grows, there from the first bytes on; "" if there is none. Of a finished clip it
            may be gone.
        num_bytes: of the finished file, 0 before.
        sha256: of the finished file, "" before.
        created_s, updated_s: seconds since 1970, of the begin and the last change, by their writers' clocks.

    Raises:
        ValueError: a value is malformed.
    """

    media_id: Annotated[str, Field(pattern=f"^{MEDIA_ID.pattern}$")]
    state: Literal["writing", "done", "failed"]
    reason: str = ""
    media_type: Annotated[str, Field(pattern=r"^[a-z]+/[a-z0-9.+-]{1,64}$")]
    file_name: Annotated[str, Field(pattern=r"^(clip|[a-z]{1,16}-[0-9a-f]{16})\.[a-z0-9]{1,8}$")]
    live_name: Annotated[str, Field(pattern=r"^(live\.[a-z0-9]{1,8})?$")] = ""
    num_bytes: Annotated[int, Field(ge=0, le=10**18)] = 0
    sha256: Annotated[str, Field(pattern="^([0-9a-f]{64})?$")] = ""
    created_s: _Seconds
    updated_s: _Seconds

    def __post_init__(self) -> None:
        if (self.state == DONE) != bool(self.sha256):
            raise ValueError(f"sha256 must be that of a file that is done (got {self.sha256!r}, {self.state!r})")

    @property
    def etag(self) -> str:
        """The finished file's ETag, made of its content."""
        return f'"{self.sha256}"'

    @property
    def live_etag(self) -> str:
        """The live file's ETag, the same while it grows: written bytes never change."""
        return f'"{self.media_id.partition("/")[2]}-live"'

    def to_json(self) -> bytes:
        """Return the record as JSON; :meth:`of_json` reads it. The job is named by the folder alone."""
        return json.dumps(asdict(self) | {"media_id": self.media_id.partition("/")[2]}).encode()

    @classmethod
    def of_json(cls, text: bytes, job_id: str) -> MediaRecord:
        """Read a record from JSON in a job's folder; raise ValueError if it is damaged, or not a record's."""
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("the keys must be those of a record")
        return cls(**{**values, "media_id": f"{job_id}/{values['media_id']}"})


def new_media_id(job_id: str) -> str:
    """Return an unguessable id for a new try of a job's file."""
    return f"{job_id}/{uuid.uuid4().hex}"


def read_record(objects: Objects, folder: str, name: str, job_id: str | None = None) -> MediaRecord | None:
    """Read one record of a try; None if there is none, or only a damaged or foreign one.

    Args:
        folder: of the try: its media id, or its path in the old layout.
        job_id: of the job, if the folder does not name it.
    """
    job_id = job_id or folder.partition("/")[0]
    try:
        record = MediaRecord.of_json(objects.read(folder, name, 0, _MAX_RECORD_BYTES), job_id)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError, ValueError, RecursionError):
        return None
    return record if record.media_id == f"{job_id}/{folder.rpartition('/')[2]}" else None


def find_record(objects: Objects, folder: str, job_id: str | None = None) -> MediaRecord | None:
    """Read the newest record of a try; arguments as of :func:`read_record`."""
    return read_record(objects, folder, ENDED, job_id) or read_record(objects, folder, BEGUN, job_id)


def create_record(objects: Objects, record: MediaRecord, name: str) -> MediaRecord:
    """Write a record unless there is a valid one of its name; return the one that is there then."""
    with contextlib.suppress(FileExistsError):
        objects.create(record.media_id, name, record.to_json())
        return record
    found = read_record(objects, record.media_id, name)  # this record itself, if only an answer was lost
    if found is None:
        objects.put(record.media_id, name, [record.to_json()])
    return found or record


def write_end(objects: Objects, record: MediaRecord) -> None:
    """Write the record of a try's end, once.

    Raise FileExistsError if the try has ended otherwise, FileNotFoundError if it was removed.
    """
    begun = find_record(objects, record.media_id)
    if begun is None:
        raise FileNotFoundError(f"{record.media_id} was removed from {objects.label}")
    if begun.state != WRITING or create_record(objects, record, ENDED) != record:
        raise FileExistsError(f"{record.media_id} has ended in {objects.label}")
