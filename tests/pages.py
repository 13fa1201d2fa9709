"""Finds the code blocks of README and ``docs/``, and runs them unchanged."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))

BACKGROUND, DOWNLOAD = "bash background", "bash download"
KINDS = frozenset({"bash", BACKGROUND, DOWNLOAD, "python", "yaml", "text"})
"""What a block may be. ``text`` is a drawing, or a command to fill in; ``yaml`` is a configuration; all else is run."""

_BIN = Path(sys.executable).parent
_READY_S = 280.0
_BLOCK_S = 280.0


@dataclass(frozen=True)
class Block:
    """A fenced block: the words behind its first fence, and its text."""

    kind: str
    code: str


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found = re.findall(r"^```([^\n]*)\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return [Block(kind, code) for kind, code in found]


@contextmanager
def app_served(command: str, folder: Path) -> Iterator[App]:
    """The app that a page's background block starts, on a free port; stopped by Ctrl-C, which has to leave nothing."""
    with socket.socket() as probe:  # port 8000 may be taken
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    said = folder / "serve.txt"
    with said.open("w") as output:
        arguments = [*_here(command, port).split(), "--port", str(port)]
        server = subprocess.Popen(arguments, cwd=folder, env=_make_environment(), stdout=output, stderr=output)
    try:
        _await_ready(port, server)
        yield App(port, said)
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait(timeout=120) == 0, said.read_text()


@dataclass(frozen=True)
class App:
    """A running app: its port, and the file with what its command printed."""

    port: int
    said: Path

    def environment(self) -> dict[str, str]:
        """The environment that ``serve`` prints for Python clients: leads to its own Ray cluster."""
        pairs = dict(re.findall(r"\b(RAY_\w+)=(\S+)", self.said.read_text()))
        assert "RAY_ADDRESS" in pairs
        return pairs


def run_blocks(blocks: Iterable[Block], folder: Path, app: App | None = None) -> None:
    """Run blocks in a folder, one after the other, with this environment's Python.

    Args:
        blocks: bash and python; others are passed over.
        folder: where they run.
        app: the app that they call; its port replaces 8000.
    """
    for block in blocks:
        if block.kind not in ("bash", "python"):
            continue
        code = _here(block.code, 8000 if app is None else app.port)
        command = ["bash", "-euo", "pipefail", "-c", code] if block.kind == "bash" else [sys.executable, "-c", code]
        environment = _make_environment()
        if block.kind == "python" and "connect()" in code and app is not None:
            environment |= app.environment()
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_BLOCK_S, check=False
        )
        assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"


def _make_environment() -> dict[str, str]:
    """Return the environment of a user, without other tests' settings for Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {**kept, "RAY_worker_niceness": "0"}  # Ray's workers would run at lower priority than other tests


def _here(code: str, port: int) -> str:
    """Adapt a block to this environment, which exists already, with its commands beside its Python."""
    return code.replace("make env\n", "").replace(".venv/bin/", f"{_BIN}/").replace(":8000", f":{port}")


def _await_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _READY_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the app ended before it was ready"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"not ready within {_READY_S:.0f} s")
