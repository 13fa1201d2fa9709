"""Ray's daemons are watched: the start that is theirs ends soon after the first of them, with its name."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, MutableMapping
from pathlib import Path

import pytest

from deployments.launch.ray_session import LostError, find_daemons, kill_leftovers, mute_ray, wait_while_alive
from tests.settling import eventually

pytestmark = pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="processes are found in /proc")

_COMMANDS = {
    "GCS": "/ray/core/src/ray/gcs/gcs_server",
    "raylet": "/ray/core/src/ray/raylet/raylet",
    "agent": "ray::DashboardAgent",
}
_WAIT_S = 60.0


@pytest.fixture
def environment() -> Iterator[MutableMapping[str, str]]:
    with kill_leftovers(os.environ):
        yield os.environ


def _start(command: str) -> subprocess.Popen[bytes]:
    """Start a process that waits, under a name of its own."""
    waiting = "import sys; print(flush=True); sys.stdin.read()"
    renaming = f"import os, sys; os.execv(sys.executable, [{command!r}, '-c', {waiting!r}])"
    process = subprocess.Popen([sys.executable, "-c", renaming], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_daemons_are_found_by_their_names_among_what_was_started_here(environment: MutableMapping[str, str]) -> None:
    stranger = _start("/usr/bin/other")
    started = {kind: _start(command) for kind, command in _COMMANDS.items()}
    assert find_daemons() == {process.pid: kind for kind, process in started.items()}
    for process in (stranger, *started.values()):
        process.kill()
        process.communicate()
    assert find_daemons() == {}


def test_an_agent_whose_title_has_overwritten_its_environment_is_its_raylets_child(
    environment: MutableMapping[str, str],
) -> None:
    naming = f"os.execve({sys.executable!r}, ['ray::DashboardAgent', '-c', 'input()'], {{}})"
    starting = f"import os, sys; os.fork() or {naming}; print(flush=True); sys.stdin.read()"
    renaming = f"import os, sys; os.execv(sys.executable, ['/raylet/raylet', '-c', {starting!r}])"
    with subprocess.Popen([sys.executable, "-c", renaming], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as raylet:
        assert raylet.stdout is not None
        raylet.stdout.readline()
        assert eventually(lambda: sorted(find_daemons().values()) == ["agent", "raylet"], _WAIT_S)
        for pid in find_daemons():
            os.kill(pid, signal.SIGKILL)


def test_the_wait_ends_with_the_first_daemon_that_dies(environment: MutableMapping[str, str]) -> None:
    with _start(_COMMANDS["GCS"]) as gcs, _start(_COMMANDS["raylet"]) as raylet:
        daemons = find_daemons()
        wait_while_alive(daemons, 0.1)
        threading.Timer(0.3, raylet.send_signal, (signal.SIGKILL,)).start()
        begun_s = time.monotonic()
        with pytest.raises(LostError, match=rf"^Ray's raylet, process {raylet.pid}, has died, and the app with it"):
            wait_while_alive(daemons, _WAIT_S)
        assert time.monotonic() - begun_s < _WAIT_S / 2, "it did not wait for its end"
        gcs.kill()


def test_what_ray_prints_natively_is_muted(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", file=sys.stderr)
    with mute_ray():
        os.write(2, b"the end of a raylet's log\n")
        print("an error of a thread of Ray's")
    print("after", file=sys.stderr)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "before\nafter\n")
