"""Where the files of jobs lie, in the media directory and in the archive alike. This module owns the layout.

    video_gen_<32 hex>/         a job, by its id; everything that it has lies in here
        image, video            what its request came with, each with its length and hash (:mod:`.job_files`)
        checkpoint              the state that a runner goes on from
        <32 hex>/               a file that was begun for it, one folder a try: the media id is JOB/TRY (:mod:`.store`)
            begun.json          record of its begin; the folder appears with it
            live.mp4            grows while it is encoded; can be read meanwhile
            clip.mp4            the finished file
            ended.json          record of its end, done or failed; made once
            thumbnail.json      record of a variant, and thumbnail-<16 hex>.webp, its file (:mod:`.variants`)
    .<16 hex>.part              what is about to appear or to disappear

A folder of a try appears and disappears by one rename, a record by one hard link, a file of a job by one rename: a
process that is killed leaves the file before or the file after, and a ``.part``. Any number of processes may work on it
without locks.

The archive has the same folders. Where there is one, files of jobs are there alone, and of a try its records, finished
file and variants; the directory is then a cache of tries, one a node, in which files grow. A file is done when it is
done in the archive. Its end is created exactly once where the backend can do that: directories by a hard link, s3fs by
``If-None-Match``. Backends that only look first and then write (fsspec's own default) may take two ends at once, of
which the last counts; opening such an archive logs a warning.

The sweeper (:mod:`.sweeper`) counts and removes whole folders of jobs, by what the database says of them:

    not ended                   never, however old or large it is
    completed                   when it expires, or the first to expire go where there are too many bytes
    failed, cancelled           at once
    not in the database         when nothing in it has changed for as long as files are kept; an hour at least where
                                it has files of a job, which are there before the job is. Finished tries go for bytes.
                                In an object store what does not say its age stays.

Apps with databases of their own may share a directory: each touches the folders that its unfinished jobs need, which
keeps the others from removing them.

Without an archive the Directors sweep, which know the database. With one, encoders sweep the directory of their node as
well, where nothing is that the archive does not have, but tries that are still written, and files of jobs from before
there was an archive; those stay.

The layout until schema 0002 had tries at the top (``<32 hex>/``; in the archive ``clips/<32 hex>/``) and files of jobs
in ``jobs/<id>/``. :mod:`.old_layout` moves those of known jobs here at the first start; media ids in the database
change with 0003. The rest expires where it is.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import uuid
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

WRITING, DONE, FAILED = "writing", "done", "failed"

JOB_ID = re.compile(r"video_gen_[0-9a-f]{32}")
"""What ids of jobs look like, as vLLM-Omni's; nobody can guess one."""

TRY_ID = re.compile(r"[0-9a-f]{32}")
MEDIA_ID = re.compile(f"{JOB_ID.pattern}/{TRY_ID.pattern}")
"""What media ids look like. Nothing else ever becomes part of a path."""

BEGUN, ENDED = "begun.json", "ended.json"
"""Records in a try's folder; the second one counts where there are both."""

_PATTERNS = {
    "media_id": MEDIA_ID,
    "state": re.compile(f"{WRITING}|{DONE}|{FAILED}"),
    "media_type": re.compile(r"[a-z]+/[a-z0-9.+-]{1,64}"),
    "file_name": re.compile(r"(clip|[a-z]{1,16}-[0-9a-f]{16})\.[a-z0-9]{1,8}"),
    "live_name": re.compile(r"(live\.[a-z0-9]{1,8})?"),
    "sha256": re.compile(r"([0-9a-f]{64})?"),
}
_NUMBERS = {"num_bytes": (int,), "created_s": (int, float), "updated_s": (int, float)}
_MAX_NUMBER = 1e18
MAX_RECORD_BYTES = 1 << 16


@dataclass(frozen=True)
class MediaRecord:
    """One try of a job's file.

    Attributes:
        media_id: see :data:`MEDIA_ID`.
        state: ``writing``, then ``done`` or ``failed``, once and for all.
        reason: of a failure, in words.
        media_type: MIME type of both files.
        file_name: of the finished file, in the try's folder; there when ``done``.
        live_name: of the file that grows meanwhile, there from the first bytes on; "" where there is none.
        num_bytes: of the finished file, 0 before.
        sha256: of the finished file, "" before.
        created_s, updated_s: seconds since 1970, at the begin and at the last change, by the clocks of who did it.

    Raises:
        ValueError: a value is no such thing.
    """

    media_id: str
    state: str
    reason: str
    media_type: str
    file_name: str
    live_name: str
    num_bytes: int
    sha256: str
    created_s: float
    updated_s: float

    def __post_init__(self) -> None:
        for name, pattern in _PATTERNS.items():
            if not pattern.fullmatch(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)!r}")
        for name in _NUMBERS:
            if not 0 <= getattr(self, name) <= _MAX_NUMBER:  # NaN fails the comparison
                raise ValueError(f"{name}={getattr(self, name)!r}")
        if (self.state == DONE) != bool(self.sha256):
            raise ValueError(f"state={self.state!r} with sha256={self.sha256!r}")

    @property
    def etag(self) -> str:
        """Return the finished file's ETag, made of its content."""
        return f'"{self.sha256}"'

    @property
    def live_etag(self) -> str:
        """Return the live file's ETag, the same while it grows: bytes that are there stay as they are."""
        return f'"{self.media_id.partition("/")[2]}-live"'

    def to_json(self) -> str:
        """Write the record as text; :meth:`of_json` reads it. Which job it is of is said by the folder alone."""
        return json.dumps(asdict(self) | {"media_id": self.media_id.partition("/")[2]})

    @classmethod
    def of_json(cls, text: str | bytes, job_id: str) -> MediaRecord:
        """Read the record that a text in a job's folder holds.

        Raises:
            ValueError: it holds none: damaged, or not ours.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("other keys than a record's")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, _NUMBERS.get(name, (str,))):
                raise ValueError(f"{name}={value!r}")
        known: dict[str, Any] = values | {"media_id": f"{job_id}/{values['media_id']}"}
        return cls(**known)


def new_media_id(job_id: str) -> str:
    """Make an id for a try of a job's file; nobody can guess it."""
    return f"{job_id}/{uuid.uuid4().hex}"


def read_record(path: Path) -> MediaRecord | None:
    """Read the record in a file of a try's folder; None where there is none, or a damaged or foreign one."""
    folder = path.parent
    try:
        with path.open("rb") as file:
            record = MediaRecord.of_json(file.read(MAX_RECORD_BYTES), folder.parent.name)
    except (OSError, ValueError, RecursionError):
        return None
    return record if record.media_id == f"{folder.parent.name}/{folder.name}" else None


def read_end_or_begin(folder: Path) -> MediaRecord | None:
    """Read what is known of a try; None where there is none, or only a damaged record."""
    return read_record(folder / ENDED) or read_record(folder / BEGUN)


def put_record(path: Path, record: MediaRecord) -> None:
    """Write a record, which appears as a whole; of several writers at once one does, and the others fail.

    Raises:
        FileExistsError: there is one.
        OSError: it cannot be written, or its folder is gone.
    """
    passing = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with passing.open("x", encoding="utf-8") as file:
            file.write(record.to_json())
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine leaves an empty one
        os.link(passing, path)  # a rename would replace what is there
    finally:
        with contextlib.suppress(OSError):
            passing.unlink()
