"""A PostgreSQL server for the tests, on a free port, with a password; removed afterwards.

``postgres_url`` is a server whose database the session shares (empty at first),
``fresh_postgres_url`` a database of one test's own.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

USER, PASSWORD = "cosmos3", "sesame-of-the-tests"
_START_S, _INSTALL_S = 60, 600


def _programs() -> Path | None:
    """Find the directory with initdb and pg_ctl of the newest installed version."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: float(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return Path(on_path).resolve().parent if on_path else None


def _install() -> str:
    """Install PostgreSQL; return the failure, or ""."""
    if os.geteuid() != 0 or shutil.which("apt-get") is None:
        return "it is not installed, and this user cannot install it"
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for command in (["apt-get", "update"], ["apt-get", "install", "-y", "--no-install-recommends", "postgresql"]):
        try:
            subprocess.run(command, env=environment, check=True, capture_output=True, timeout=_INSTALL_S)
        except (OSError, subprocess.SubprocessError) as error:
            return f"{' '.join(command)} failed: {error}"
    return ""


def _as_server(command: list[str]) -> list[str]:
    """Have a command run as the user postgres: the server refuses root."""
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


def _run(command: list[str]) -> None:
    done = subprocess.run(
        _as_server(command), cwd="/", stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=2 * _START_S
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed: {done.stdout}{done.stderr}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """SQLAlchemy's URL of an empty database in a server started for it."""
    if _programs() is None and (reason := _install()):
        pytest.skip(f"needs PostgreSQL: {reason}")
    programs = _programs()
    assert programs is not None, "it was installed"
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cosmos3-postgres-")))
        (root / "password").write_text(PASSWORD)
        if os.geteuid() == 0:
            server = pwd.getpwnam("postgres")
            for path in (root, root / "password"):
                os.chown(path, server.pw_uid, server.pw_gid)
        data, port = root / "data", _free_port()
        how = ["-U", USER, "-A", "scram-sha-256", "--pwfile", str(root / "password"), "-E", "UTF8", "--no-locale"]
        _run([str(programs / "initdb"), "-D", str(data), *how])
        # Faster; durability across a machine crash is not tested here.
        options = f"-c fsync=off -p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories={root}"
        control = [str(programs / "pg_ctl"), "-D", str(data), "-w", "-t", str(_START_S)]
        # Output goes to a file: with a pipe, the call would wait for the server to close it.
        _run([*control, "-l", str(root / "log"), "-o", options, "start"])
        stack.callback(_run, [*control, "-m", "immediate", "stop"])
        yield f"postgresql+psycopg://{USER}:{PASSWORD}@127.0.0.1:{port}/postgres"


@pytest.fixture
def fresh_postgres_url(postgres_url: str) -> Iterator[str]:
    """The URL of a new database in that server."""
    with fresh_database(postgres_url) as url:
        yield url


@contextlib.contextmanager
def fresh_database(postgres_url: str) -> Iterator[str]:
    """Create a database in a server for the duration of the block; give its URL."""
    name = f"jobs_{secrets.token_hex(6)}"
    with psycopg.connect(postgres_url.replace("+psycopg", ""), autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield postgres_url.removesuffix("postgres") + name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


def load_dump(url: str, path: Path) -> None:
    """Load a ``pg_dump`` file into an empty database."""
    programs = _programs()
    assert programs is not None, "the database is in a server of theirs"
    command = [str(programs / "psql"), "-q", "-v", "ON_ERROR_STOP=1", "-f", str(path), url.replace("+psycopg", "")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_START_S, check=False)
    assert done.returncode == 0, done.stderr
