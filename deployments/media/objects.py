"""Objects: named bytes in folders, each of which appears whole or not at all; here in a directory.

A folder exists while it is not empty; ``a/b`` is a folder in a folder. Callers check names; none may come from a
client. A writer that is killed leaves the earlier object. Stores behind fsspec without an atomic rename, such as sftp,
may keep half of an object: readers notice by its hash, or by JSON that does not parse.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

BLOCK_BYTES = 1 << 20
# Temporary names; the second form is that of releases until schema 0002.
_TEMPORARY = re.compile(r"\.[0-9a-f]{16}\.part|\.(new|swept)-[0-9a-f]{32}-[0-9a-f]{16}")
# Tries of a write whose folder is removed meanwhile.
_MAX_PUTS = 5


class DirectoryObjects:
    """Objects in a directory: written to a temporary file, forced to the disk, renamed. For any number of processes.

    Every method raises OSError if the store cannot be used, and FileNotFoundError if the name does not exist.

    Args:
        root: the directory; the first write makes it.

    Attributes:
        label: the store in messages.
        has_atomic_create: whether only one of several :meth:`create` at once succeeds; else the last one counts.
    """

    has_atomic_create = True

    def __init__(self, root: Path) -> None:
        self.root, self.label = root, str(root)

    def put(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Write or replace an object, given in parts."""
        self._write(folder, name, parts, os.replace)

    def create(self, folder: str, name: str, data: bytes) -> None:
        """Write an object if there is none, or raise FileExistsError; see :attr:`has_atomic_create`."""
        self._write(folder, name, [data], _link)

    def put_file(self, folder: str, name: str, path: Path) -> None:
        """Write or replace an object with the content of a file, a block in memory at a time."""
        with path.open("rb") as file:
            self._write(folder, name, iter(lambda: file.read(BLOCK_BYTES), b""), os.replace)

    def move(self, folder: str, to: str) -> None:
        """Move a folder's objects to another folder, records last. Several processes may do it at once, and again.

        An object is removed only when it exists in the other folder.
        """
        old, new = self.root / folder, self.root / to
        for name in records_last(_list(old)):
            new.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process was first
                (old / name).rename(new / name)
        self._sync(new)
        for name in _list(old, _TEMPORARY):  # of writers that were killed
            (old / name).unlink(missing_ok=True)
        self._remove_empty(old)

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Return at most ``num_bytes`` of an object from a position on; empty past its end."""
        with (self.root / folder / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if num_bytes is None else num_bytes)

    def open(self, folder: str, name: str, num_bytes: int) -> BinaryIO:
        """Open an object of a known size, to be read block by block."""
        return (self.root / folder / name).open("rb", buffering=0)

    def folders(self) -> list[str]:
        """Return the names of all folders; none if there is no store yet."""
        paths = (self.root / name for name in _list(self.root))
        return [path.name for path in paths if path.is_dir() and not path.is_symlink()]

    def names(self, folder: str) -> list[str]:
        """Return the names of what is in a folder; none if there is no folder."""
        return _list(self.root / folder)

    def remove(self, folder: str, name: str | None = None) -> bool:
        """Remove a folder, or one of its objects; return whether this call did it."""
        path = self.root / folder if name is None else self.root / folder / name
        temporary = self.temporary_path()
        try:
            path.rename(temporary)  # it disappears as a whole, even if this process is killed now
        except FileNotFoundError:
            return False
        if name is None:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)
        self._remove_empty(path.parent)
        return True

    def measure(self, folder: str) -> tuple[int, float]:
        """Return a folder's bytes, and when it was last changed, in seconds since 1970."""
        num_bytes, changed_s = 0, 0.0
        for directory, _, names in os.walk(self.root / folder):
            for path in (Path(directory), *(Path(directory, name) for name in names)):
                with contextlib.suppress(OSError):  # removed just now
                    facts = path.lstat()
                    num_bytes += 0 if stat.S_ISDIR(facts.st_mode) else facts.st_size
                    changed_s = max(changed_s, facts.st_mtime)
        return num_bytes, changed_s

    def touch(self, folder: str) -> None:
        """Set a folder's time of change, which :meth:`measure` reports, to now."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / folder)

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """Remove temporary files that killed processes left. ``now_s``: seconds since 1970."""
        for path in (self.root / name for name in _list(self.root, _TEMPORARY)):
            with contextlib.suppress(OSError):
                if now_s - path.stat().st_mtime > older_than_s:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    def temporary_path(self) -> Path:
        """Return a new path in the directory; :meth:`sweep` removes what is left there."""
        return self.root / f".{secrets.token_hex(8)}.part"

    def _write(
        self, folder: str, name: str, parts: Iterable[bytes | memoryview], give_name: Callable[[Path, Path], None]
    ) -> None:
        self.root.mkdir(parents=True, exist_ok=True)
        temporary, place = self.temporary_path(), self.root / folder
        try:
            with temporary.open("xb") as file:
                file.writelines(parts)
                file.flush()
                os.fsync(file.fileno())
            for _ in range(_MAX_PUTS):
                with contextlib.suppress(FileNotFoundError):
                    is_new = not place.is_dir()
                    place.mkdir(parents=True, exist_ok=True)
                    give_name(temporary, place / name)
                    break
            else:
                raise OSError(f"{place} was removed {_MAX_PUTS} times while {name} was put into it")
        finally:
            temporary.unlink(missing_ok=True)
        self._sync(place, is_new=is_new)

    def _sync(self, place: Path, *, is_new: bool = True) -> None:
        """Sync a folder's entries, and a new folder's own name, so that they survive a crash of the machine."""
        for path in (place, *place.parents):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)
            if path == self.root or not is_new:
                return

    def _remove_empty(self, place: Path) -> None:
        """Remove a folder and its parents as far as they are empty; a writer that needs one makes it again."""
        with contextlib.suppress(OSError):
            while place != self.root:
                place.rmdir()
                place = place.parent


def _link(temporary: Path, path: Path) -> None:
    try:
        os.link(temporary, path)  # a rename would replace what is there
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # no hard links here: one writer succeeds all the same, but the file is half written for a moment
        with path.open("xb") as file:
            file.write(temporary.read_bytes())
            file.flush()
            os.fsync(file.fileno())


def _list(directory: Path, pattern: re.Pattern[str] = re.compile(r"[^.].*")) -> list[str]:
    try:
        return sorted(filter(pattern.fullmatch, os.listdir(directory)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def records_last(names: list[str]) -> list[str]:
    return sorted(names, key=lambda name: name.endswith(".json"))
