"""Database: the connections to the database of jobs, a SQLite file of one machine or PostgreSQL for several.

Any number of processes may have it open. A transaction that writes waits for the ones before it: at most
:data:`BUSY_S` for those of its own process, and as long for those of others. One that decides which job is accepted or
run next also takes the queue lock.

On SQLite readers do not wait for a writer (write-ahead log), and a commit is on the disk when it returns
(``synchronous=FULL``), so that it survives a power failure.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import sqlalchemy
from sqlalchemy import URL, Connection, Engine, event
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnectionLeft

from deployments.errors import JobsError
from deployments.jobs.schema import NEWEST, VERSION_TABLE
from deployments.media.store import resolve_directory

if TYPE_CHECKING:
    from deployments.config import AppConfig

BUSY_S = 10.0
"""Longest wait of a transaction for those before it, in its own process and then in others."""

_UPGRADE_S = 120.0
_CONNECT_S = 10
_STATEMENT_S = 60.0
# Tolerated difference of clocks, shorter than any lease.
_MAX_SKEW_S = 2.0
_NUM_CONNECTIONS, _MAX_MORE_CONNECTIONS = 8, 24
# Between two tries to switch on the write-ahead log of a new file.
_PAUSE_S = 0.02
# Advisory locks in a PostgreSQL database, by numbers that no other program should use.
_QUEUE_LOCK, _UPGRADE_LOCK = 0x636F736D6F7303, 0x636F736D6F7304
_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}
_ALLOWED = (
    "jobs.database must be sqlite:////absolute/path/of/a/file or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
)
# Fragment of an error's text -> advice.
_ADVICE = {
    "locked": f"others kept it busy for {BUSY_S:g} s; try again",
    "lock timeout": f"others kept it busy for {BUSY_S:g} s; try again",
    "not a database": "the file is another program's or damaged; set jobs.database to another one",
    "malformed": "the file is damaged; restore it, or set jobs.database to another one",
    "readonly": "this user must be able to write to the file and its directory",
    "unable to open": "this user must be able to write to the file and its directory",
    "Permission denied": "this user must be able to write to the file and its directory",
    "No such file or directory": "make its directory first",
    "already exists": "it holds tables of another program; set jobs.database to a database of its own",
    "password authentication failed": "check the user and password in jobs.database",
    "FATAL: database": "create it first, or check jobs.database",
}


def database_url(config: AppConfig) -> str:
    """Return SQLAlchemy's URL of an app's database: the key ``jobs.database``, or a SQLite file beside the app's media.

    The file must be on a local disk and serves one machine: SQLite's locks do not reach over a network. Raise JobsError
    or MediaStoreError if its directory cannot be made.
    """
    if config.jobs.database is not None:
        return config.jobs.database
    directory = resolve_directory(config.media)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobsError(f"{directory} cannot be made: {error}; set media.directory or jobs.database") from error
    return URL.create("sqlite", database=str(directory / f"jobs-{config.name}.sqlite3")).render_as_string()


class Database:
    """Connections to a database of jobs, for any number of threads; a forked process must open its own.

    Args:
        url: SQLAlchemy's URL of a SQLite file (absolute path) or a PostgreSQL database (psycopg).

    Attributes:
        name: of the database in messages, without user and password.

    Raises:
        JobsError: the URL is of another kind, the database cannot be used, or its schema is of a newer release.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = _describe(parsed)
        self._secrets = _find_secrets(parsed)
        # SQLite waits by sleeping; threads of one process queue up here instead.
        self._write_lock = threading.Lock()
        self._writing_since_s: dict[object, float] = {}
        if self.is_sqlite:
            try:
                with self._translate_errors():
                    prepare_file(Path(str(parsed.database)), BUSY_S)
            except OSError as error:
                raise self._failure(error) from error
        self._engine = _make_sqlite_engine(parsed) if self.is_sqlite else _make_postgresql_engine(parsed)
        try:
            self._check_clock()
            self._upgrade()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Begin a read-only transaction, which never waits; raise ``JobsError`` if the database fails."""
        with self._translate_errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self, *, is_queue: bool = False) -> Iterator[Connection]:
        """Begin a write transaction: durable at the end of the block, rolled back if the block raises.

        With ``is_queue`` it takes the queue lock, which one transaction at a time holds over all processes. Raise
        JobsError if the database failed, or others kept it busy for :data:`BUSY_S`.
        """
        with self._translate_errors(), self._write_transaction(_QUEUE_LOCK if is_queue else None) as connection:
            yield connection

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._engine.dispose()

    @property
    def longest_write_s(self) -> float:
        """Seconds since the start of the first write transaction that has not ended; 0 if there is none.

        It waits for others, for a lock of one row or for the disk.
        """
        now_s = time.monotonic()
        return now_s - min(tuple(self._writing_since_s.values()), default=now_s)

    @contextmanager
    def _write_transaction(self, lock: int | None = None) -> Iterator[Connection]:
        """Begin a write transaction, in PostgreSQL with an advisory lock."""
        with ExitStack() as stack:
            transaction = object()
            self._writing_since_s[transaction] = time.monotonic()
            stack.callback(self._writing_since_s.pop, transaction)
            if self.is_sqlite:
                if not self._write_lock.acquire(timeout=BUSY_S):
                    raise JobsError(
                        f"{self.name}: other threads of this process kept it busy for {BUSY_S:g} s; try again"
                    )
                stack.callback(self._write_lock.release)
            connection = stack.enter_context(self._engine.connect())
            connection.execution_options(is_writing=True)
            stack.enter_context(connection.begin())
            if lock is not None and not self.is_sqlite:
                _take_lock(connection, lock)
            yield connection

    def _check_clock(self) -> None:
        """Check this machine's clock against the server's: leases and expiry are compared with local clocks."""
        if self.is_sqlite:  # on this machine, with one clock
            return
        with self.reading() as connection:
            sent_s = time.time()
            server_s = float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())
            lead_s = _compute_lead_s(sent_s, server_s, time.time())
        if abs(lead_s) > _MAX_SKEW_S:
            raise JobsError(
                f"this machine's clock must be within {_MAX_SKEW_S:g} s of that of {self.name} (got {lead_s:+.1f} s), "
                "or running jobs would be taken for abandoned; synchronise both by NTP"
            )

    def _upgrade(self) -> None:
        with self.reading() as connection:
            if sqlalchemy.inspect(connection).has_table(VERSION_TABLE):
                versions = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalars().all()
                if list(versions) == [NEWEST]:
                    return
        # Alembic takes as long to import as all the rest, and is seldom needed.
        from deployments.jobs.migrations import is_current, upgrade

        with self._translate_errors(), self._write_transaction() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_UPGRADE_S * 1000:.0f}")
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_UPGRADE_S * 1000:.0f}")
                _take_lock(connection, _UPGRADE_LOCK)
            # Another process may have upgraded it meanwhile, to this release or a newer one.
            if not is_current(connection, self.name):
                upgrade(connection)

    @contextmanager
    def _translate_errors(self) -> Iterator[None]:
        try:
            yield
        except NoConnectionLeft as error:
            raise JobsError(f"{self.name}: all its connections were in use for {BUSY_S:g} s; try again") from error
        except (SQLAlchemyError, sqlite3.Error) as error:
            # Not "from error": its text, which may hold secrets, would be printed too.
            raise self._failure(getattr(error, "orig", None) or error) from None

    def _failure(self, error: BaseException) -> JobsError:
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        advice = next((f"; {words}" for part, words in _ADVICE.items() if part in text), "")
        return JobsError(f"the database of jobs {self.name} failed: {text}{advice}")


def _compute_lead_s(sent_s: float, server_s: float, received_s: float) -> float:
    """Return the smallest lead of this clock over the server's that fits the answer; negative if it is behind."""
    return max(sent_s - server_s, 0.0) + min(received_s - server_s, 0.0)


def prepare_file(path: Path, busy_s: float) -> None:
    """Create a SQLite file if missing, for this user alone (it holds prompts), and switch on its write-ahead log.

    Wait for other processes that do the same for ``busy_s`` at most. Raise OSError or sqlite3.Error if the file cannot
    be created or is no database, JobsError if its file system does not support the log.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    deadline_s = time.monotonic() + busy_s
    while (mode := _switch_on_log(path, time.monotonic() > deadline_s)) is None:
        time.sleep(_PAUSE_S)
    if mode != "wal":
        raise JobsError(
            f"{path}: its file system cannot have SQLite's write-ahead log (it stays with {mode!r}); set jobs.database "
            "to a file on a local disk, or to PostgreSQL"
        )


def _switch_on_log(path: Path, is_last_try: bool) -> str | None:
    """Switch on the write-ahead log; return the journal mode, None while another process does the same."""
    with contextlib.closing(sqlite3.connect(path, timeout=_PAUSE_S, isolation_level=None)) as connection:
        try:
            return str(connection.execute("PRAGMA journal_mode = WAL").fetchone()[0])
        except sqlite3.OperationalError as error:
            if is_last_try or "locked" not in str(error):
                raise
            return None


def _make_sqlite_engine(url: URL) -> Engine:
    engine = _make_engine(url, connect_args={"timeout": BUSY_S})

    @event.listens_for(engine, "connect")
    def set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # SQLAlchemy sends BEGIN; the driver omits it before DDL
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # IMMEDIATE: a transaction that reads first and writes later fails if another one writes in between.
        is_writing = connection.get_execution_options().get("is_writing", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if is_writing else "BEGIN")

    return engine


def _make_postgresql_engine(url: URL) -> Engine:
    limits_s = {
        "lock_timeout": BUSY_S,
        "statement_timeout": _STATEMENT_S,
        "idle_in_transaction_session_timeout": _STATEMENT_S,
    }
    options = [str(url.query.get("options", "")), *(f"-c {name}={s * 1000:.0f}" for name, s in limits_s.items())]
    return _make_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_pre_ping=True,  # a restarted server has closed them
        connect_args={
            "connect_timeout": _CONNECT_S,
            "options": " ".join(options).strip(),
            # Notice a server that vanishes.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        },
    )


def _make_engine(url: URL, **options: Any) -> Engine:
    return sqlalchemy.create_engine(
        url,
        hide_parameters=True,
        json_serializer=partial(json.dumps, allow_nan=False),
        pool_size=_NUM_CONNECTIONS,
        max_overflow=_MAX_MORE_CONNECTIONS,
        pool_timeout=BUSY_S,
        **options,
    )


def _take_lock(connection: Connection, number: int) -> None:
    """Take an advisory lock until the transaction ends."""
    connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(number)))


def _parse_url(url: str) -> URL:
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        raise JobsError(f"{_ALLOWED} (got no URL)") from None
    backend = parsed.get_backend_name()
    driver = _DRIVERS.get(backend)
    if driver is None or parsed.drivername not in (backend, driver):
        raise JobsError(f"{_ALLOWED} (got a URL of {parsed.drivername})")
    if backend == "sqlite" and (parsed.query or not Path(parsed.database or "").is_absolute()):
        # Processes start in different directories, and a database in memory would be lost.
        raise JobsError(f"{_ALLOWED} (got {parsed.render_as_string()}, which is not an absolute path alone)")
    return parsed.set(drivername=driver)


def _describe(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or url.query.get("host") or "this machine"
    return f"{url.database or url.username} of PostgreSQL at {host}" + (f":{url.port}" if url.port else "")


def _find_secrets(url: URL) -> tuple[str, ...]:
    found = [str(url.password or ""), str(url.query.get("password", ""))]
    return tuple(secret for secret in found if secret)
