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
import contextlib
import os
import re
import socket
import sys
from pathlib import Path
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


# Despite its name, with 0 it makes Ray take loopback for this machine's address.
_LOOPBACK_SETTING = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
_RAYLET = re.compile(rb"/raylet/raylet\0(?:.*\0)?--gcs-address=([^\0]+)")
_LOOPBACK, _PROBE_S = ("127.0.0.1", "[::1]", "localhost"), 1.0


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
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        _allow_loopback()
    from deployments.clients.handle_transport import HandleTransport  # imports ray

    timeout_s = checks.real("timeout_s", timeout_s, 0, LONGEST_S)
    return HandleTransport(_find_director(app_name), timeout_s)


def _find_director(app_name: str) -> Any:
    import ray
    from ray import serve
    from ray.serve.exceptions import RayServeException

    try:
        if not ray.is_initialized():
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

    Ray itself would look for it at this machine's other address, and give up after minutes. Raise AppNotFound if it is
    too late for the setting, which Ray reads when it is imported.
    """
    host, _, port = _find_address().rpartition(":")
    if host not in _LOOPBACK or not port.isdecimal() or os.environ.get(_LOOPBACK_SETTING) == "0":
        return
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))  # sends nothing, but chooses the address that others reach this machine at
        with socket.create_connection((probe.getsockname()[0], int(port)), timeout=_PROBE_S):
            return  # it listens there as well
    if "ray" in sys.modules:
        raise AppNotFound(
            f"the Ray at {host}:{port} listens on loopback alone: set {_LOOPBACK_SETTING}=0 before ray is imported, or "
            "import ray after connect()"
        )
    os.environ[_LOOPBACK_SETTING] = "0"


def _find_address() -> str:
    """Return the address of the Ray that ``ray.init("auto")`` joins; "" if it is not known, or there are several."""
    if (address := os.environ.get("RAY_ADDRESS", "auto")) not in ("", "auto"):
        return address
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            if match := _RAYLET.search(path.read_bytes()):
                found.add(match[1].decode())
    return found.pop() if len(found) == 1 else ""
