"""Output files and their writers; files appear under their name only when they are complete."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, BinaryIO, Self, TypeAlias

from cosmos3_core.errors import ClosedError, MediaError, RequestError
from cosmos3_core.media.file_kinds import ACTIONS_SUFFIX, SUFFIXES

if TYPE_CHECKING:
    from cosmos3_core.media.pixels import Frames
    from cosmos3_core.media.sound import Samples

Target: TypeAlias = str | Path | BinaryIO
"""A destination: a path in an existing directory, where a file of that name is replaced; or a binary stream open for
writing, which gets the whole file at the end and is left open."""

# File systems take 255; the rest is for the suffix and the hidden name during writing.
_MAX_NAME_BYTES = 200


def path_with_suffix(out: str | Path | None, suffix: str) -> Path:
    """Add a suffix to ``out``, in place of the ending that it may have: ``clip.mp4`` stays, or becomes ``clip.png``.

    Raises:
        RequestError: ``out`` cannot be the path of a file.
    """
    allowed = "a file's path, with or without its ending, such as clip or clip.mp4"
    if not isinstance(out, str | Path) or "\0" in str(out):
        raise RequestError("out", out, allowed)
    name = Path(out).name
    if not name or str(out).endswith(("/", "/.", "/..")) or name == "..":
        raise RequestError("out", str(out), allowed)
    if len(name.encode()) > _MAX_NAME_BYTES:
        raise RequestError("out", str(out), f"a file name of at most {_MAX_NAME_BYTES} bytes")
    ending = next((it for it in (*SUFFIXES.values(), ACTIONS_SUFFIX) if name.lower().endswith(it) and name != it), "")
    return Path(out).with_name(name[: len(name) - len(ending)] + suffix)


def describe_failure(what: str, error: Exception) -> MediaError | MemoryError:
    """Return the exception to raise after ``error`` of FFmpeg, Pillow or the disk.

    It is a MemoryError if that is what failed: the file system and the encoder work.
    """
    return (MemoryError if isinstance(error, MemoryError) else MediaError)(f"{what}: {error}")


class MediaWriter(ABC):
    """The writer of one file; a context manager that finishes the file, or leaves none after an exception."""

    _is_open = True

    @abstractmethod
    def write(self, frames: Frames) -> None:
        """Add uint8 frames [F, Y, X, 3].

        Raises:
            RequestError: the frames have another dtype or shape, or the file has no pictures.
        """

    @abstractmethod
    def write_sound(self, samples: Samples) -> None:
        """Add samples, float32 [channels, n] in [-1, 1], before, between or after the frames.

        Samples beyond the format's ``num_samples`` are dropped; :meth:`close` raises MediaError if there are fewer.

        Raises:
            RequestError: the samples have another dtype or shape, or the file has no sound.
        """

    @abstractmethod
    def close(self) -> None:
        """Finish the file and give it its name; idempotent."""

    @abstractmethod
    def abort(self) -> None:
        """Close the writer and leave no file. Does nothing after :meth:`close`."""

    def _require_open(self) -> None:
        if not self._is_open:
            name = type(self).__name__
            raise ClosedError(f"this {name} is closed, or has failed; open a new one to write another file")

    def __enter__(self) -> Self:
        self._require_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()


class OutputFile:
    """A temporary file for a result until it is complete.

    For a path it is a hidden sibling, so that :meth:`commit` is a rename within one file system. For a stream it is a
    file in the temporary directory that :meth:`commit` copies: muxers seek, which streams need not support, and a
    failed run leaves the stream untouched. The stream stays open: the caller owns it.

    Raises:
        RequestError: the path is a directory, or its directory does not exist.
    """

    def __init__(self, target: Target) -> None:
        self._stream: BinaryIO | None = None
        self._final: Path | None = None
        if isinstance(target, str | Path):
            # Absolute, because FFmpeg would read "a:b.mp4" as a URL of protocol "a".
            self._final = Path(target).absolute()
            if self._final.is_dir():
                raise RequestError("target", str(target), "a file's path", "name a file in that directory")
            if not self._final.parent.is_dir():
                hint = "create the directory first"
                raise RequestError("target", str(target), "a path in an existing directory", hint)
            self.path = self._final.with_name(f".{self._final.name}.{secrets.token_hex(8)}.part")
        else:
            self._stream = target
            self.path = Path(tempfile.gettempdir()) / f"cosmos3-{secrets.token_hex(8)}.part"

    def commit(self) -> None:
        """Give the finished file its name, or copy it to the stream.

        Raises:
            MediaError: it failed; the temporary file is removed.
        """
        try:
            if self._final is not None:
                os.replace(self.path, self._final)
            elif self._stream is not None:
                with self.path.open("rb") as finished:
                    shutil.copyfileobj(finished, self._stream)
        except OSError as error:
            place = self._final or self._stream
            raise MediaError(f"the finished file could not be put at {place}: {error}") from error
        finally:
            self.discard()

    def discard(self) -> None:
        """Remove the temporary file; harmless after :meth:`commit`."""
        with contextlib.suppress(OSError):  # never created, or the name is too long
            self.path.unlink()
