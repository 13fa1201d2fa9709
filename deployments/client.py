"""The Python client of a running app: one interface over HTTP and over handles, for threads and for event loops.

    client = connect()                                                    # from any process of the Ray cluster
    client = Cosmos3Client.over_http("http://127.0.0.1:8000", api_key)    # from anywhere
    generated = client.generate(GenerationRequest(prompt="..."))
    for event in client.stream(GenerationRequest(prompt="...")): ...
    video = client.wait(client.create(GenerationRequest(prompt="...")).id)
    client.save(video.id, "clip.mp4")

:func:`connect_async` and :class:`AsyncCosmos3Client` have the same calls for ``await``.
"""

from __future__ import annotations

import asyncio
import socket
from typing import TYPE_CHECKING, Any

from cluster.errors import AppNotFound
from cosmos3_core import checks
from deployments.api_model import Model
from deployments.clients.asynchronous import DEFAULT_CALL_S, LONGEST_S, AsyncCosmos3Client, Generation
from deployments.clients.blocking import Cosmos3Client, VideoStream
from deployments.clients.http_connection import Connecting
from deployments.clients.transport import DEFAULT_PATIENCE, AsyncVideoStream, Patience
from deployments.jobs.video import Video, VideoError, VideoPage

if TYPE_CHECKING:
    from deployments.clients.handle_transport import HandleTransport

__all__ = [
    "AsyncCosmos3Client",
    "AsyncVideoStream",
    "Connecting",
    "Cosmos3Client",
    "Generation",
    "Model",
    "Patience",
    "Video",
    "VideoError",
    "VideoPage",
    "VideoStream",
    "connect",
    "connect_async",
]


_LOOPBACK, _LOOPBACK_S = ("127.0.0.1", "::1", "localhost"), 1.0


def connect(
    app_name: str = "cosmos3", *, timeout_s: float = DEFAULT_CALL_S, patience: Patience = DEFAULT_PATIENCE
) -> Cosmos3Client:
    """Connect to a running app by its name, in the Ray cluster that this process has joined.

    Without one, the process joins the cluster that ``RAY_ADDRESS`` names, or this machine's. If the machine runs
    several, set the variable: ``cosmos3 serve`` prints it.

    Args:
        timeout_s: for one call that answers at once.
        patience: what is retried; by default only broken streams of events.

    Raises:
        AppNotFound: there is no such cluster, it refuses this process, or no such app runs in it.
    """
    return Cosmos3Client(AsyncCosmos3Client(_make_transport(app_name, timeout_s), patience))


async def connect_async(
    app_name: str = "cosmos3", *, timeout_s: float = DEFAULT_CALL_S, patience: Patience = DEFAULT_PATIENCE
) -> AsyncCosmos3Client:
    """Connect as :func:`connect` does, for this event loop; raises the same errors."""
    return AsyncCosmos3Client(await asyncio.to_thread(_make_transport, app_name, timeout_s), patience)


def _make_transport(app_name: str, timeout_s: float) -> HandleTransport:
    from deployments.clients.handle_transport import HandleTransport

    timeout_s = checks.real("timeout_s", timeout_s, 0, LONGEST_S)
    return HandleTransport(_find_director(app_name), timeout_s)


def _find_director(app_name: str) -> Any:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        if not ray.is_initialized():
            _allow_loopback()
            ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
        return serve.get_deployment_handle("Director", app_name=app_name)
    except ConnectionError as error:
        raise AppNotFound(f"no Ray cluster could be joined; set RAY_ADDRESS: {error}") from None
    except (KeyError, RayServeException) as error:
        address = ray.get_runtime_context().gcs_address
        hint = "set RAY_ADDRESS, and what else `cosmos3 serve` printed, to reach another one"
        raise AppNotFound(f"no app {app_name!r} runs in the Ray cluster at {address}; {hint}: {error}") from None


def _allow_loopback() -> None:
    """Let this process join a Ray that listens on loopback alone, as that of ``cosmos3 serve`` does.

    Ray itself would look for it at this machine's other address, and give up after minutes. Its own setting is
    RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, which has to be there before it is imported.
    """
    import ray
    from ray._private import ray_constants, services

    host, _, port = services.get_ray_address_from_environment("auto", None).rpartition(":")
    if host.strip("[]") not in _LOOPBACK or not port.isdecimal():
        return
    try:
        socket.create_connection((ray.util.get_node_ip_address(), int(port)), timeout=_LOOPBACK_S).close()
    except OSError:
        ray_constants.ENABLE_RAY_CLUSTER = False
