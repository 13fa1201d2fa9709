"""From a configuration to an app that answers, and back to nothing: Ray, Serve, the graph, the HTTP side.

    with running(config, Placement()) as app:
        ...  # app.url serves

Whatever was started is stopped when the block is left, however it is left; what was found running stays. Every wait has
a deadline.
"""

from __future__ import annotations

import contextlib
import io
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.api.auth import auth_required, check_keys
from deployments.api.serve_http import http_in_force
from deployments.app import build_app
from deployments.clients.errors import UnreachableError
from deployments.config import AppConfig
from deployments.jobs.database import DatabaseSpec
from deployments.jobs.store import JobStore
from deployments.launch.capacity import Resources, missing, needed, out_of_reach
from deployments.launch.http_client import get
from deployments.launch.ray_session import (
    RAY_FAILURES,
    LostError,
    Placement,
    Room,
    StartError,
    can_grow,
    in_time,
    is_ray_alive,
    nodes,
    ray_session,
    reason,
)
from deployments.service_config import HttpConfig

_POLL_S = 0.1
_WATCH_S = 2.0
# Before missing resources are worth a line: a cluster's autoscaler may be at work.
_PATIENCE_S = 5.0
# Between Serve's word that every replica runs and the first answer over HTTP.
_HTTP_S = 60.0
_STATUS_S = 30.0
# A drained app may still be sending its last files. One that did not come up, or is dropped on purpose, has nothing to
# wait for.
_STOP_S = 90.0
_STOP_SOON_S = 5.0
_SIGNAL_S = 0.2


@dataclass
class StartTimeouts:
    """How long to wait for the end of an app and of Serve, each; what was asked to end goes on doing so after that."""

    stop_s: float = _STOP_SOON_S


@dataclass(frozen=True)
class RunningApp:
    """An app that answers.

    Attributes:
        name: of the Serve application.
        url: of its HTTP side, as this machine reaches it.
        ray_address: of the Ray cluster that it runs in.
        start_seconds: the bring-up took.
        patience: with its end.
    """

    name: str
    url: str
    ray_address: str
    start_seconds: float
    patience: StartTimeouts

    def watch(self) -> None:
        """Wait as long as the app is there.

        Raises:
            LostError: it is gone.
            KeyboardInterrupt: Ctrl-C or SIGTERM.
        """
        while True:
            time.sleep(_WATCH_S)
            _application(self.name)

    def drain(self, timeout_s: float, tell: Callable[[str], None]) -> None:
        """Have the app take no new request, and wait for those that it has. Jobs that wait stay for the next start, and
        so do those that run and are not done in time, or when somebody interrupts this.

        Args:
            timeout_s: for them.
            tell: takes a line where there is something to wait for.

        Raises:
            LostError: Serve no longer answers.
            KeyboardInterrupt: Ctrl-C or SIGTERM.
        """
        # In this order: where /ready says that the app is shutting down, no request is accepted any more.
        self._everywhere("Director", "drain")
        self._everywhere("Ingress", "drain")
        try:
            num_running = self._await_idle(timeout_s, tell)
        except KeyboardInterrupt:
            self._everywhere("Director", "release")
            raise
        if num_running:
            tell(f"{num_running} requests are not done after {timeout_s:g} s; jobs go on with the next start")
            self._everywhere("Director", "release")
        else:
            # What is left is on its way to its client; Serve lets a stopping Ingress finish that.
            self.patience.stop_s = _STOP_S

    def _await_idle(self, timeout_s: float, tell: Callable[[str], None]) -> int:
        """How many requests are still in hand when none is, or the time is up."""
        deadline_s = time.monotonic() + timeout_s
        has_told = False
        while num_running := sum(self._everywhere("Director", "drain")):
            if time.monotonic() > deadline_s:
                break
            if not has_told:
                tell(f"finishing what runs, for {timeout_s:g} s at most; Ctrl-C once more leaves it to the next start")
                has_told = True
            time.sleep(_POLL_S)
        return num_running

    def _everywhere(self, stage: str, method: str) -> list[Any]:
        """What every replica of a stage answers."""
        try:
            with in_time(_STATUS_S):
                results: list[Any] = serve.get_deployment_handle(stage, app_name=self.name).broadcast(method).results()
                return results
        except RAY_FAILURES as error:
            raise LostError(f"the app no longer answers: {reason(error)}") from None


@contextmanager
def running(config: AppConfig, placement: Placement, tell: Callable[[str], None] = print) -> Iterator[RunningApp]:
    """Bring an app up, and down again. To be called by the main thread: it takes over the signals.

    Args:
        config: of the app; port 0 takes a free one.
        placement: where it is to run.
        tell: takes lines about the progress.

    Raises:
        Cosmos3Error: the checkpoint or the layout cannot be used, or nobody would be let in; found before anything is
            started.
        StartError: anything else; see the class.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a second one also while requests are being finished.
    """
    start_s = time.monotonic()
    config = config.model_copy(update={"checkpoint": CheckpointLayout.open(config.checkpoint).directory})
    needs = needed(config)
    _check_access(config, tell)
    with ray_session(placement):
        room = Room(placement)
        if not can_grow() and (lack := out_of_reach(config, nodes())):
            hint = f" Or set --num-cpus {math.ceil(needs['CPU'])}: processes are counted, not held to it."
            if needs["GPU"] > sum(node.resources.get("GPU", 0) for node in nodes()):
                hint = " --config laptop does without GPUs."
            raise StartError(lack + (hint if placement.is_alone else ""))
        patience = StartTimeouts()
        with _serve(config.http, placement, patience, tell) as url, _submitted(config, patience):
            _await_replicas(config.name, needs, room, placement.start_timeout_s, tell)
            _await_http(url)
            address = ray.get_runtime_context().gcs_address
            yield RunningApp(config.name, url, address, time.monotonic() - start_s, patience)


def _check_access(config: AppConfig, tell: Callable[[str], None]) -> None:
    """Who will be let in, as far as that can be told here; the Ingress looks again, where Serve really listens.

    Raises:
        NoKeys: nobody.
        JobsError, MediaStoreError: the keys cannot be read.
    """
    host = config.http.host
    if auth_required(config.auth.enabled, host):
        store = JobStore.open(DatabaseSpec.of(config).resolved())
        try:
            check_keys(store.keys, host)
        finally:
            store.close()
    elif auth_required(None, host):
        tell(f"auth.enabled is false and http.host is {host}: whoever reaches the port may use the app")


@contextmanager
def _serve(
    http: HttpConfig, placement: Placement, patience: StartTimeouts, tell: Callable[[str], None]
) -> Iterator[str]:
    """A running Serve, found or started; yields the URL of its HTTP side."""
    with in_time(_STATUS_S):
        status = serve.status()
    head = _head_elsewhere()
    if status.proxies or status.applications:
        found = http_in_force()
        if http.port and found != (http.host, http.port):
            tell(f"Serve runs there already, at {found[0]}:{found[1]}; http.host and http.port change nothing")
        yield _url(*found, head)
        return
    if head and _is_loopback(http.host):
        hint = "Set --host 0.0.0.0, or an address of that machine."
        raise StartError(f"http.host={http.host}: Ray's head is another machine, {head}, and only hears itself. {hint}")
    # Elsewhere nothing can be probed: a port that is taken shows when the app does not answer.
    port = http.port if head else _free_port(http)
    is_in_a_hurry = False
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": http.host, "port": port})
        except RAY_FAILURES as error:
            raise StartError(f"Serve did not start: {reason(error)}") from None
        yield _url(http.host, port, head)
    except KeyboardInterrupt:
        is_in_a_hurry = placement.is_alone  # Ray takes Serve with it
        raise
    finally:
        if not is_in_a_hurry:
            _stop(_shutdown_if_alone, patience)


def _shutdown_if_alone() -> None:
    """Stop Serve, unless others have deployed to it meanwhile."""
    if not serve.status().applications:
        serve.shutdown()


def _head_elsewhere() -> str:
    """The address of Ray's head where that is another machine, else "". Serve listens there."""
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    return "" if _is_loopback(head) or head == ray.util.get_node_ip_address() else head


def _is_loopback(host: str) -> bool:
    return host == "localhost" or host.startswith("127.") or host == "::1"


def _stop(call: Callable[[], None], patience: StartTimeouts) -> None:
    # It takes a moment until Ray is seen to end when the whole process group got the signal that ends this process.
    time.sleep(_SIGNAL_S)
    if not is_ray_alive():
        return
    with (
        # Serve's controller ends while it answers, which Ray reports on stdout as a failed task.
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(LostError, *RAY_FAILURES),
        in_time(patience.stop_s),
    ):
        call()


def _url(host: str, port: int, head: str) -> str:
    if host in ("0.0.0.0", "::"):
        host = head or "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _free_port(http: HttpConfig) -> int:
    """The port that was asked for, or a free one for 0. Left to itself, Serve shares one that another program has."""
    with socket.socket(socket.AF_INET6 if ":" in http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            hint = "Choose another with --port; 0 takes a free one."
            raise StartError(f"cannot listen on {http.host}:{http.port}: {error.strerror}. {hint}") from None
        return int(probe.getsockname()[1])


@contextmanager
def _submitted(config: AppConfig, patience: StartTimeouts) -> Iterator[None]:
    """The application: submitted to Serve, its replicas starting."""
    with in_time(_STATUS_S):
        applications = serve.status().applications
    if config.name in applications:
        raise StartError(f"an app {config.name!r} already runs in that Ray cluster; stop it, or choose another --name")
    target = serve.RunTarget(build_app(config), name=config.name, route_prefix="/")
    try:
        try:
            serve.run_many([target], wait_for_applications_running=False)
        except RAY_FAILURES as error:
            raise StartError(f"Serve refused the app: {reason(error)}") from None
        yield
    finally:
        _stop(lambda: serve.delete(config.name), patience)


def _application(name: str) -> Any:
    """What Serve says of the application.

    Raises:
        LostError: it knows none of that name, or no longer answers.
    """
    if not is_ray_alive():
        raise LostError("Ray is gone, and the app with it")
    try:
        with in_time(_STATUS_S):
            applications = serve.status().applications
    except RAY_FAILURES as error:
        raise LostError(f"Serve no longer answers: {reason(error)}") from None
    if name not in applications:
        raise LostError(f"Serve no longer has an app {name!r}; somebody has deleted it")
    return applications[name]


def _await_replicas(name: str, needs: Resources, room: Room, timeout_s: float, tell: Callable[[str], None]) -> None:
    start_s = time.monotonic()
    has_told = False
    while (app := _application(name)).status != "RUNNING":
        if app.status == "DEPLOY_FAILED":
            raise StartError(_why_it_failed(app))
        waited_s = time.monotonic() - start_s
        lack = missing(needs, room.free())
        if waited_s > timeout_s:
            idle = sorted(stage for stage, it in app.deployments.items() if not it.replica_states.get("RUNNING"))
            raise StartError(f"not up within {timeout_s:g} s: {', '.join(idle)} did not start. {lack}".rstrip())
        if lack and waited_s > _PATIENCE_S and not has_told:
            tell(f"waiting: {lack}")
            has_told = True
        time.sleep(_POLL_S)


def _why_it_failed(app: Any) -> str:
    reasons = [
        f"the stage {stage} did not start: {reason(it.message)}"
        for stage, it in app.deployments.items()
        if it.status == "DEPLOY_FAILED"
    ]
    return "; ".join(reasons) or f"Serve refused the app: {reason(app.message)}"


def _await_http(url: str) -> None:
    deadline_s = time.monotonic() + _HTTP_S
    answer = "nothing"
    while time.monotonic() < deadline_s:
        with contextlib.suppress(UnreachableError):
            status, answer = get(url, "/ready", timeout_s=10)
            if status == 200:
                return
        time.sleep(_POLL_S)
    raise StartError(f"every stage runs, but {url}/ready does not say so within {_HTTP_S:g} s; it says {answer}")
