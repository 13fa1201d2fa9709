"""`cosmos3 serve` in processes of its own, with its own Ray instead of the one that this folder's tests share."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
DEADLINE_S = 300.0


@dataclass(frozen=True)
class Serving:
    """A `cosmos3 serve` in its own session, the file with its output, and the mark of all its processes."""

    process: subprocess.Popen[str]
    output: Path
    mark: str

    def said(self) -> str:
        return self.output.read_text()

    def url(self) -> str:
        """Wait until the app is ready; return its URL."""
        deadline_s = time.monotonic() + DEADLINE_S
        while time.monotonic() < deadline_s and self.process.poll() is None:
            if match := re.search(r"ready after [\d.]+ s: (http://\S+)", self.said()):
                return match[1]
            time.sleep(0.05)
        pytest.fail(f"not ready: {self.said()}")

    def client_environment(self) -> dict[str, str]:
        """The environment that leads to the app's Ray, as `cosmos3 serve` prints it."""
        printed = re.search(r"from Python: ((?:RAY_\w+=\S+ )+)python", self.said())
        assert printed is not None
        return environment() | dict(pair.split("=", 1) for pair in printed[1].split())

    def leftovers(self) -> dict[int, str]:
        """Return every running descendant process: pid -> command."""
        found = {}
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if f"COSMOS3_TEST={self.mark}".encode() in (path / "environ").read_bytes().split(b"\0"):
                    found[int(path.name)] = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found


def environment(mark: str = "") -> dict[str, str]:
    """Return the environment without the other tests' settings for Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept["RAY_worker_niceness"] = "0"  # as in conftest.py
    return {**kept, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "COSMOS3_TEST": mark}


def cosmos3(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=DEADLINE_S)


@contextmanager
def serving(tmp_path: Path, *arguments: str, variables: dict[str, str] | None = None) -> Iterator[Serving]:
    """Run `cosmos3 serve` for the duration of the block.

    Args:
        tmp_path: where it runs.
        arguments: arguments of `cosmos3 serve`.
        variables: additional environment variables.
    """
    mark, output = uuid.uuid4().hex, tmp_path / "serve.txt"
    command = [sys.executable, "-m", "deployments", "serve", "--port", "0", *arguments]
    with output.open("w") as stream:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment(mark) | (variables or {}),
            stdout=stream,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    with process:
        try:
            yield Serving(process, output, mark)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
                process.wait(DEADLINE_S)
