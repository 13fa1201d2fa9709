"""Start an app from its configuration, and stop it again: Ray, Serve, the graph, the HTTP side.

    with run_app(config, Placement()) as app:
        ...  # app.url answers

The end of the block stops what the block started; what ran before stays. Every wait has a deadline.
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
from pathlib import Path
from typing import Any

import ray
from ray import serve

from cosmos3_core.checkpoint.components import check_weights
from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.api.auth import check_keys, is_loopback, requires_key
from deployments.api.ingress import find_serve_address
from deployments.api.proxy_guard import CALLBACK_SETTING
from deployments.app import build_app
from deployments.clients.errors import UnreachableError
from deployments.config import AppConfig, HttpConfig
from deployments.jobs.database import database_url
from deployments.jobs.keys import KeyStore
from deployments.launch.app_calls import get
from deployments.launch.capacity import Resources, describe_missing, describe_shortfall, sum_needs
from deployments.launch.ray_session import (
    RAY_FAILURES,
    FreeResources,
    LostError,
    Placement,
    StartError,
    can_grow,
    describe_death,
    describe_failure,
    find_daemons,
    find_session,
    is_ray_alive,
    list_nodes,
    mute_ray,
    ray_session,
    time_limit,
    wait_while_alive,
)

_POLL_S = 0.1
_WATCH_S = 2.0
# Before missing resources are reported: the cluster's autoscaler may be adding nodes.
_AUTOSCALER_S = 5.0
# From the moment when Serve reports all replicas running to the first HTTP answer.
_HTTP_S = 120.0
_STATUS_S = 120.0
_ROUTES_S = 30.0
# A drained app may still send its last files. One that did not start, or was not drained, is stopped soon.
_STOP_S = 90.0
_STOP_SOON_S = 5.0
_SIGNAL_S = 0.2


@dataclass
class StopTimeout:
    """Seconds to wait for the end of the app, and then for that of Serve; 0 once Ray has died."""

    stop_s: float = _STOP_SOON_S


@dataclass(frozen=True)
class RunningApp:
    """An app that answers over HTTP, at ``url`` as this machine reaches it.

    ``logs`` is the directory of its logs; None on a cluster, where each node has one.
    """

    name: str
    url: str
    ray_address: str
    start_seconds: float
    stop_timeout: StopTimeout
    logs: Path | None = None

    def watch(self, look: Callable[[], None]) -> None:
        """Call ``look`` every two seconds until the app is gone (LostError) or a signal comes (KeyboardInterrupt)."""
        daemons = find_daemons()
        with mute_ray():
            while True:
                try:
                    wait_while_alive(daemons, _WATCH_S)
                    _find_application(self.name)
                    look()
                except LostError:
                    if death := describe_death(daemons):
                        self.stop_timeout.stop_s = 0.0  # nothing answers any more
                        raise LostError(death) from None
                    raise

    def drain(self, timeout_s: float, report: Callable[[str], None]) -> None:
        """Refuse new requests and wait for the running ones; raise LostError if Serve no longer answers.

        Queued jobs stay for the next start. So do running jobs that are not done in time, or when a signal ends the
        wait (KeyboardInterrupt).
        """
        # In this order: once /ready says that the app is shutting down, no request is admitted any more.
        self._broadcast("Director", "drain")
        self._broadcast("Ingress", "drain")
        try:
            num_running = self._await_idle(timeout_s, report)
        except KeyboardInterrupt:
            self._broadcast("Director", "release")
            raise
        if num_running:
            report(f"{num_running} requests are not done after {timeout_s:g} s; jobs resume with the next start")
            self._broadcast("Director", "release")
        else:
            # Files may still be on their way to clients; Serve lets a stopping Ingress finish them.
            self.stop_timeout.stop_s = _STOP_S

    def _await_idle(self, timeout_s: float, report: Callable[[str], None]) -> int:
        """Wait until no request runs or the time is up; return how many still run."""
        deadline_s = time.monotonic() + timeout_s
        has_reported = False
        while num_running := sum(self._broadcast("Director", "drain")):
            if time.monotonic() > deadline_s:
                break
            if not has_reported:
                hint = "a second Ctrl-C leaves jobs to the next start"
                report(f"finishing running requests, for {timeout_s:g} s at most; {hint}")
                has_reported = True
            time.sleep(_POLL_S)
        return num_running

    def _broadcast(self, stage: str, method: str) -> list[Any]:
        """Call a method on every replica of a stage; return their answers."""
        try:
            with time_limit(_STATUS_S):
                results: list[Any] = serve.get_deployment_handle(stage, app_name=self.name).broadcast(method).results()
                return results
        except RAY_FAILURES as error:
            raise LostError(f"the app no longer answers: {describe_failure(error)}") from None


@contextmanager
def run_app(config: AppConfig, placement: Placement, report: Callable[[str], None] = print) -> Iterator[RunningApp]:
    """Start an app, and stop it at the end of the block. Only for the main thread, as it handles signals.

    Raises:
        Cosmos3Error: the checkpoint or the layout cannot be used, or no caller could get in; raised before anything
            is started.
        StartError: the app did not start for another reason.
        KeyboardInterrupt: Ctrl-C or SIGTERM; a second one also while running requests finish.
    """
    start_s = time.monotonic()
    layout = CheckpointLayout.open(config.checkpoint)
    check_weights(layout)
    config = config.model_copy(update={"checkpoint": layout.directory})
    needs = sum_needs(config)
    _check_access(config, report)
    with ray_session(placement):
        free = FreeResources(placement)
        if not can_grow() and (lack := describe_shortfall(config, list_nodes())):
            hint = f" Or set --num-cpus {math.ceil(needs['CPU'])}: Ray counts CPUs by it and limits nothing."
            if needs["GPU"] > sum(node.resources.get("GPU", 0) for node in list_nodes()):
                hint = " --config laptop does without GPUs."
            raise StartError(lack + (hint if placement.is_alone else ""))
        stop_timeout = StopTimeout()
        with _serve(config.http, placement, stop_timeout, report) as url, _submit(config, stop_timeout):
            _await_replicas(config.name, needs, free, placement.start_timeout_s, report)
            _await_http(url)
            _check_proxy(url, report)
            address = ray.get_runtime_context().gcs_address
            logs = find_session() / "logs" / "serve" if placement.is_alone else None
            yield RunningApp(config.name, url, address, time.monotonic() - start_s, stop_timeout, logs)


def _check_access(config: AppConfig, report: Callable[[str], None]) -> None:
    """Raise NoKeys if no caller could get in. The Ingress checks again, with the address where Serve listens."""
    host = config.http.host
    if requires_key(config.auth.enabled, host):
        with contextlib.closing(KeyStore.open(database_url(config))) as keys:
            check_keys(keys, host)
    elif not is_loopback(host):
        report(f"auth.enabled is false and http.host is {host}: everyone who reaches the port may use the app")


@contextmanager
def _serve(
    http: HttpConfig, placement: Placement, stop_timeout: StopTimeout, report: Callable[[str], None]
) -> Iterator[str]:
    """Find or start Serve; yield the URL of its HTTP side."""
    with time_limit(_STATUS_S):
        status = serve.status()
    head = _find_remote_head()
    if status.proxies or status.applications:
        found = find_serve_address()
        if http.port and found != (http.host, http.port):
            report(f"Serve runs there already, at {found[0]}:{found[1]}; http.host and http.port change nothing")
        yield _make_url(*found, head)
        return
    if head and is_loopback(http.host):
        hint = "Set --host 0.0.0.0, or an address of that machine."
        raise StartError(f"http.host={http.host}: Ray's head, {head}, would listen only to itself. {hint}")
    # A port on another machine cannot be probed: if it is taken, the app does not answer in time.
    port = http.port if head else _choose_port(http)
    skips_stop = False
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": http.host, "port": port})
        except RAY_FAILURES as error:
            raise StartError(f"Serve did not start: {describe_failure(error)}") from None
        yield _make_url(http.host, port, head)
    except KeyboardInterrupt:
        skips_stop = placement.is_alone  # Ray takes Serve with it
        raise
    finally:
        if not skips_stop:
            _stop(_shutdown_if_alone, stop_timeout)


def _shutdown_if_alone() -> None:
    """Stop Serve, unless others have deployed to it since."""
    if not serve.status().applications:
        serve.shutdown()


def _find_remote_head() -> str:
    """Return the address of Ray's head, where Serve listens, if that is another machine; else ""."""
    head = ray.get_runtime_context().gcs_address.rpartition(":")[0].strip("[]")
    return "" if is_loopback(head) or head == ray.util.get_node_ip_address() else head


def _stop(call: Callable[[], None], stop_timeout: StopTimeout) -> None:
    if not stop_timeout.stop_s:
        return
    # If the whole process group got the signal, it takes a moment until Ray is seen to end.
    time.sleep(_SIGNAL_S)
    if not is_ray_alive():
        return
    with (
        # Serve's controller exits while it answers, which Ray prints as a failed task.
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(LostError, *RAY_FAILURES),
        time_limit(stop_timeout.stop_s),
    ):
        call()


def _make_url(host: str, port: int, head: str) -> str:
    if host in ("0.0.0.0", "::"):
        host = head or "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _choose_port(http: HttpConfig) -> int:
    """Return the configured port, or a free one for 0. Serve itself would share the port of another program."""
    with socket.socket(socket.AF_INET6 if ":" in http.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((http.host, http.port))
        except OSError as error:
            hint = "Choose another with --port; 0 takes a free one."
            raise StartError(f"cannot listen on {http.host}:{http.port}: {error.strerror}. {hint}") from None
        return int(probe.getsockname()[1])


@contextmanager
def _submit(config: AppConfig, stop_timeout: StopTimeout) -> Iterator[None]:
    """Submit the application to Serve, which starts its replicas; delete it at the end of the block."""
    with time_limit(_STATUS_S):
        applications = serve.status().applications
    if config.name in applications:
        raise StartError(f"an app {config.name!r} already runs in that Ray cluster; stop it, or choose another --name")
    target = serve.RunTarget(build_app(config), name=config.name, route_prefix="/")
    try:
        try:
            serve.run_many([target], wait_for_applications_running=False)
        except RAY_FAILURES as error:
            raise StartError(f"Serve refused the app: {describe_failure(error)}") from None
        yield
    finally:
        _stop(lambda: serve.delete(config.name), stop_timeout)


def _find_application(name: str) -> Any:
    """Return Serve's status of the application; raise LostError if Serve has none, or no longer answers."""
    try:
        with time_limit(_STATUS_S):
            applications = serve.status().applications if is_ray_alive() else None
    except RAY_FAILURES as error:
        raise LostError(f"Serve no longer answers: {describe_failure(error)}") from None
    if applications is None:
        raise LostError("Ray is gone, and the app with it")
    if name not in applications:
        raise LostError(f"Serve no longer has an app {name!r}; it was deleted")
    return applications[name]


def _await_replicas(
    name: str, needs: Resources, free: FreeResources, timeout_s: float, report: Callable[[str], None]
) -> None:
    start_s = time.monotonic()
    has_reported = False
    while (app := _find_application(name)).status != "RUNNING":
        if app.status == "DEPLOY_FAILED":
            raise StartError(_describe_deploy_failure(app))
        waited_s = time.monotonic() - start_s
        lack = describe_missing(needs, free.count())
        if waited_s > timeout_s:
            idle = sorted(stage for stage, it in app.deployments.items() if not it.replica_states.get("RUNNING"))
            raise StartError(f"not up within {timeout_s:g} s: {', '.join(idle)} did not start. {lack}".rstrip())
        if lack and waited_s > _AUTOSCALER_S and not has_reported:
            report(f"waiting: {lack}")
            has_reported = True
        time.sleep(_POLL_S)


def _describe_deploy_failure(app: Any) -> str:
    reasons = [
        f"the stage {stage} did not start: {describe_failure(it.message)}"
        for stage, it in app.deployments.items()
        if it.status == "DEPLOY_FAILED"
    ]
    return "; ".join(reasons) or f"Serve refused the app: {describe_failure(app.message)}"


def _check_proxy(url: str, report: Callable[[str], None]) -> None:
    """Report a proxy without :mod:`deployments.api.proxy_guard`, as in a cluster whose nodes lack its variable."""
    status, _ = get(url, "/-/routes", timeout_s=_ROUTES_S)
    if status != 404:
        report("requests' headers have no bound here: set on the nodes of this Ray cluster " + CALLBACK_SETTING)


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
