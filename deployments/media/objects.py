"""Named bytes in folders, each of which is there as a whole or not at all: in a directory, or in a store fsspec knows.

A folder is there while it has something in it. Names are the caller's to check; none may come from a client. A
directory keeps what was there before when a writer is killed, and what is there after a crash of the machine. Object
stores do the same by themselves. Stores of files that are neither, reached by sftp say, may be left with half of what a
killed writer wrote: whoever reads has to notice, by a hash or by what half a JSON text is.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem

from cosmos3_core.errors import Cosmos3Error

_COPY_BYTES = 1 << 20
_HIDDEN = "***"
_USER = re.compile(r"(?<=//)[^/@\s]*@")
# Names of what is about to appear or to disappear.
_PASSING = re.compile(r"\.[0-9a-f]{16}\.part")
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

    def put_file(self, folder: str, name: str, path: Path) -> None:
        """Put a file of this machine, a part of it in memory at a time."""

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        """Bytes from a position on, at most so many; empty behind the end."""

    def folders(self) -> list[str]:
        """Names of all folders; none where there is no store yet."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing where there is none."""

    def remove(self, folder: str, name: str | None = None) -> None:
        """Remove what is in a folder, or one of it. Harmless where it is not there."""

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
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def put(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        """See :class:`Objects`."""
        with self._fresh() as passing:
            with passing.open("xb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            self._give_name(passing, folder, name)

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
        with (self._root / folder / name).open("rb") as file:
            file.seek(start)
            return file.read(-1 if num_bytes is None else num_bytes)

    def folders(self) -> list[str]:
        """See :class:`Objects`."""
        return _listed(self._root)

    def names(self, folder: str) -> list[str]:
        """See :class:`Objects`."""
        return _listed(self._root / folder)

    def remove(self, folder: str, name: str | None = None) -> None:
        """See :class:`Objects`."""
        place = self._root / folder if name is None else self._root / folder / name
        passing = self._passing()
        with contextlib.suppress(FileNotFoundError):
            place.rename(passing)  # gone at once, whatever becomes of this process
        if name is None:
            shutil.rmtree(passing, ignore_errors=True)
        else:
            passing.unlink(missing_ok=True)

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """See :class:`Objects`."""
        for path in (self._root / name for name in _listed(self._root, _PASSING)):
            with contextlib.suppress(OSError):
                if now_s - path.stat().st_mtime > older_than_s:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()

    @contextlib.contextmanager
    def _fresh(self) -> Iterator[Path]:
        """Where to write what is to get a name."""
        self._root.mkdir(parents=True, exist_ok=True)
        passing = self._passing()
        try:
            yield passing
        finally:
            passing.unlink(missing_ok=True)

    def _passing(self) -> Path:
        return self._root / f".{secrets.token_hex(8)}.part"

    def _give_name(self, passing: Path, folder: str, name: str) -> None:
        place = self._root / folder
        for _ in range(_MAX_PUTS):
            place.mkdir(exist_ok=True)
            with contextlib.suppress(FileNotFoundError):
                passing.replace(place / name)
                break
        else:
            raise OSError(f"{place} was removed {_MAX_PUTS} times while {name} was put into it")
        for changed in (place, self._root):
            _sync_directory(changed)


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
        return self._listed(self._root)

    def names(self, folder: str) -> list[str]:
        """See :class:`Objects`."""
        return self._listed(self._path(folder))

    def remove(self, folder: str, name: str | None = None) -> None:
        """See :class:`Objects`."""
        with contextlib.suppress(FileNotFoundError), self._file_system() as store:
            if name is None:
                store.rm(self._path(folder), recursive=True)
            else:
                store.rm_file(self._path(folder, name))

    def sweep(self, older_than_s: float, now_s: float) -> None:
        """See :class:`Objects`. Nothing here is without a name."""

    def _make(self, store: Any, folder: str) -> None:
        # Object stores, whose implementations are asynchronous, have no directories; s3fs would make the bucket.
        if not store.async_impl:
            store.makedirs(self._path(folder), exist_ok=True)

    def _path(self, *names: str) -> str:
        return "/".join([self._root, *names])

    def _listed(self, path: str) -> list[str]:
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
        except FileNotFoundError as error:
            raise FileNotFoundError(_hidden(error, self._url)) from None
        except Exception as error:  # noqa: BLE001 - every implementation raises its library's own
            raise OSError(f"{shown_url(self._url)}: {type(error).__name__}: {_hidden(error, self._url)}") from None


def _listed(directory: Path, pattern: re.Pattern[str] = re.compile(r"[^.].*")) -> list[str]:
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
