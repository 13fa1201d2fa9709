"""Ingress: the HTTP API of :mod:`deployments.api` in a replica of Serve."""

from __future__ import annotations

import asyncio
import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import ray
from fastapi import FastAPI
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from deployments.api.app import build_api
from deployments.api.service import Service
from deployments.config import AppConfig

_NUM_THREADS = 32
_ADDRESS_S = 30.0
_STATUS_S = 10.0
# A Director that does not answer so long is busy with something that it should not be.
_DIRECTOR_S = 3.0
_STATUS_CACHE_S = 1.0
# States of a replica that serves. A controller that has just been restarted recovers those it knew.
_UP_STATES = ("RUNNING", "RECOVERING")


def _api() -> FastAPI:
    """Build the API in each replica."""
    return build_api(lambda: serve.get_replica_context().servable_object.service)


@serve.ingress(_api)
class Ingress:
    """The deployment that serves the HTTP API. ``director`` is the Director's handle."""

    async def __init__(self, config: AppConfig, director: Any) -> None:  # type: ignore[misc] # Serve awaits it
        # For the API's blocking calls; asyncio's default depends on the number of cores.
        executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ingress")
        asyncio.get_running_loop().set_default_executor(executor)
        host, _ = await asyncio.to_thread(find_serve_address)
        readiness = Readiness(serve.get_replica_context().app_name, director)
        self.service = await asyncio.to_thread(Service.open, config, director, readiness.find_missing_stages, host)

    async def drain(self) -> None:
        """Report the shutdown at /ready, so that load balancers send no more. The Director rejects new requests."""
        self.service.is_draining = True


class Readiness:
    """Asks Serve's controller which stages of an app run, and the Director what fails; caches the answers."""

    def __init__(self, app_name: str, director: Any) -> None:
        self._app_name, self._director = app_name, director
        self._deployments: dict[str, Any] = {}
        self._faults: list[str] = []
        self._checked_at_s = -math.inf
        self._check = asyncio.Lock()

    async def find_missing_stages(self) -> list[str]:
        """Return the stages without a running replica, or what keeps the Director from beginning jobs."""
        try:
            async with asyncio.timeout(_STATUS_S), self._check:
                if time.monotonic() > self._checked_at_s + _STATUS_CACHE_S:
                    app = (await asyncio.to_thread(serve.status)).applications.get(self._app_name)
                    self._deployments = {} if app is None else app.deployments
                    self._faults = await find_faults(self._director)
                    self._checked_at_s = time.monotonic()
        except (TimeoutError, RayError, RayServeException):
            return ["Serve's controller"]
        if not self._deployments:
            return [f"the app {self._app_name}"]  # Serve is about to take it down
        missing = (name for name, it in self._deployments.items() if not any(map(it.replica_states.get, _UP_STATES)))
        return sorted(missing) + self._faults


async def find_faults(director: Any) -> list[str]:
    """Return what keeps the Director from beginning jobs, or that it does not answer."""
    try:
        async with asyncio.timeout(_DIRECTOR_S):
            faults: list[str] = await director.list_faults.remote()
            return faults
    except TimeoutError:
        return [f"Director: no answer within {_DIRECTOR_S:g} s"]
    except (RayError, RayServeException):  # it has no running replica, or has just lost one
        return []


def find_serve_address() -> tuple[str, int]:
    """Return the host and port that this cluster's Serve listens at; they cannot be changed while it runs."""
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    options = ray.get(controller.get_http_config.remote(), timeout=_ADDRESS_S)
    return str(options.host), int(options.port)
