"""The Ray session of an app: join or start Ray, stop it, check that it lives, bound calls that may hang.

Only for the main thread, because it handles signals. Ray reads the environment when it is imported, so the command line
sets it before it imports this module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cosmos3_core.errors import Cosmos3Error
from deployments.launch.capacity import Node, Resources
from deployments.launch.processes import end_on_signals

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_CONNECT_S = 5.0
# For Ray's start to end after a signal: it waits a minute for daemons that the signal has killed, half of it with
# Python's lock held, which cannot be interrupted.
_START_ABORT_S = 10.0
_MAX_REASON_CHARS = 600
# KubeRay and Ray's cluster launcher set it on all nodes; `ray start` sets it on none.
_NODE_GROUP_LABEL = "ray.io/node-group"

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
    """Connect to Ray, or start it, for the block. Inside, SIGTERM acts as Ctrl-C.

    Raises:
        StartError: Ray cannot be joined or started.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        _on_signals(signal.default_int_handler)
        try:
            _start(placement)
            yield
        finally:
            # Interrupting Ray's shutdown would leave processes behind; it takes little more than a second.
            _on_signals(signal.SIG_IGN)
            with contextlib.redirect_stdout(
                io.StringIO()
            ):  # Ray prints failures of processes that it has stopped itself
                ray.shutdown()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _on_signals(handler: Any) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)


def _start(placement: Placement) -> None:
    try:
        with end_on_signals(_SIGNALS, _START_ABORT_S):
            _init(placement)
        _on_signals(signal.default_int_handler)  # Ray replaces the handler of SIGTERM
    except SystemExit:  # raised by Ray's handler, sometimes only after Ray has given up
        raise KeyboardInterrupt from None


def _init(placement: Placement) -> None:
    options: dict[str, Any] = {"address": placement.ray_address}
    if placement.ray_address is None:
        # "local" never joins a cluster, even if RAY_ADDRESS names one.
        options = {"address": "local", "num_cpus": placement.num_cpus, "include_dashboard": False}
    elif (endpoint := _endpoint(placement.ray_address)) and not _is_listening(endpoint):
        # Ray itself would retry for minutes.
        raise StartError(f"cannot join the Ray cluster at {placement.ray_address}: nothing listens there")
    try:
        ray.init(**options, log_to_driver=False, logging_level="ERROR")
    except Exception as error:  # noqa: BLE001 - Ray raises a bare Exception when its daemons start too late
        if placement.is_alone:
            hint = "Is the machine very busy, or short of memory? Ray's logs are below its directory: session_latest."
            raise StartError(f"Ray did not start: {describe_failure(error).rstrip('.')}. {hint}") from None
        hint = "Where it wants a token, set RAY_AUTH_MODE=token."
        raise StartError(
            f"cannot join the Ray cluster at {placement.ray_address}: {describe_failure(error)}. {hint}"
        ) from None
    logging.getLogger("ray.serve").setLevel(logging.WARNING)


class Room:
    """The resources that a cluster has for an app that starts: free now, plus what the cluster gains later.

    Args:
        placement: of the app.
    """

    def __init__(self, placement: Placement) -> None:
        self._before = ray.cluster_resources()
        self._free = self._before if placement.is_alone else ray.available_resources()

    def free(self) -> Resources:
        """Return the free resources as of now, with the app's own share counted as free."""
        now = ray.cluster_resources()
        return {kind: self._free.get(kind, 0) + now[kind] - self._before.get(kind, 0) for kind in now}


def list_nodes() -> list[Node]:
    """Return the cluster's live nodes."""
    return [Node(node["Resources"], node["Labels"]) for node in ray.nodes() if node["Alive"]]


def can_grow() -> bool:
    """Whether the cluster may have an autoscaler. Also true if its launcher could run one and does not."""
    return any(_NODE_GROUP_LABEL in node.labels for node in list_nodes())


def is_ray_alive() -> bool:
    """Whether Ray's head listens and knows this node. Otherwise calls hang, until Ray ends this process."""
    context = ray.get_runtime_context()
    endpoint = _endpoint(context.gcs_address)
    if endpoint is not None and not _is_listening(endpoint):
        return False
    return any(node["Alive"] for node in ray.nodes() if node["NodeID"] == context.get_node_id())


@contextmanager
def time_limit(timeout_s: float) -> Iterator[None]:
    """Bound the block's duration. Serve's calls have no deadline and never return once Ray has died.

    Raises:
        LostError: the block was not done in time.
    """
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


def _endpoint(address: str) -> tuple[str, int] | None:
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
    """Describe a failure in one line. Of a text with tracebacks it takes the last one's exception."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    raised = list(re.finditer(r"^(?:\w+\.)*([A-Z]\w+: )", text, re.MULTILINE))
    if raised:
        text = text[raised[-1].start(1) :]
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON_CHARS else f"{line[:_MAX_REASON_CHARS]}..."
