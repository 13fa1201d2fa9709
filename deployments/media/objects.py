"""Named bytes in folders, each of which is there as a whole or not at all: in a directory, or in a store fsspec knows.

A folder is there while it has something in it; ``a/b`` is a folder in a folder. Names are the caller's to check; none
may come from a client. A directory keeps what was there before when a writer is killed, and what is there after a crash
of the machine. Object stores do the same by themselves. Stores of files that are neither, reached by sftp say, may be
left with half of what a killed writer wrote: readers have to notice, by a hash or by what half a JSON text is.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cosmos3_core.errors import Cosmos3Error

_COPY_BYTES = 1 << 20
_HIDDEN = "***"
_USER = re.compile(r"(?<=//)[^/@\s]*@")
# Names of what is about to appear or to disappear; the second one is of folders of releases until schema 0002.
_PASSING = re.compile(r"\.[0-9a-f]{16}\.part|\.(new|swept)-[0-9a-f]{32}-[0-9a-f]{16}")
# A folder that is removed while something is put into it is made again.
_MAX_PUTS = 5


class ObjectsError(Cosmos3Error):
    """There is no such store, or it cannot be used; says why and what to do. Has no credentials in it."""


class Objects(Protocol):
    """See the module. For any number of threads and processes.

    Every method raises OSError where the store cannot be used, and FileNotFoundError where nothing of the name is
    there; neither has credentials in it.
    """

    def put(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """Put bytes, given in parts, in the place of what was there."""

    def put_new(self, folder: str, name: str, data: bytes) -> None:
        """Put bytes where nothing is yet; FileExistsError where something is. See :attr:`creates_once`."""

    @property
    def creates_once(self) -> bool:
        """Whether of several :meth:`put_new` at once only one can do it; else they may all, and the last one counts."""
        ...

    def put_file(self, folder: str, name: str, path: Path) -> None:
        """Put a file of this machine, a part of it in memory at a time."""

    def move(self, folder: str, to: str) -> None:
        """Move all that is in a folder to another one. Nothing goes before it is there; can be done again, by several.

        What has been moved meanwhile is left as it is.
        """

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Bytes from a position on, at most so many; empty behind the end."""

    def folders(self) -> list[str]:
        """Names of all folders; none where there is no store yet."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing where there is none."""

    def remove(self, folder: str, name: str | None = None) -> bool:
        """Remove what is in a folder, or one of it, where it is there. Returns whether this call did it."""
        ...

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """Remove what killed processes left that is of no name. ``now_s``: seconds since 1970."""


def open_objects(url: str, *folders: str) -> Objects:
    """The store at a URL.

    Args:
        url: ``file:///directory``, or anything else that an installed implementation of fsspec takes.
        folders: below it, in which the store is.

    Raises:
        ObjectsError: there is no such store.
    """
    hint = "such as s3://bucket/prefix or file:///directory"
    if "://" not in url or "::" in url:
        # A cache in front would keep whole files on this machine, without a bound.
        raise ObjectsError(f"{shown_url(url)} is no place for files: a single URL is, {hint}")
    try:
        file_system, root = fsspec.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise ObjectsError(f"{scheme}:// needs a package that is not installed: {_hidden(error, url)}") from None
    except Exception as error:  # noqa: BLE001 - every implementation raises its library's own
        raise ObjectsError(f"{shown_url(url)} cannot be opened: {_hidden(error, url)}") from None
    if isinstance(file_system, LocalFileSystem):
        return DirectoryObjects(Path(root, *folders))
    return FsspecObjects(url, "/".join([root.rstrip("/"), *folders]))


def shown_url(url: str) -> str:
    """A URL without what may be secret: user, password, query."""
    return _USER.sub(f"{_HIDDEN}@", re.split("[?#]", url, maxsplit=1)[0])


class DirectoryObjects:
    """In a directory: written beside, forced to the disk, renamed.

    Args:
        root: made where it is not, when something is put.

    Attributes:
        root: as given.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """See :class:`Objects`."""
        with self._fresh() as passing:
            with passing.open("xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            self._give_name(passing, folder, name)

    creates_once = True

    def put_new(self, folder: str, name: str, data: bytes) -> None:
        """See :class:`Objects`."""
        with self._fresh() as passing:
            with passing.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            self._give_name(passing, folder, name, _create)

    def move(self, folder: str, to: str) -> None:
        """See :class:`Objects`."""
        old, new = self.root / folder, self.root / to
        # The records last, without which the rest is not looked at.
        for name in sorted(_list(old), key=lambda name: name.endswith(".json")):
            new.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileNotFoundError):  # another process was first
                (old / name).rename(new / name)
        _sync_directory(new)
        _sync_directory(new.parent)
        for name in _list(old, _PASSING):  # what was about to appear, and never did
            (old / name).unlink(missing_ok=True)
        self._remove_empty(old)

    def put_file(self, folder: str, name: str, path: Path) -> None:
        """See :class:`Objects`."""
        with self._fresh() as passing:
            with path.open("rb") as source, passing.open("xb") as file:
                shutil.copyfileobj(source, file, _COPY_BYTES)
                file.flush()
                os.fsync(file.fileno())
            self._give_name(passing, folder, name)

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """See :class:`Objects`."""
        with (self.root / folder / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if num_bytes is None else num_bytes)

    def folders(self) -> list[str]:
        """See :class:`Objects`."""
        return [
            name for name in _list(self.root) if (self.root / name).is_dir() and not (self.root / name).is_symlink()
        ]

    def names(self, folder: str) -> list[str]:
        """See :class:`Objects`."""
        return _list(self.root / folder)

    def remove(self, folder: str, name: str | None = None) -> bool:
        """See :class:`Objects`."""
        place = self.root / folder if name is None else self.root / folder / name
        passing = self._passing()
        try:
            place.rename(passing)  # gone at once, whatever becomes of this process
        except FileNotFoundError:
            return False
        if name is None:
            shutil.rmtree(passing, ignore_errors=True)
        else:
            passing.unlink(missing_ok=True)
        self._remove_empty(place.parent)
        return True

    def measure(self, folder: str) -> tuple[int, float]:
        """Count a folder's bytes, in folders inside as well, and say when the last of its files was changed.

        Of an empty folder, when it became so: it may be about to get a file.
        """
        num_bytes, changed_s = 0, 0.0
        for directory, _, names in os.walk(self.root / folder):
            for name in names:
                with contextlib.suppress(OSError):  # removed just now
                    facts = os.stat(os.path.join(directory, name), follow_symlinks=False)
                    num_bytes, changed_s = num_bytes + facts.st_size, max(changed_s, facts.st_mtime)
        return num_bytes, changed_s or self.touched_s(folder)

    def touch(self, folder: str) -> None:
        """Note that a folder is needed; :meth:`touched_s` says when that was, for all processes."""
        with contextlib.suppress(FileNotFoundError):
            os.utime(self.root / folder)

    def touched_s(self, folder: str) -> float:
        """Return when a folder was touched, or something appeared or disappeared in it; 0 where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return (self.root / folder).stat().st_mtime
        return 0.0

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """See :class:`Objects`."""
        for path in (self.root / name for name in _list(self.root, _PASSING)):
            with contextlib.suppress(OSError):
                if now_s - path.stat().st_mtime > older_than_s:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Path]:
        """Where to write what is to get a name."""
        self.root.mkdir(parents=True, exist_ok=True)
        passing = self._passing()
        try:
            yield passing
        finally:
            passing.unlink(missing_ok=True)

    def _passing(self) -> Path:
        return self.root / f".{secrets.token_hex(8)}.part"

    def _give_name(
        self, passing: Path, folder: str, name: str, give: Callable[[Path, Path], object] = os.replace
    ) -> None:
        place = self.root / folder
        for _ in range(_MAX_PUTS):
            with contextlib.suppress(FileNotFoundError):
                place.mkdir(parents=True, exist_ok=True)
                give(passing, place / name)
                break
        else:
            raise OSError(f"{place} was removed {_MAX_PUTS} times while {name} was put into it")
        for changed in (place, *place.parents):
            _sync_directory(changed)
            if changed == self.root:
                break

    def _remove_empty(self, place: Path) -> None:
        """Remove a folder with nothing in it, and the one that it is in; a writer that needs it makes it again."""
        with contextlib.suppress(OSError):
            while place != self.root:
                place.rmdir()
                place = place.parent


def _create(passing: Path, place: Path) -> None:
    """Give a file a name that nothing has yet."""
    try:
        os.link(passing, place)  # appears as a whole
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # a file system without hard links: once as well, but half written for a moment
        with place.open("xb") as file:
            file.write(passing.read_bytes())
            file.flush()
            os.fsync(file.fileno())


class FsspecObjects:
    """In a store that fsspec knows: one object a name, read by ranges.

    Args:
        url: of the store.
        root: what comes before the folders' names, as fsspec's implementation names it.
    """

    def __init__(self, url: str, root: str) -> None:
        self._url, self._root = url, root

    def put(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """See :class:`Objects`."""
        with self._file_system() as store:
            self._make(store, folder)
            store.pipe_file(self._path(folder, name), b"".join(parts))

    @property
    def creates_once(self) -> bool:
        """See :class:`Objects`."""
        with self._file_system() as store:
            return _creates_once(store)

    def put_new(self, folder: str, name: str, data: bytes) -> None:
        """See :class:`Objects`."""
        with self._file_system() as store:
            self._make(store, folder)
            path = self._path(folder, name)
            if _creates_once(store):
                store.pipe_file(path, data, mode="create")
            elif store.exists(path):
                raise FileExistsError(path)
            else:
                store.pipe_file(path, data)

    def move(self, folder: str, to: str) -> None:
        """See :class:`Objects`. By copies: the records last, without which the rest is not looked at."""
        names = sorted(self.names(folder), key=lambda name: name.endswith(".json"))
        try:
            with self._file_system() as store:
                for name in names:
                    self._make(store, to)
                    store.cp_file(self._path(folder, name), self._path(to, name))
        except FileNotFoundError:  # another process was first, and has removed it
            return
        self.remove(folder)

    def put_file(self, folder: str, name: str, path: Path) -> None:
        """See :class:`Objects`."""
        with self._file_system() as store:
            self._make(store, folder)
            store.put_file(str(path), self._path(folder, name))

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """See :class:`Objects`. At the end or behind it, stores say what they like: ask for no such bytes."""
        if num_bytes == 0:
            return b""
        whole = start == 0 and num_bytes is None
        with self._file_system() as store:
            end = None if num_bytes is None else start + num_bytes
            data: bytes = store.cat_file(self._path(folder, name), **({} if whole else {"start": start, "end": end}))
            return data

    def folders(self) -> list[str]:
        """See :class:`Objects`."""
        return self._list(self._root)

    def names(self, folder: str) -> list[str]:
        """See :class:`Objects`."""
        return self._list(self._path(folder))

    def remove(self, folder: str, name: str | None = None) -> bool:
        """See :class:`Objects`."""
        try:
            with self._file_system() as store:
                if name is None:
                    store.rm(self._path(folder), recursive=True)
                else:
                    store.rm_file(self._path(folder, name))
        except FileNotFoundError:
            return False
        return True

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """See :class:`Objects`. Nothing here is without a name."""

    def _make(self, store: Any, folder: str) -> None:
        # Object stores, whose implementations are asynchronous, have no directories; s3fs would make the bucket.
        if not store.async_impl:
            store.makedirs(self._path(folder), exist_ok=True)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *names])

    def _list(self, path: str) -> list[str]:
        try:
            with self._file_system() as store:
                found = store.ls(path, detail=False)
        except FileNotFoundError:
            return []
        names = {str(entry).rstrip("/").rpartition("/")[2] for entry in found if str(entry).rstrip("/") != path}
        return sorted(names)

    @contextlib.contextmanager
    def _file_system(self) -> Iterator[Any]:
        """fsspec's, of this thread: those of plain protocols are not for several. What it raises is an OSError."""
        try:
            # Other processes write: what was listed a while ago says nothing.
            yield fsspec.url_to_fs(self._url, use_listings_cache=False)[0]
        except FileExistsError as error:
            raise FileExistsError(_hidden(error, self._url)) from None
        except FileNotFoundError as error:
            raise FileNotFoundError(_hidden(error, self._url)) from None
        except Exception as error:  # noqa: BLE001 - every implementation raises its library's own
            raise OSError(f"{shown_url(self._url)}: {type(error).__name__}: {_hidden(error, self._url)}") from None


def _creates_once(store: AbstractFileSystem) -> bool:
    """Return whether an implementation of fsspec knows ``mode="create"`` itself; the base class looks, then writes."""
    write = type(store)._pipe_file if store.async_impl else type(store).pipe_file
    return write is not AbstractFileSystem.pipe_file and "mode" in inspect.signature(write).parameters


def _list(directory: Path, pattern: re.Pattern[str] = re.compile(r"[^.].*")) -> list[str]:
    try:
        return sorted(filter(pattern.fullmatch, os.listdir(directory)))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _sync_directory(path: Path) -> None:
    """Have names in a directory be there after a crash of the machine."""
    with contextlib.suppress(FileNotFoundError):  # removed meanwhile
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _hidden(error: BaseException, url: str) -> str:
    """What an error says, without what the URL has of secrets."""
    parts = urlsplit(url)
    values = {value for _, value in parse_qsl(parts.query)} | {
        part for part in (parts.username, parts.password) if part
    }
    text = _USER.sub(f"{_HIDDEN}@", str(error))
    for value in sorted(values | {unquote(value) for value in values}, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return text
