"""What a media store says about a clip: small JSON files beside the clip's own files."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

WRITING, DONE, FAILED = "writing", "done", "failed"

MEDIA_ID = re.compile(r"[0-9a-f]{32}")
"""What ids look like: a uuid in hex. Nothing else ever becomes part of a path."""

BEGUN, ENDED = "begun.json", "ended.json"
"""Records in a clip's folder; the second one counts where there are both."""

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
_MAX_BYTES = 1 << 16


@dataclass(frozen=True)
class MediaRecord:
    """One clip of a store.

    Attributes:
        media_id: see :data:`MEDIA_ID`.
        state: ``writing``, then ``done`` or ``failed``, once and for all.
        reason: of a failure, in words.
        media_type: MIME type of both files.
        file_name: of the finished file, in the clip's folder; there when ``done``.
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
        """Of the finished file, by its content."""
        return f'"{self.sha256}"'

    @property
    def live_etag(self) -> str:
        """Of the live file: bytes that are there stay as they are, so it is the same while it grows."""
        return f'"{self.media_id}-live"'

    def to_json(self) -> str:
        """The record as text; :meth:`of_json` reads it."""
        return json.dumps(asdict(self))

    @classmethod
    def of_json(cls, text: str | bytes) -> MediaRecord:
        """The record that a text holds.

        Raises:
            ValueError: it holds none: damaged, or not ours.
        """
        values = json.loads(text)
        if not isinstance(values, dict) or set(values) != {field.name for field in fields(cls)}:
            raise ValueError("other keys than a record's")
        for name, value in values.items():
            if isinstance(value, bool) or not isinstance(value, _NUMBERS.get(name, (str,))):
                raise ValueError(f"{name}={value!r}")
        known: dict[str, Any] = values
        return cls(**known)


def read_record(path: Path) -> MediaRecord | None:
    """The record in a file; None where there is no file, or a damaged or foreign one."""
    try:
        with path.open("rb") as file:
            return MediaRecord.of_json(file.read(_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return None


def put_record(path: Path, record: MediaRecord) -> None:
    """Write a record, which appears as a whole; of several who do it at once, one does and the others fail.

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
