"""Databases: accepted URLs, how a file is opened, guarantees of transactions, messages of failures."""

from __future__ import annotations

import contextlib
import re
import sqlite3
import threading
import time
from pathlib import Path

import pytest
from sqlalchemy import text

from deployments.config import AppConfig
from deployments.errors import JobsError, MediaStoreError
from deployments.jobs import database
from deployments.jobs.database import Database, database_url
from tests.virtual_time import set_clocks

SECRET = "hush-hush"
DEADLINE_S = 30.0


def sqlite_url(directory: Path) -> str:
    return f"sqlite:///{directory}/jobs.sqlite3"


# URLs


def config(**values: object) -> AppConfig:
    return AppConfig.parse({"checkpoint": "/nowhere", **values})


def resolve_url(**values: object) -> str:
    return database_url(config(**values))


def test_the_default_database_is_beside_the_media(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    media = {"directory": str(tmp_path / "new" / "media")}
    assert resolve_url(media=media, name="my.app") == f"sqlite:///{tmp_path}/new/media/jobs-my.app.sqlite3"
    assert (tmp_path / "new" / "media").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert resolve_url() == f"sqlite:///{tmp_path}/.local/state/cosmos3/jobs-cosmos3.sqlite3"
    url = f"postgresql+psycopg://u:{SECRET}@h/d"
    assert resolve_url(jobs={"database": url}, media=media) == url
    assert SECRET not in repr(config(jobs={"database": url}))


def test_a_directory_with_special_characters_is_quoted(tmp_path: Path) -> None:
    directory = tmp_path / "a b%2F?#é"
    Database(resolve_url(media={"directory": str(directory)})).close()
    assert (directory / "jobs-cosmos3.sqlite3").is_file()


def test_an_unusable_state_directory_names_the_key_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JobsError, match="cannot be made.*set media.directory or jobs.database"):
        resolve_url(media={"directory": str(tmp_path / "file" / "media")})
    monkeypatch.setenv("HOME", str(tmp_path / "file"))
    with pytest.raises(MediaStoreError, match="set media.directory"):
        resolve_url()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "got no URL"),
        (f"{SECRET} is no url", "got no URL"),
        (f"mysql://user:{SECRET}@host/jobs", "got a URL of mysql"),
        (f"postgresql+asyncpg://user:{SECRET}@host/jobs", "got a URL of postgresql.asyncpg"),
        ("sqlite+aiosqlite:////a/b", "got a URL of sqlite.aiosqlite"),
        ("sqlite://", "which is not an absolute path alone"),
        ("sqlite:///:memory:", "which is not an absolute path alone"),
        ("sqlite:///jobs.sqlite3", "which is not an absolute path alone"),
        ("sqlite:///file:/a/b?mode=memory&uri=true", "which is not an absolute path alone"),
    ],
)
def test_other_urls_are_refused(url: str, message: str) -> None:
    with pytest.raises(JobsError, match=message) as caught:
        Database(url)
    assert "jobs.database must be sqlite:////absolute/path/of/a/file or postgresql+psycopg://" in str(caught.value)
    assert SECRET not in str(caught.value)


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    with pytest.raises(JobsError, match="No such file or directory.*make its directory first"):
        Database(sqlite_url(tmp_path / "nowhere"))
    (tmp_path / "jobs.sqlite3").write_text("this is a letter, which is long enough to look at " * 40)
    with pytest.raises(JobsError, match="file is not a database; the file is another program's or damaged"):
        Database(sqlite_url(tmp_path))
    (tmp_path / "jobs.sqlite3").unlink()
    (tmp_path / "jobs.sqlite3").mkdir()
    with pytest.raises(JobsError, match="unable to open"):
        Database(sqlite_url(tmp_path))


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://user:{SECRET}@127.0.0.1:1/jobs",
        f"postgresql+psycopg://user@127.0.0.1:1/jobs?password={SECRET}",
        f"postgresql+psycopg://user:{SECRET}@/jobs?host=127.0.0.1&port=1",
    ],
)
def test_an_unreachable_server_is_reported_without_the_password(url: str) -> None:
    with pytest.raises(JobsError, match="jobs of PostgreSQL at 127.0.0.1.* failed: .*refused") as caught:
        Database(url)
    assert SECRET not in str(caught.value)
    assert "user" not in str(caught.value)
    assert caught.value.__cause__ is None


@pytest.mark.slow
def test_a_wrong_password_is_reported_without_it(postgres_url: str) -> None:
    wrong = re.sub(":[^:/]*@", f":{SECRET}@", postgres_url)
    with pytest.raises(JobsError, match="check the user and password in jobs.database") as caught:
        Database(wrong)
    assert SECRET not in str(caught.value)
    with pytest.raises(JobsError, match='database "nowhere" does not exist; create it first'):
        Database(postgres_url.removesuffix("postgres") + "nowhere")


def test_no_failure_shows_the_password(tmp_path: Path) -> None:
    opened = Database(sqlite_url(tmp_path))
    opened._secrets = (SECRET,)
    with pytest.raises(JobsError) as caught, opened.reading():
        raise sqlite3.OperationalError(f"nothing at u:{SECRET}@h\nnor there")
    assert str(caught.value).endswith("jobs.sqlite3 failed: nothing at u:***@h nor there")
    opened.close()


# SQLite files


def test_a_file_is_private_and_durable(tmp_path: Path) -> None:
    opened = Database(sqlite_url(tmp_path))
    with opened.writing() as connection:
        pragmas = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
            for name in ("journal_mode", "synchronous", "foreign_keys", "busy_timeout")
        }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10_000}
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["jobs.sqlite3", "jobs.sqlite3-shm", "jobs.sqlite3-wal"]
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    opened.close()


def test_a_file_system_without_shared_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "_switch_on_log", lambda *_: "delete")
    with pytest.raises(JobsError, match="cannot have SQLite's write-ahead log.*'delete'.*local disk, or to PostgreSQL"):
        Database(sqlite_url(tmp_path))


def test_enabling_the_write_ahead_log_waits_for_the_lock(tmp_path: Path) -> None:
    """SQLite itself fails at once if another process holds the file."""
    path = tmp_path / "jobs.sqlite3"
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    other.execute("CREATE TABLE a (b)")
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        database.prepare_file(path, 0.05)
    release = threading.Timer(0.3, other.commit)
    release.start()
    database.prepare_file(path, DEADLINE_S)
    release.join()
    other.close()
    with contextlib.closing(sqlite3.connect(path)) as anew:
        assert anew.execute("PRAGMA journal_mode").fetchone() == ("wal",)


# Transactions


@pytest.fixture
def opened(jobs_url: str) -> Database:
    return Database(jobs_url)


ADD = text("INSERT INTO runners VALUES (:runner, 'm', 0)")


def runners(opened: Database) -> set[str]:
    with opened.reading() as connection:
        return set(connection.execute(text("SELECT runner FROM runners")).scalars())


def test_a_transaction_is_atomic(opened: Database) -> None:
    with opened.writing() as connection:
        connection.execute(ADD, {"runner": "a"})
    with pytest.raises(KeyError), opened.writing() as connection:
        connection.execute(ADD, {"runner": "b"})
        raise KeyError
    with pytest.raises(JobsError, match="(?i)unique"), opened.writing() as connection:
        connection.execute(ADD, {"runner": "c"})
        connection.execute(ADD, {"runner": "a"})
    assert runners(opened) == {"a"}
    opened.close()


def test_writers_wait_for_each_other_and_readers_do_not(opened: Database, jobs_url: str) -> None:
    other, has_begun, order = Database(jobs_url), threading.Event(), []

    def second() -> None:
        has_begun.set()
        with other.writing(is_queue=True) as connection:
            order.append("second")
            assert set(connection.execute(text("SELECT runner FROM runners")).scalars()) == {"a"}

    with opened.writing(is_queue=True) as connection:
        thread = threading.Thread(target=second)
        thread.start()
        assert has_begun.wait(DEADLINE_S)
        time.sleep(0.2)
        connection.execute(ADD, {"runner": "a"})
        assert runners(other) == set(), "a reader sees what is done"
        order.append("first")
    thread.join(DEADLINE_S)
    assert order == ["first", "second"]
    opened.close()
    other.close()


def test_threads_of_one_process_wait_for_each_other(opened: Database) -> None:
    def add(i: int) -> None:
        with opened.writing(is_queue=True) as connection:
            connection.execute(ADD, {"runner": str(i)})

    threads = [threading.Thread(target=add, args=(i,)) for i in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert len(runners(opened)) == 16
    opened.close()


@pytest.mark.parametrize("who", ["another process", "another thread"])
def test_waiting_for_the_lock_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.2)
    opened = Database(sqlite_url(tmp_path))
    holder = opened if who == "another thread" else Database(sqlite_url(tmp_path))
    with holder.writing(), pytest.raises(JobsError, match="kept it busy for.*try again"), opened.writing():
        pytest.fail("both write")
    with opened.writing():
        pass
    opened.close()
    holder.close()


@pytest.mark.parametrize("is_queue", [True, False], ids=["queue lock", "row lock"])
def test_a_write_that_waits_for_others_is_known(jobs_url: str, is_queue: bool) -> None:
    """Before it fails: a locked database is named to clients after seconds."""
    opened, other = Database(jobs_url), Database(jobs_url)
    with other.writing() as connection:
        connection.exec_driver_sql("INSERT INTO runners (runner, model, alive_s) VALUES ('r', 'm', 0)")

    def write(database: Database = opened) -> None:
        with database.writing(is_queue=is_queue) as connection:
            connection.exec_driver_sql("UPDATE runners SET alive_s = 1")

    assert opened.longest_write_s == 0
    waits = [threading.Thread(target=write) for _ in range(2)]
    with other.writing(is_queue=is_queue) as connection:
        connection.exec_driver_sql("UPDATE runners SET alive_s = 2")
        for wait in waits:
            wait.start()
        until_s = time.monotonic() + DEADLINE_S
        while opened.longest_write_s < 0.2 and time.monotonic() < until_s:
            time.sleep(0.01)
        assert 0.2 <= opened.longest_write_s < DEADLINE_S
    for wait in waits:
        wait.join(DEADLINE_S)
    assert opened.longest_write_s == 0
    opened.close()
    other.close()


@pytest.mark.slow
def test_waiting_for_postgres_times_out(fresh_postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_S", 0.5)
    opened = Database(fresh_postgres_url)
    with opened.writing(is_queue=True):
        with pytest.raises(JobsError, match="lock timeout; others kept it busy"), opened.writing(is_queue=True):
            pytest.fail("both decide")
        with opened.writing():  # a reader does not wait
            pass
    opened.close()


@pytest.mark.slow
def test_a_connection_closed_by_the_server_is_reopened(fresh_postgres_url: str) -> None:
    opened, other = Database(fresh_postgres_url), Database(fresh_postgres_url)
    assert runners(opened) == set()
    with other.writing() as connection:
        others = "pid <> pg_backend_pid() AND datname = current_database()"
        connection.execute(text(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}"))
    assert runners(opened) == set()
    opened.close()
    other.close()


@pytest.mark.parametrize(
    ("server_s", "ahead_s"), [(97.0, 3.0), (100.0, 0.0), (104.0, 0.0), (110.0, 0.0), (113.0, -3.0)]
)
def test_a_slow_answer_is_not_taken_for_a_wrong_clock(server_s: float, ahead_s: float) -> None:
    assert database._compute_lead_s(100.0, server_s, 110.0) == ahead_s


@pytest.mark.slow
@pytest.mark.parametrize("ahead_s", [-30.0, 30.0])
def test_a_wrong_clock_is_refused(ahead_s: float, fresh_postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases would expire at once, or never."""
    Database(fresh_postgres_url).close()
    now = time.time
    set_clocks(monkeypatch, time_s=lambda: now() + ahead_s)
    with pytest.raises(
        JobsError, match=r"clock must be within 2 s of that of jobs_.*\(got [+-](29|30)[.0-9]* s\).*NTP"
    ):
        Database(fresh_postgres_url)
