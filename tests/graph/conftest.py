"""One Ray cluster and one running app for the whole session. Process ids come from the events of a request."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deployments.launch import cli
from tests.app.director_client import connect
from tests.app.in_process import app_config
from tests.core_reference import reference  # noqa: F401  fixtures
from tests.jobs.postgres import fresh_postgres_url, postgres_url  # noqa: F401  fixtures
from tests.process_budget import APPS, started
from tests.settling import eventually

# Ray reads these once, when it is imported or its processes start.
os.environ |= {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_ENABLE_AUTO_CONNECT": "0",
    # Ray's workers would run at lower priority than, say, other tests.
    "RAY_worker_niceness": "0",
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "0.2",
    # As `cosmos3 serve` has it, but for the loopback: some tests add nodes.
    **{name: value for name, value in cli._LOCAL_RAY_ENVIRONMENT.items() if not name.startswith("RAY_ENABLE")},
}

REPOSITORY = Path(__file__).parents[2]


@dataclass(frozen=True)
class App:
    """A running app: Python client, base URL, configuration."""

    name: str
    client: Any
    url: str
    config: Any


def count_runs(run: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap a function to count its calls."""

    def start(*arguments: Any, **options: Any) -> Any:
        started[APPS] += 1
        return run(*arguments, **options)

    return start


def has_agent(node: dict[str, Any]) -> bool:
    """Whether the node's metrics agent answers."""
    with suppress(OSError), socket.create_connection((node["NodeManagerAddress"], node["MetricsExportPort"]), 1.0):
        return True
    return False


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[int]:
    """A local Ray, and Serve's HTTP port. Logical CPUs and GPUs exceed the real ones: replicas mostly wait."""
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    import ray
    import ray.serve._private.client as serve_client
    from ray import serve

    serve_client.CLIENT_POLLING_INTERVAL_S = 0.05
    serve.run = count_runs(serve.run)
    ray.init(
        "local",
        num_cpus=64,
        num_gpus=2,
        include_dashboard=False,
        object_store_memory=512 * 2**20,
        log_to_driver=False,
        logging_level="ERROR",
    )
    # Ray's processes look for the metrics agent only when they start.
    assert eventually(lambda: all(has_agent(node) for node in ray.nodes()), 300.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()
    ray.shutdown()


def _start(tiny_nano: Path, port: int, media: Path, name: str, overrides: dict[str, Any]) -> App:
    from ray import serve

    from deployments.app import build

    config = app_config(tiny_nano, media, name, overrides)
    # As `serve run deployments.app:build` does: Serve's name of the app is not in the configuration.
    serve.run(build(config.model_dump(mode="json")), name=name, route_prefix=f"/{name}")
    return App(name, connect(name), f"http://127.0.0.1:{port}/{name}", config)


@pytest.fixture(scope="session")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The media store that all apps share."""
    return tmp_path_factory.mktemp("media")


@pytest.fixture(scope="module")
def start_app(ray_cluster: int, tiny_nano: Path, media: Path) -> Iterator[Callable[..., App]]:
    """Start an app with some keys of the laptop's configuration replaced; it is deleted with the module."""
    from ray import serve

    names: list[str] = []

    def start(name: str, **overrides: Any) -> App:
        names.append(name)
        return _start(tiny_nano, ray_cluster, media, name, overrides)

    yield start
    for name in names:
        serve.delete(name)


@pytest.fixture(scope="session")
def app(ray_cluster: int, tiny_nano: Path, media: Path) -> App:
    """The app that most tests share: it runs two videos and queues few, and its ingress answers three calls at once.

    Leases last ten seconds and states are saved often, so that what was lost goes on soon. A rank may be silent for
    long: tests hold it.
    """
    overrides = {
        "ingress__max_ongoing_requests": 3,
        "ingress__max_queued_requests": 1,
        "jobs__max_running_videos": 2,
        "jobs__max_queued": 8,
        "jobs__lease_s": 10,
        "jobs__checkpoint_period_s": 0.2,
        "transformer__save_period_s": 0.2,
        "transformer__quantum_timeout_s": 1000,
    }
    return _start(tiny_nano, ray_cluster, media, "shared", overrides)
