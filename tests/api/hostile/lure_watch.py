"""A file and a port that must stay untouched; reports access to them by any process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.api.hostile.broken_files import Lures

_IN_ACCESS, _IN_OPEN = 0x1, 0x20
_NAME = "mark-of-a-lure"
_CALLS = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request", "os.system", "os.exec")
_FILES = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink")


class _Audit:
    """Records audit events of this interpreter while enabled."""

    def __init__(self) -> None:
        self.noted: list[str] | None = None
        sys.addaudithook(self._note)  # cannot be removed; has no effect while disabled

    def _note(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.noted is None:
            return
        if event in _CALLS or (event in _FILES and any(_NAME in repr(it) for it in arguments[:2])):
            self.noted.append(f"{event} {arguments!r}"[:300])


_AUDIT = _Audit()


class Watch:
    """Watches the file and the port.

    Args:
        directory: for the file.
        watches_network: whether to watch this process's network calls too.

    Attributes:
        canary: content of the file.
        lures: the file and the port.
    """

    def __init__(self, directory: Path, *, watches_network: bool = True) -> None:
        self._watches_network = watches_network
        self.canary = os.urandom(16).hex().encode()
        path = directory / _NAME
        path.write_bytes(self.canary)
        self._libc = ctypes.CDLL(None, use_errno=True)
        # FFmpeg opens files without Python's audit hook, and in another process; inotify sees both.
        self._inotify = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._inotify >= 0, os.strerror(ctypes.get_errno())
        assert self._libc.inotify_add_watch(self._inotify, str(path).encode(), _IN_ACCESS | _IN_OPEN) >= 0
        self._listening = socket.create_server(("127.0.0.1", 0))
        self._listening.setblocking(False)
        self.lures = Lures(str(path), f"127.0.0.1:{self._listening.getsockname()[1]}")

    def was_accessed(self) -> bool:
        """Whether the file was opened or the port called since the last look."""
        was_touched = False
        with contextlib.suppress(BlockingIOError):
            was_touched = bool(os.read(self._inotify, 1 << 16))
        with contextlib.suppress(BlockingIOError):
            self._listening.accept()[0].close()
            was_touched = True
        return was_touched

    @contextlib.contextmanager
    def expect_no_access(self, what: object) -> Iterator[None]:
        """Check that neither is touched in the block and that this process makes no network call."""
        noted: list[str] = []
        _AUDIT.noted = noted if self._watches_network else None
        try:
            yield
        finally:
            _AUDIT.noted = None
        was_touched = self.was_accessed()
        assert not noted, (what, noted)
        assert not was_touched, what

    def close(self) -> None:
        os.close(self._inotify)
        self._listening.close()
