"""The Ray session of an app: join or start Ray, bound calls that may hang, stop Ray and every process it has started.

Only for the main thread, because it handles signals. Ray reads the environment when it is imported, so the command line
sets it before it imports this module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Collection, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cosmos3_core.errors import Cosmos3Error
from deployments.launch.capacity import Node, Resources

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CONNECT_S = 5.0
# Seconds that Ray's start may take to end after a signal: it waits a minute for daemons that the signal has killed,
# half of it with Python's lock held, which cannot be interrupted.
_START_ABORT_S = 10.0
# Ray gives its daemons half a minute, which they may miss on a busy machine; the second time their files are in memory.
_START_TRIES = 2
_MAX_REASON_CHARS = 600
# KubeRay and Ray's cluster launcher set it on all nodes; `ray start` sets it on none.
_NODE_GROUP_LABEL = "ray.io/node-group"
# Marks the environment of processes that are started here.
_MARK = "COSMOS3_STARTED_BY"
_GRACE_S = 2.0
_DAEMON_POLL_S = 0.5
_POLL_S = 0.05

RAY_FAILURES = (RayError, RayServeException, ConnectionError, TimeoutError, RuntimeError, ValueError, OSError)
"""Exceptions that Ray and Serve raise for failed calls; their documentation does not say which call raises which."""


class StartError(Cosmos3Error):
    """The app did not start; the message says what is missing, or what a stage reported."""


class LostError(Cosmos3Error):
    """The app, or its Ray, is gone."""


@dataclass(frozen=True)
class Placement:
    """Where an app runs.

    Attributes:
        ray_address: of the cluster to join; None starts a Ray on this machine for this app alone.
        num_cpus: logical CPUs of a Ray that is started; None: as many as the machine has.
        start_timeout_s: for all of the bring-up.
    """

    ray_address: str | None = None
    num_cpus: int | None = None
    start_timeout_s: float = 1800.0

    @property
    def is_alone(self) -> bool:
        """Whether Ray is started for this app, and ends with it."""
        return self.ray_address is None


@contextmanager
def ray_session(placement: Placement) -> Iterator[None]:
    """Connect to Ray, or start it (StartError if neither works), for the block. Inside, SIGTERM acts as Ctrl-C."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    sessions: Path | None = None
    try:
        _set_handlers(signal.default_int_handler)
        try:
            _start(placement)
            if placement.is_alone:
                sessions = find_session().parent
            yield
        finally:
            # Interrupting Ray's shutdown would leave processes behind; it takes little more than a second.
            _set_handlers(signal.SIG_IGN)
            # Ray prints failures of processes that it has stopped itself, and the log of a daemon that has died.
            with mute_ray():
                ray.shutdown()
            if sessions is not None:
                remove_ended_sessions(sessions)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def find_session() -> Path:
    """Return the directory of the session of a Ray that was started here: its logs and sockets."""
    return Path(ray.nodes()[0]["RayletSocketName"]).parents[1]


def _set_handlers(handler: Any) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _start(placement: Placement) -> None:
    try:
        with end_on_signals(_SIGNALS, _START_ABORT_S):
            _init(placement)
        _set_handlers(signal.default_int_handler)  # Ray replaces the handler of SIGTERM
    except SystemExit:  # raised by Ray's handler, sometimes only after Ray has given up
        raise KeyboardInterrupt from None


def _init(placement: Placement) -> None:
    address = placement.ray_address
    options: dict[str, Any] = {"address": address}
    if address is None:
        # "local" never joins a cluster, even if RAY_ADDRESS names one.
        options = {"address": "local", "num_cpus": placement.num_cpus, "include_dashboard": False}
        failure = "Ray did not start"
        hint = "Is the machine very busy, or short of memory? Ray's logs are below its directory: session_latest."
    else:
        failure = f"cannot join the Ray cluster at {address}"
        hint = "Where it wants a token, set RAY_AUTH_MODE=token."
        if (endpoint := _parse_endpoint(address)) and not _is_listening(endpoint):
            raise StartError(f"{failure}: nothing listens there")  # Ray itself would retry for minutes
    for tries_left in reversed(range(_START_TRIES)):
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
            break
        except Exception as error:  # noqa: BLE001 - what its daemons' late start raises is the base class itself
            if type(error) is not Exception or not placement.is_alone or not tries_left:
                raise StartError(f"{failure}: {describe_failure(error).rstrip('.')}. {hint}") from None
            if mark := os.environ.get(_MARK):
                _kill(mark)  # the daemons that were late
    # Its router warns on the terminal of replicas that answer late; what matters of that is in the app's status.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)


class FreeResources:
    """The resources that a cluster has for an app that starts: free ones, and those that the cluster gains later."""

    def __init__(self, placement: Placement) -> None:
        self._before = ray.cluster_resources()
        self._free = self._before if placement.is_alone else ray.available_resources()

    def count(self) -> Resources:
        """Return the free resources as of now, with the app's own share counted as free."""
        now = ray.cluster_resources()
        return {kind: self._free.get(kind, 0) + now[kind] - self._before.get(kind, 0) for kind in now}


def list_nodes() -> list[Node]:
    """Return the cluster's live nodes."""
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def can_grow() -> bool:
    """Return whether the cluster may have an autoscaler. Also true if its launcher could run one and does not."""
    return any(_NODE_GROUP_LABEL in node.labels for node in list_nodes())


def is_ray_alive() -> bool:
    """Return whether Ray's head listens and knows this node. Otherwise calls hang, until Ray ends this process."""
    context = ray.get_runtime_context()
    endpoint = _parse_endpoint(context.gcs_address)
    if endpoint is not None and not _is_listening(endpoint):
        return False
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == context.get_node_id())


_DAEMONS = {
    "GCS": re.compile(rb"/gcs_server\0"),
    "raylet": re.compile(rb"/raylet/raylet\0"),
    "agent": re.compile(rb"^ray::DashboardAgent"),
}


def find_daemons() -> dict[int, str]:
    """Find the daemons of a Ray that was started here: pid -> kind. Empty without /proc or :func:`kill_leftovers`."""
    found = {}
    marked = set(_find_marked(os.environ.get(_MARK, "")))
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        pid, command = int(path.parent.name), _read_bytes(path)
        for kind, pattern in _DAEMONS.items():
            # The agent's title overwrites its environment: it is a child of the raylet.
            if pattern.search(command) and not marked.isdisjoint((pid, _read_parent(pid))):
                found[pid] = kind
    return found


def describe_death(daemons: Mapping[int, str]) -> str:
    """Describe which daemon has died; "" if none has."""
    for pid, kind in daemons.items():
        # One that was killed stays a zombie until this process waits for it, without a command line.
        if not _read_bytes(Path(f"/proc/{pid}/cmdline")):
            return f"Ray's {kind}, process {pid}, has died, and the app with it; jobs go on at the next start"
    return ""


def wait_while_alive(daemons: Mapping[int, str], seconds: float) -> None:
    """Wait; raise LostError as soon as a daemon has died: Ray itself is sure of it only after a while."""
    deadline_s = time.monotonic() + seconds
    while time.monotonic() < deadline_s:
        if death := describe_death(daemons):
            raise LostError(death)
        time.sleep(_DAEMON_POLL_S)


@contextmanager
def mute_ray() -> Iterator[None]:
    """Keep Ray from printing in this process: the end of a dead daemon's log, and errors of its own threads."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with contextlib.redirect_stdout(io.StringIO()), open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)


@contextmanager
def time_limit(timeout_s: float) -> Iterator[None]:
    """Raise LostError if the block takes longer: Serve's calls have no deadline, and never return once Ray has died."""
    is_late = False

    def give_up(number: int, frame: object) -> None:
        nonlocal is_late
        is_late = True
        raise KeyboardInterrupt  # the only exception that passes through Ray's calls

    before = signal.signal(signal.SIGALRM, give_up)
    rest_s, _ = signal.setitimer(signal.ITIMER_REAL, timeout_s)
    try:
        yield
    except KeyboardInterrupt:
        if is_late:
            raise LostError(f"Serve has not answered for {timeout_s:g} s") from None
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        signal.setitimer(signal.ITIMER_REAL, rest_s)  # restores an outer alarm; 0 for none


def _parse_endpoint(address: str) -> tuple[str, int] | None:
    """Parse host and port of an address such as "10.0.0.1:6379" or "ray://10.0.0.1:10001"; None for "auto"."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _is_listening(endpoint: tuple[str, int]) -> bool:
    try:
        socket.create_connection(endpoint, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def describe_failure(error: object) -> str:
    """Describe a failure in one line: the exception of the last traceback in its text, if it has any."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    raised = list(re.finditer(r"^(?:\w+\.)*([A-Z]\w+: )", text, re.MULTILINE))
    if raised:
        text = text[raised[-1].start(1) :]
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON_CHARS else f"{line[:_MAX_REASON_CHARS]}..."


# Processes. Ray ends its own, but late or not at all when it is stopped while it starts, or after one of its daemons
# has died. They are found by a mark that they inherit with the environment; without /proc only Ray's clean-up works.


@contextmanager
def kill_leftovers(environment: MutableMapping[str, str]) -> Iterator[None]:
    """Kill the processes that are started in the block, with ``environment``, and still run shortly after it."""
    environment[_MARK] = mark = uuid.uuid4().hex
    try:
        yield
    finally:
        del environment[_MARK]
        _await_end(mark)
        _kill(mark)


@contextmanager
def end_on_signals(signals: Collection[int], patience_s: float) -> Iterator[None]:
    """End this process, and those of :func:`kill_leftovers`, if a signal comes and the block does not end in time.

    For native code that waits for a process which the same signal has killed (all processes of a group get it): Python
    runs its signal handlers only after that code. While the code holds Python's lock, this waits as well. The exit
    status is 130. ``signals`` need a Python handler; ``patience_s`` begins with the signal.
    """
    reader, writer = socket.socketpair()
    is_left = threading.Event()

    def watch() -> None:
        while number := reader.recv(1):  # until the writer is closed
            if number[0] in signals and not is_left.wait(patience_s):
                if mark := os.environ.get(_MARK):
                    _kill(mark)
                print("interrupted", file=sys.stderr, flush=True)
                os._exit(130)

    writer.setblocking(False)
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=watch, name="end_on_signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_left.set()
        signal.set_wakeup_fd(before)
        writer.close()
        thread.join()
        reader.close()


def remove_ended_sessions(root: Path, num_kept: int = 1) -> None:
    """Remove Ray's directories of this user's sessions that have ended, but for the newest: its logs may be wanted.

    A session has ended when no process names it in its command line; without /proc all stay.
    """
    commands = b"\n".join(filter(None, map(_read_bytes, Path("/proc").glob("[0-9]*/cmdline"))))
    if not commands:
        return
    sessions = [path for path in root.glob("session_*_*") if path.is_dir() and not path.is_symlink()]
    ended = [path for path in sessions if path.name.encode() not in commands and path.stat().st_uid == os.getuid()]
    for path in sorted(ended)[: max(len(ended) - num_kept, 0)]:  # their names begin with the time
        shutil.rmtree(path, ignore_errors=True)


def _kill(mark: str) -> None:
    for pid in _find_marked(mark):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    _await_end(mark)


def _await_end(mark: str) -> None:
    deadline_s = time.monotonic() + _GRACE_S
    while _find_marked(mark) and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)


def _find_marked(mark: str) -> list[int]:
    """Find the processes with the mark. Never this one: /proc shows the environment that a process started with."""
    entry = f"{_MARK}={mark}".encode()
    pids = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        if entry in _read_bytes(path).split(b"\0"):
            pids.append(int(path.parent.name))
    return pids


def _read_parent(pid: int) -> int:
    """Return the id of a process's parent; 0 if the process has ended."""
    match = re.search(rb"^PPid:\t(\d+)", _read_bytes(Path(f"/proc/{pid}/status")), re.MULTILINE)
    return int(match[1]) if match else 0


def _read_bytes(path: Path) -> bytes:
    """Read a file of /proc; b"" if the process has ended, or is another user's."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
