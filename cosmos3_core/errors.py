"""Every error this package raises on purpose.

    Cosmos3Error
    ├── RequestError            a field of the caller's input is wrong: names the field, its value and its bounds
    │   └── CapabilityError     a valid request that this checkpoint, or this version, cannot serve
    ├── CheckpointError         the checkpoint directory cannot be used: names the file and what to do
    │   ├── MissingFileError    a file or component is missing
    │   ├── CorruptFileError    a file is damaged or of another kind: truncated, a pickle, broken JSON
    │   └── TensorMismatchError missing, unexpected or mis-shaped tensors
    ├── StateError              a saved denoise state is damaged or belongs to another request
    ├── MediaError              a media file could not be written or read
    ├── MeasureError            the work that a benchmark measures failed, died or took too long
    └── ClosedError             a closed engine, decoder or writer was used

Bad input raises one of these before anything large is allocated. An ``AssertionError`` is always our own bug.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_MAX_SHOWN_CHARS = 120
_MAX_SHOWN_ITEMS = 100


def _show(value: Any) -> str:
    # Only the shown part is formatted: a value may be megabytes.
    if isinstance(value, str | bytes) and len(value) > _MAX_SHOWN_CHARS:
        return _escape(f"{repr(value[:_MAX_SHOWN_CHARS])[:-1]}... ({len(value)} {_units(value)})")
    if isinstance(value, list | tuple | dict | set) and len(value) > _MAX_SHOWN_ITEMS:
        return f"a {type(value).__name__} of {len(value)} items"
    try:
        text = repr(value)
    except ValueError:  # an integer of more digits than Python prints
        text = f"a {type(value).__name__} too large to print"
    except RecursionError:
        text = f"a {type(value).__name__} nested too deep to print"
    return _shorten(text)


def _units(value: str | bytes) -> str:
    return "characters" if isinstance(value, str) else "bytes"


def _shorten(text: str) -> str:
    """Shorten text for a message, and escape half surrogate pairs, which cannot be written."""
    if len(text) > _MAX_SHOWN_CHARS:
        text = f"{text[:_MAX_SHOWN_CHARS]}... ({len(text)} characters)"
    return _escape(text)


def _escape(text: str) -> str:
    return text.encode("utf-8", "backslashreplace").decode()


class Cosmos3Error(Exception):
    """Root of the tree: every error that this package raises on purpose."""


class RequestError(Cosmos3Error, ValueError):
    """A field of the caller's input is wrong: ``num_frames must be 1 + 4k (got 8); use 9``.

    Args:
        field: name of the field, as the caller wrote it.
        given: the value that was given; the message shows it shortened.
        allowed: what the field must be; completes "must be".
        hint: the remedy: a clause, or a sentence with its capital and full stop; optional.
    """

    def __init__(self, field: str, given: Any, allowed: str, hint: str = "") -> None:
        self.field = _shorten(field)
        self.given = _show(given)
        self.allowed = allowed
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        message = f"{self.field} must be {self.allowed} (got {self.given})"
        if not self.hint:
            return message
        return f"{message}{'.' if self.hint[0].isupper() else ';'} {self.hint}"

    @classmethod
    def of_parts(cls, field: str, given: str, allowed: str, hint: str) -> RequestError:
        """Rebuild an error from its attributes, with ``given`` as shown instead of the value."""
        error = cls(field, None, allowed, hint)
        error.given = given
        error.args = (error._message(),)
        return error

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions are rebuilt from ``args`` when they cross a process boundary; ours carry fields instead.
        return self.of_parts, (self.field, self.given, self.allowed, self.hint)


class CapabilityError(RequestError):
    """A well-formed request that this checkpoint, or this version, cannot serve."""


class CheckpointError(Cosmos3Error):
    """The checkpoint cannot be used.

    Args:
        path: the file or directory at fault.
        problem: its fault.
        hint: the remedy, a full sentence; optional.
    """

    def __init__(self, path: str | Path, problem: str, hint: str = "") -> None:
        self.path = str(path)
        self.problem = problem
        self.hint = hint
        super().__init__(f"{path}: {problem}.{' ' + hint if hint else ''}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problem, self.hint)


class MissingFileError(CheckpointError):
    """A file or component of the checkpoint is missing."""


class CorruptFileError(CheckpointError):
    """A file of the checkpoint is damaged, or of another kind than its name."""


class TensorMismatchError(CheckpointError):
    """The weight files lack tensors, hold unknown ones, or hold them in other shapes."""


class StateError(Cosmos3Error):
    """A saved denoise state is damaged, or belongs to another request or model."""


class MediaError(Cosmos3Error):
    """A media file could not be written or read."""


class MeasureError(Cosmos3Error):
    """The work that a benchmark measures failed, died or took too long."""


class ClosedError(Cosmos3Error):
    """A closed engine, decoder or writer was used."""
