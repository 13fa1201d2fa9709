"""Ingress: the HTTP API of :mod:`deployments.api` in a replica of Serve."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.api.app import build_api
from deployments.api.readiness import Readiness
from deployments.api.serve_http import http_in_force
from deployments.api.service import Service
from deployments.config import AppConfig

_NUM_THREADS = 32


def _api() -> FastAPI:
    """Build the API in each replica."""
    return build_api(lambda: serve.get_replica_context().servable_object.service)


@serve.ingress(_api)
class Ingress:
    """The deployment that serves the HTTP API.

    Args:
        config: of the app.
        director: the Director's handle.

    Attributes:
        service: what the API works with.
    """

    async def __init__(self, config: AppConfig, director: Any) -> None:  # type: ignore[misc] # Serve awaits it
        # What the API asks the database and the disk for; asyncio's own default is by the number of cores.
        executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="ingress")
        asyncio.get_running_loop().set_default_executor(executor)
        host, _ = await asyncio.to_thread(http_in_force)
        self.service = await asyncio.to_thread(Service.open, config, director, Readiness(), host)

    async def drain(self) -> None:
        """Report the shutdown at /ready, so that load balancers send no more. The Director refuses new requests."""
        self.service.is_draining = True
