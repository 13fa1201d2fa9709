"""Database: the connections to the database of jobs, a SQLite file of one machine or PostgreSQL for several.

Any number of processes may have it open. A transaction that writes waits for its turn, at most :data:`BUSY_S`; one that
decides what is accepted or run next also takes the one lock that all such decisions share.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from sqlite3 import Error as SQLiteError
from typing import TYPE_CHECKING

import sqlalchemy
from sqlalchemy import URL, Connection, Engine
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as NoConnectionLeft

from deployments.errors import JobsError
from deployments.jobs import sqlite_file
from deployments.jobs.schema import NEWEST, VERSION_TABLE
from deployments.media.store import own_directory

if TYPE_CHECKING:
    from deployments.config import AppConfig

BUSY_S = 10.0
"""Longest wait of a transaction for those before it."""

_UPGRADE_S = 120.0
_CONNECT_S = 10
_STATEMENT_S = 60.0
# Less than any lease.
_MAX_SKEW_S = 2.0
_NUM_CONNECTIONS, _MAX_MORE_CONNECTIONS = 8, 24
# Advisory locks in a PostgreSQL database; the numbers are ours alone.
_QUEUE_LOCK, _UPGRADE_LOCK = 0x636F736D6F7303, 0x636F736D6F7304
_DRIVERS = {"sqlite": "sqlite+pysqlite", "postgresql": "postgresql+psycopg"}
_ALLOWED = "it must be sqlite:////absolute/path/of/a/file or postgresql+psycopg://USER:PASSWORD@HOST/DATABASE"
# Part of a failure's text -> what to do.
_ADVICE = {
    "locked": f"others kept it busy for {BUSY_S:g} s; try again",
    "lock timeout": f"others kept it busy for {BUSY_S:g} s; try again",
    "not a database": "the file is another one's or damaged; set jobs.database to another one",
    "malformed": "the file is damaged; restore it, or set jobs.database to another one",
    "readonly": "this user must be able to write to the file and its directory",
    "unable to open": "this user must be able to write to the file and its directory",
    "Permission denied": "this user must be able to write to the file and its directory",
    "No such file or directory": "make its directory first",
    "already exists": "it holds tables of another program; set jobs.database to a database of its own",
    "password authentication failed": "see the user and password in jobs.database",
    "FATAL: database": "create it first, or see jobs.database",
}


def database_url(config: AppConfig) -> str:
    """Return SQLAlchemy's URL of an app's jobs: the key ``jobs.database``, or a SQLite file beside the app's media.

    Such a file is for the processes of one machine, on a local disk: SQLite's locks do not reach over a network.

    Raises:
        MediaStoreError: the directory is to be this user's own, and cannot be made.
        JobsError: the directory cannot be made.
    """
    if config.jobs.database is not None:
        return config.jobs.database
    directory = own_directory() if config.media.directory is None else config.media.directory.absolute()
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JobsError(f"{directory} cannot be made: {error}; set media.directory or jobs.database") from error
    return URL.create("sqlite", database=str(directory / f"jobs-{config.name}.sqlite3")).render_as_string()


def _is_newest(connection: Connection) -> bool:
    """Return whether the schema is this release's; the migrations handle any other."""
    if not sqlalchemy.inspect(connection).has_table(VERSION_TABLE):
        return False
    versions = connection.exec_driver_sql(f"SELECT version_num FROM {VERSION_TABLE}").scalars().all()
    return list(versions) == [NEWEST]


class Database:
    """Connections to a database of jobs. For any number of threads; not to be used in a forked process.

    Args:
        url: SQLAlchemy's, of SQLite (the absolute path of a file) or PostgreSQL (psycopg).

    Attributes:
        name: of the database in messages, without user and password.
        is_sqlite: else it is PostgreSQL.

    Raises:
        JobsError: it is another kind of URL, cannot be reached or used, or has a schema of a newer release.
    """

    def __init__(self, url: str) -> None:
        parsed = _parse_url(url)
        self.is_sqlite = parsed.get_backend_name() == "sqlite"
        self.name = _name(parsed)
        self._secrets = _secrets(parsed)
        # SQLite waits by sleeping; threads of one process queue up here instead.
        self._turn = threading.Lock()
        self._engine = self._sqlite(parsed) if self.is_sqlite else _postgresql(parsed)
        try:
            self._check_clock()
            self._upgrade()
        except BaseException:
            self.close()
            raise

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """Begin a transaction that only reads; it waits for nobody.

        Raises:
            JobsError: the database failed.
        """
        with self._translated_errors(), self._engine.connect() as connection, connection.begin():
            yield connection

    @contextmanager
    def writing(self, *, is_queue: bool = False) -> Iterator[Connection]:
        """Begin a transaction that writes: durable when the block is left, without effect when it raises.

        Args:
            is_queue: whether it decides what is accepted or run next: one such after the other, of all processes.

        Raises:
            JobsError: the database failed, or others kept it busy for :data:`BUSY_S`.
        """
        with self._translated_errors(), self._write_transaction() as connection:
            if is_queue and not self.is_sqlite:
                _take_lock(connection, _QUEUE_LOCK)
            yield connection

    def close(self) -> None:
        """Close all connections that are not in use."""
        self._engine.dispose()

    @contextmanager
    def _write_transaction(self) -> Iterator[Connection]:
        if not self.is_sqlite:
            with self._engine.connect() as connection, connection.begin():
                yield connection
            return
        if not self._turn.acquire(timeout=BUSY_S):
            raise JobsError(f"{self.name}: other threads of this process kept it busy for {BUSY_S:g} s; try again")
        try:
            with self._engine.connect() as connection:
                connection.execution_options(is_writing=True)
                with connection.begin():
                    yield connection
        finally:
            self._turn.release()

    def _check_clock(self) -> None:
        """Leases and times of expiry are compared with each machine's own clock."""
        if self.is_sqlite:  # of this machine
            return
        with self.reading() as connection:
            asked_s = time.time()
            server_s = float(connection.exec_driver_sql("SELECT extract(epoch FROM clock_timestamp())").scalar_one())
            ahead_s = _ahead_s(asked_s, server_s, time.time())
        if abs(ahead_s) > _MAX_SKEW_S:
            raise JobsError(
                f"this machine's clock is {ahead_s:+.1f} s from that of {self.name}; allowed are {_MAX_SKEW_S:g} s, or "
                "jobs that run would be taken for abandoned: have both set by NTP"
            )

    def _upgrade(self) -> None:
        with self.reading() as connection:
            if _is_newest(connection):
                return
        # Alembic takes as long to be imported as all the rest, and is seldom needed.
        from deployments.jobs.migrations.upgrade import is_current, upgrade

        with self._translated_errors(), self._write_transaction() as connection:
            if not self.is_sqlite:
                connection.exec_driver_sql(f"SET LOCAL lock_timeout = {_UPGRADE_S * 1000:.0f}")
                connection.exec_driver_sql(f"SET LOCAL statement_timeout = {_UPGRADE_S * 1000:.0f}")
                _take_lock(connection, _UPGRADE_LOCK)
            # Another process may have done it, or more, while this one waited.
            if not is_current(connection, self.name):
                upgrade(connection)

    def _sqlite(self, url: URL) -> Engine:
        assert url.database is not None, "it was checked"
        try:
            with self._translated_errors():
                sqlite_file.prepare(Path(url.database), BUSY_S)
        except OSError as error:
            raise self._failure(error) from error
        engine = sqlalchemy.create_engine(
            url,
            hide_parameters=True,
            json_serializer=_as_json,
            pool_size=_NUM_CONNECTIONS,
            max_overflow=_MAX_MORE_CONNECTIONS,
            pool_timeout=BUSY_S,
            connect_args={"timeout": BUSY_S},
        )
        sqlite_file.listen(engine)
        return engine

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except NoConnectionLeft as error:
            raise JobsError(f"{self.name}: all its connections were in use for {BUSY_S:g} s; try again") from error
        except (SQLAlchemyError, SQLiteError) as error:
            # Not "from error": its own text would be printed too.
            raise self._failure(getattr(error, "orig", None) or error) from None

    def _failure(self, error: BaseException) -> JobsError:
        text = " ".join(str(error).split())
        for secret in self._secrets:
            text = text.replace(secret, "***")
        advice = next((f"; {words}" for part, words in _ADVICE.items() if part in text), "")
        return JobsError(f"the database of jobs {self.name} failed: {text}{advice}")


def _ahead_s(asked_s: float, server_s: float, answered_s: float) -> float:
    """Return by how much this clock is at least ahead of the server's, which answered meanwhile; below 0 if behind."""
    return max(asked_s - server_s, 0.0) + min(answered_s - server_s, 0.0)


def _postgresql(url: URL) -> Engine:
    limits_ms = {
        "lock_timeout": BUSY_S,
        "statement_timeout": _STATEMENT_S,
        "idle_in_transaction_session_timeout": _STATEMENT_S,
    }
    options = [str(url.query.get("options", "")), *(f"-c {name}={s * 1000:.0f}" for name, s in limits_ms.items())]
    return sqlalchemy.create_engine(
        url,
        hide_parameters=True,
        json_serializer=_as_json,
        isolation_level="READ COMMITTED",
        pool_size=_NUM_CONNECTIONS,
        max_overflow=_MAX_MORE_CONNECTIONS,
        pool_timeout=BUSY_S,
        pool_pre_ping=True,  # a server that was restarted has closed them
        connect_args={
            "connect_timeout": _CONNECT_S,
            "options": " ".join(options).strip(),
            # A server that vanishes is noticed.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        },
    )


_as_json = partial(json.dumps, allow_nan=False)


def _take_lock(connection: Connection, number: int) -> None:
    """Take an advisory lock until the transaction ends."""
    connection.execute(sqlalchemy.select(sqlalchemy.func.pg_advisory_xact_lock(number)))


def _parse_url(url: str) -> URL:
    try:
        parsed = sqlalchemy.make_url(url)
    except ArgumentError:
        raise JobsError(f"jobs.database is no URL of a database; {_ALLOWED}") from None
    backend = parsed.get_backend_name()
    driver = _DRIVERS.get(backend)
    if driver is None or parsed.drivername not in (backend, driver):
        raise JobsError(f"jobs.database is a URL of {parsed.drivername}; {_ALLOWED}")
    if backend == "sqlite" and (parsed.query or not Path(parsed.database or "").is_absolute()):
        # Processes start in different directories, and what is in memory is lost.
        raise JobsError(f"jobs.database={parsed.render_as_string()} names no absolute path alone; {_ALLOWED}")
    return parsed.set(drivername=driver)


def _name(url: URL) -> str:
    if url.get_backend_name() == "sqlite":
        return str(url.database)
    host = url.host or url.query.get("host") or "this machine"
    return f"{url.database or url.username} of PostgreSQL at {host}" + (f":{url.port}" if url.port else "")


def _secrets(url: URL) -> tuple[str, ...]:
    found = [str(url.password or ""), str(url.query.get("password", ""))]
    return tuple(secret for secret in found if secret)
