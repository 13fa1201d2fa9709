"""SQLite files: creation, and the settings of each connection.

With the write-ahead log readers do not wait for a writer. A commit is on the disk when it returns
(``synchronous=FULL``), so that it survives a power failure.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import time
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, event

from deployments.errors import JobsError

_PAUSE_S = 0.02


def prepare(path: Path, busy_s: float) -> None:
    """Create the file if it is not there, for this user alone (it holds prompts), and switch on its write-ahead log.

    Args:
        path: of the file.
        busy_s: how long to wait for others that do the same.

    Raises:
        OSError, sqlite3.Error: it cannot be made, or is no database.
        JobsError: its file system cannot have such a log.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    deadline_s = time.monotonic() + busy_s
    while (mode := _write_ahead(path, time.monotonic() > deadline_s)) is None:
        time.sleep(_PAUSE_S)
    if mode != "wal":
        raise JobsError(
            f"{path}: its file system cannot have SQLite's write-ahead log (it stays with {mode!r}); set jobs.database "
            "to a file on a local disk, or to PostgreSQL"
        )


def _write_ahead(path: Path, is_last_try: bool) -> str | None:
    """Switch on the log and return the journal's mode; None where another process does the same just now."""
    with contextlib.closing(sqlite3.connect(path, timeout=_PAUSE_S, isolation_level=None)) as connection:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if is_last_try or "locked" not in str(error):
                raise
            return None


def listen(engine: Engine) -> None:
    """Set up every connection, and begin transactions with the option ``is_writing`` as writers."""

    @event.listens_for(engine, "connect")
    def _connected(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy says BEGIN; the driver would not for DDL
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begun(connection: Connection) -> None:
        # A transaction that reads first and writes later would fail where another has written in between.
        is_writing = connection.get_execution_options().get("is_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")
