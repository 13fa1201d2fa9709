"""From a configuration to an app that answers, and back to nothing: Ray, Serve, the graph, the HTTP side.

    with running(config, Placement()) as app:
        ...  # app.url serves

Whatever was started is stopped when the block is left, however it is left; what was found running stays. Ray reads the
environment when it is imported: the command line prepares it before it imports this module.
"""

from __future__ import annotations

import contextlib
import io
import logging
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.gang import bundles
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import Cosmos3Error
from deployments.app import _gang, build_app
from deployments.config import AppConfig, Http
from deployments.http_client import UnreachableError, get

_POLL_S = 0.1
_WATCH_S = 2.0
# Before missing resources are worth a line: a cluster's autoscaler may be at work.
_PATIENCE_S = 5.0
# Between Serve's word that every replica runs and the first answer over HTTP.
_HTTP_S = 60.0
_CONNECT_S = 5.0
# A signal to the whole process group, as service managers send it, ends Ray as well; it takes a moment to show.
_SIGNAL_S = 0.2
_RESOURCES = ("CPU", "GPU")
_MAX_REASON_CHARS = 600

_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What Ray and Serve raise when something cannot be started; their types are not documented.
_START_FAILURES = (RayError, RayServeException, ConnectionError, TimeoutError, RuntimeError, ValueError, OSError)


class StartError(Cosmos3Error):
    """The app did not come up; says what is missing, or what a stage said."""


class LostError(Cosmos3Error):
    """The app, or the Ray under it, went away."""


@dataclass(frozen=True)
class Placement:
    """Where an app is to run.

    Attributes:
        ray_address: of the cluster to join; None starts Ray on this machine, for this app alone.
        num_cpus: logical CPUs of the Ray that is started; None = as many as the machine has.
        start_timeout_s: for all of the bring-up.
    """

    ray_address: str | None = None
    num_cpus: int | None = None
    start_timeout_s: float = 1800.0


@dataclass(frozen=True)
class RunningApp:
    """An app that answers.

    Attributes:
        name: of the Serve application.
        url: of its HTTP side, as this machine reaches it.
        start_seconds: the bring-up took.
    """

    name: str
    url: str
    start_seconds: float

    def watch(self) -> None:
        """Wait as long as the app is there.

        Raises:
            LostError: it is gone.
            KeyboardInterrupt: Ctrl-C or SIGTERM.
        """
        while True:
            time.sleep(_WATCH_S)
            _status(self.name)


@contextmanager
def running(config: AppConfig, placement: Placement, tell: Callable[[str], None] = print) -> Iterator[RunningApp]:
    """Bring an app up, and down again. To be called by the main thread: it takes over the signals.

    Args:
        config: of the app; port 0 takes a free one.
        placement: where it is to run.
        tell: takes lines about the progress.

    Raises:
        CheckpointError: the checkpoint cannot be used.
        StartError: anything else; see the class.
        KeyboardInterrupt: Ctrl-C or SIGTERM.
    """
    start_s = time.monotonic()
    # Every replica opens it too; a fault found here costs no start.
    config = config.model_copy(update={"checkpoint": CheckpointLayout.open(config.checkpoint).directory})
    with _stopped_by_signals(), _ray(placement):
        capacity = _Capacity(config, is_fixed=placement.ray_address is None)
        with _serve(config.http, is_alone=placement.ray_address is None) as url, _app(config):
            _await_replicas(config.name, capacity, placement.start_timeout_s, tell)
            _await_http(url)
            yield RunningApp(config.name, url, time.monotonic() - start_s)


@contextmanager
def _stopped_by_signals() -> Iterator[None]:
    """SIGTERM is the same as Ctrl-C. One while requests are being finished ends them too."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _ray(placement: Placement) -> Iterator[None]:
    """A connection to Ray; the Ray itself where none was named."""
    options: dict[str, Any] = {"address": placement.ray_address}
    if placement.ray_address is None:
        # "local" never joins a cluster, whatever this machine runs and the environment names.
        options = {"address": "local", "num_cpus": placement.num_cpus, "include_dashboard": False}
    elif (endpoint := _endpoint(placement.ray_address)) and not _is_listening(endpoint):
        # Ray itself would try for minutes.
        raise StartError(f"cannot join the Ray cluster at {placement.ray_address}: nothing listens there")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(**options, log_to_driver=False, logging_level="ERROR")
        except SystemExit:  # Ray's answer to SIGTERM while it starts
            raise KeyboardInterrupt from None
        except _START_FAILURES as error:
            what = "start Ray" if placement.ray_address is None else f"join the Ray cluster at {placement.ray_address}"
            raise StartError(f"cannot {what}: {_reason(error)}") from None
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own in its place
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        yield
    finally:
        # Half-stopped, Ray would leave processes behind; this takes little more than a second.
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        ray.shutdown()


@contextmanager
def _serve(http: Http, *, is_alone: bool) -> Iterator[str]:
    """A running Serve, found or started; yields the URL of its HTTP side."""
    status = serve.status()
    if status.proxies or status.applications:
        yield _url(*_http_in_force())
        return
    port = _free_port(http)
    is_in_a_hurry = False
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options={"host": http.host, "port": port})
        except _START_FAILURES as error:
            raise StartError(f"Serve did not start: {_reason(error)}") from None
        yield _url(http.host, port)
    except KeyboardInterrupt:
        is_in_a_hurry = True
        raise
    finally:
        # A Ray of our own takes Serve with it. Else: the controller ends while it answers, which Ray reports on stdout
        # as a failed task.
        if _is_ray_alive() and not (is_alone and is_in_a_hurry):
            with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(*_START_FAILURES):
                serve.shutdown()


def _http_in_force() -> tuple[str, int]:
    """Host and port of the Serve that was found; they cannot be changed while it runs."""
    options = ray.get(ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve").get_http_config.remote(), timeout=30)
    return options.host, options.port


def _url(host: str, port: int) -> str:
    if host in ("0.0.0.0", "::"):
        host = "127.0.0.1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _free_port(http: Http) -> int:
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
def _app(config: AppConfig) -> Iterator[None]:
    """The application: submitted, its replicas starting."""
    if config.name in serve.status().applications:
        raise StartError(f"an app {config.name!r} already runs in that Ray cluster; stop it, or choose another --name")
    try:
        try:
            target = serve.RunTarget(build_app(config), name=config.name, route_prefix="/")
            serve.run_many([target], wait_for_applications_running=False)
        except _START_FAILURES as error:
            raise StartError(f"Serve refused the app: {_reason(error)}") from None
        yield
    finally:
        time.sleep(_SIGNAL_S)
        if _is_ray_alive():
            # Waits for requests under way, a minute at the most.
            with contextlib.suppress(*_START_FAILURES):
                serve.delete(config.name)


def _is_ray_alive() -> bool:
    """Whether Ray's head still listens. Without it every call hangs for a minute and then ends this process."""
    endpoint = _endpoint(ray.get_runtime_context().gcs_address)
    return endpoint is None or _is_listening(endpoint)


def _endpoint(address: str) -> tuple[str, int] | None:
    """Host and port of an address such as "10.0.0.1:6379" or "ray://10.0.0.1:10001"; None for "auto"."""
    host, _, port = address.rpartition("://")[2].rpartition(":")
    return (host.strip("[]"), int(port)) if host and port.isdecimal() else None


def _is_listening(endpoint: tuple[str, int]) -> bool:
    try:
        socket.create_connection(endpoint, timeout=_CONNECT_S).close()
    except OSError:
        return False
    return True


def _status(name: str) -> Any:
    """What Serve says of the application.

    Raises:
        LostError: it knows none of that name, or no longer answers.
    """
    if not _is_ray_alive():
        raise LostError("Ray is gone, and the app with it")
    try:
        applications = serve.status().applications
    except (RayError, RayServeException) as error:
        raise LostError(f"Serve no longer answers: {_reason(error)}") from None
    if name not in applications:
        raise LostError(f"Serve no longer has an app {name!r}; somebody has deleted it")
    return applications[name]


def _await_replicas(name: str, capacity: _Capacity, timeout_s: float, tell: Callable[[str], None]) -> None:
    start_s = time.monotonic()
    has_told = False
    while (app := _status(name)).status != "RUNNING":
        if app.status == "DEPLOY_FAILED":
            raise StartError(_why_it_failed(app))
        waited_s = time.monotonic() - start_s
        missing = capacity.missing()
        if waited_s > timeout_s:
            idle = sorted(stage for stage, it in app.deployments.items() if not it.replica_states.get("RUNNING"))
            raise StartError(f"not up within {timeout_s:g} s: {', '.join(idle)} did not start. {missing}".rstrip())
        if missing and waited_s > _PATIENCE_S and not has_told:
            tell(f"waiting: {missing}")
            has_told = True
        time.sleep(_POLL_S)


def _await_http(url: str) -> None:
    deadline_s = time.monotonic() + _HTTP_S
    answer: object = None
    while time.monotonic() < deadline_s:
        with contextlib.suppress(UnreachableError):
            status, answer = get(url, "/ready", timeout_s=10)
            if status == 200:
                return
        time.sleep(_POLL_S)
    raise StartError(f"the app runs, but {url}/ready does not say so within {_HTTP_S:g} s; it says {answer!r}")


class _Capacity:
    """What an app needs of Ray, and what there is for it.

    Args:
        config: of the app, which was not yet submitted.
        is_fixed: nothing can come to what Ray has.
    """

    def __init__(self, config: AppConfig, *, is_fixed: bool) -> None:
        self._needed = _needed(config)
        self._total = ray.cluster_resources()
        self._free = self._total if is_fixed else ray.available_resources()
        if is_fixed and (missing := self.missing()):
            raise StartError(f"{missing} Choose another --config, or set --num-cpus: a count, not a limit.")

    def missing(self) -> str:
        """In words, "" if there is enough: what was free before the app, and what the cluster has gained since."""
        total = ray.cluster_resources()
        has = {kind: self._free.get(kind, 0) + total.get(kind, 0) - self._total.get(kind, 0) for kind in _RESOURCES}
        lacks = {kind: round(self._needed[kind] - has[kind], 4) for kind in _RESOURCES}
        if max(lacks.values()) <= 0:
            return ""
        lacks = {kind: amount for kind, amount in lacks.items() if amount > 0}
        return f"{_amounts(lacks)} missing: the app needs {_amounts(self._needed)}, Ray has {_amounts(has)} for it."


def _needed(config: AppConfig) -> Mapping[str, float]:
    """What the smallest number of replicas of every stage takes together."""
    needed = dict.fromkeys(_RESOURCES, 0.0)
    gang = bundles(_gang(config), config.transformer.num_cpus)
    for stage in (config.ingress, config.director, config.tokenizer, config.transformer, config.vae, config.encoder):
        one = gang if stage is config.transformer else [{"CPU": stage.num_cpus, "GPU": stage.num_gpus}]
        num_replicas = stage.autoscaling.min_replicas if stage.autoscaling else stage.num_replicas
        for kind in _RESOURCES:
            needed[kind] += num_replicas * sum(part.get(kind, 0) for part in one)
    return needed


def _amounts(resources: Mapping[str, float]) -> str:
    return " and ".join(f"{round(amount, 4):g} {kind}" for kind, amount in resources.items())


def _why_it_failed(app: Any) -> str:
    reasons = [
        f"the stage {stage} did not start: {_reason(it.message)}"
        for stage, it in app.deployments.items()
        if it.status == "DEPLOY_FAILED"
    ]
    return "; ".join(reasons) or f"Serve refused the app: {_reason(app.message)}"


def _reason(error: object) -> str:
    """One line about a failure; where Ray's text holds a traceback, the exception that it ends with."""
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    raised = list(re.finditer(r"^(?:\w+\.)*([A-Z]\w+: )", text, re.MULTILINE))
    if raised:
        text = text[raised[-1].start(1) :]
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON_CHARS else f"{line[:_MAX_REASON_CHARS]}..."
