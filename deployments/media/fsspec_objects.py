"""Objects at a URL: in a directory, or in a store that fsspec knows, such as s3."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from operator import methodcaller
from pathlib import Path
from typing import Any, BinaryIO, cast
from urllib.parse import parse_qsl, unquote, urlsplit

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractFileSystem

from cosmos3_core.errors import Cosmos3Error
from deployments.media.objects import BLOCK_BYTES, DirectoryObjects, records_last

logger = logging.getLogger("ray.serve")

_HIDDEN = "***"
_USER = re.compile(r"(?<=//)[^/@\s]*@")
# Before the second and the third try of a write, on which hours of work may depend.
_PAUSES_S = (0.5, 2.0)
# On a full disk a few bytes may still find room.
_CHECKED_BYTES = 1 << 20


class ObjectsError(Cosmos3Error):
    """A store cannot be used. The text says why and what to do, without credentials."""


class FsspecObjects:
    """Objects in a store that fsspec knows, with the methods of :class:`DirectoryObjects`.

    Writes are tried three times. Errors hold no credentials. Object stores report no age: :meth:`measure` returns
    zeros. :meth:`open` accepts a missing object, and reading raises.

    Args:
        url: of the store.
        root: prefix of the folders' names, as fsspec's implementation spells it.
    """

    def __init__(self, url: str, root: str) -> None:
        self._url, self._root = url, root
        self.label = hide_secrets(url)

    @property
    def has_atomic_create(self) -> bool:
        with self._file_system() as store:
            return _has_atomic_create(store)

    def put(self, folder: str, name: str, parts: Sequence[bytes | memoryview]) -> None:
        data = b"".join(parts)
        self._write(folder, lambda store: store.pipe_file(self._path(folder, name), data))

    def create(self, folder: str, name: str, data: bytes) -> None:
        path = self._path(folder, name)

        def write(store: Any) -> None:
            if _has_atomic_create(store):
                store.pipe_file(path, data, mode="create")
            elif store.exists(path):
                raise FileExistsError(path)
            else:
                store.pipe_file(path, data)

        self._write(folder, write)

    def put_file(self, folder: str, name: str, path: Path) -> None:
        self._write(folder, lambda store: store.put_file(str(path), self._path(folder, name)))

    def move(self, folder: str, to: str) -> None:
        try:
            for name in records_last(self.names(folder)):
                self._write(to, methodcaller("cp_file", self._path(folder, name), self._path(to, name)))
        except FileNotFoundError:  # another process was first, and has removed it
            return
        self.remove(folder)

    def read(self, folder: str, name: str, start: int = 0, num_bytes: int | None = None) -> bytes:
        if num_bytes == 0:
            return b""
        whole = start == 0 and num_bytes is None
        with self._file_system() as store:
            end = None if num_bytes is None else start + num_bytes
            data: bytes = store.cat_file(self._path(folder, name), **({} if whole else {"start": start, "end": end}))
            return data

    def open(self, folder: str, name: str, num_bytes: int) -> BinaryIO:
        raw = _Blocks(lambda start, size: self.read(folder, name, start, size), num_bytes)
        return cast(BinaryIO, io.BufferedReader(raw, BLOCK_BYTES))

    def folders(self) -> list[str]:
        return self._list(self._root)

    def names(self, folder: str) -> list[str]:
        return self._list(self._path(folder))

    def remove(self, folder: str, name: str | None = None) -> bool:
        try:
            with self._file_system() as store:
                if name is None:
                    store.rm(self._path(folder), recursive=True)
                else:
                    store.rm_file(self._path(folder, name))
        except FileNotFoundError:
            return False
        return True

    def measure(self, folder: str) -> tuple[int, float]:
        return 0, 0.0

    def touch(self, folder: str) -> None:
        return

    def sweep(self, older_than_s: float, now_s: float) -> None:
        return

    def _write(self, folder: str, write: Callable[[Any], None]) -> None:
        def write_once() -> None:
            with self._file_system() as store:
                # Object stores (the asynchronous ones) have no directories; s3fs would create the bucket.
                if not store.async_impl:
                    store.makedirs(self._path(folder), exist_ok=True)
                write(store)

        for pause_s in _PAUSES_S:
            try:
                return write_once()
            except (FileNotFoundError, FileExistsError):
                raise
            except OSError:
                logger.warning("%s failed; the next try is in %g s", self.label, pause_s, exc_info=True)
                time.sleep(pause_s)
        write_once()

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
        """Open the store, for this thread only; raise any of its errors as OSError, without credentials."""
        try:
            # Other processes write: a cached listing would be stale.
            yield fsspec.url_to_fs(self._url, use_listings_cache=False)[0]
        except FileExistsError as error:
            raise FileExistsError(_clean(error, self._url)) from None
        except FileNotFoundError as error:
            raise FileNotFoundError(_clean(error, self._url)) from None
        except Exception as error:  # noqa: BLE001 - every implementation raises its library's own
            raise OSError(f"{self.label}: {type(error).__name__}: {_clean(error, self._url)}") from None


Objects = DirectoryObjects | FsspecObjects
"""A store of objects."""


def open_objects(url: str) -> Objects:
    """Return the store at a URL of ``file:///`` or of an installed fsspec; raise ObjectsError if there is none."""
    if "://" not in url or "::" in url:
        # A cache in front would keep whole files on this machine, without a bound.
        hint = "such as s3://bucket/prefix or file:///directory"
        raise ObjectsError(f"{hide_secrets(url)} is no place for files: a single URL is, {hint}")
    try:
        file_system, root = fsspec.url_to_fs(url)
    except ImportError as error:
        scheme = url.partition("://")[0]
        raise ObjectsError(f"{scheme}:// needs a package that is not installed: {_clean(error, url)}") from None
    except Exception as error:  # noqa: BLE001 - every implementation raises its library's own
        raise ObjectsError(f"{hide_secrets(url)} cannot be opened: {_clean(error, url)}") from None
    if isinstance(file_system, LocalFileSystem):
        return DirectoryObjects(Path(root))
    return FsspecObjects(url, root.rstrip("/"))


def check_usable(objects: Objects) -> None:
    """Write, read and remove an object of a megabyte; raise OSError if the store cannot be used."""
    folder = f".{secrets.token_hex(8)}.part"
    try:
        objects.create(folder, "a", bytes(_CHECKED_BYTES))
        data = objects.read(folder, "a", 0, 2)
    finally:
        objects.remove(folder)
    if data != bytes(2):
        raise OSError("it does not return what was written")


class _Blocks(io.RawIOBase):
    """An object as a raw file, for a buffer that reads blocks."""

    def __init__(self, read: Callable[[int, int], bytes], num_bytes: int) -> None:
        self._read, self._num_bytes, self._position = read, num_bytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._num_bytes}[whence]
        if start + offset < 0:
            raise ValueError(f"a position must be at least 0 (got {start + offset})")
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override] # the buffer gives one
        size = min(len(buffer), self._num_bytes - self._position)
        if size <= 0:
            return 0
        data = self._read(self._position, size)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _has_atomic_create(store: AbstractFileSystem) -> bool:
    """Return whether an implementation has ``mode="create"`` of its own; the base class looks first, then writes."""
    write = type(store)._pipe_file if store.async_impl else type(store).pipe_file
    return write is not AbstractFileSystem.pipe_file and "mode" in inspect.signature(write).parameters


def hide_secrets(url: str) -> str:
    """Return a URL without what may be secret: user, password, query."""
    return _USER.sub(f"{_HIDDEN}@", re.split("[?#]", url, maxsplit=1)[0])


def _clean(error: BaseException, url: str) -> str:
    """Return an error's text without the secrets of a URL."""
    parts = urlsplit(url)
    values = {value for _, value in parse_qsl(parts.query)} | {
        part for part in (parts.username, parts.password) if part
    }
    text = _USER.sub(f"{_HIDDEN}@", str(error))
    for value in sorted(values | {unquote(value) for value in values}, key=len, reverse=True):
        text = text.replace(value, _HIDDEN)
    return text
