"""Ingress: the HTTP API of :mod:`deployments.api` in a replica of Serve."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from ray import serve

from deployments.api.app import build_api
from deployments.api.service import IngressSpec, Service
from deployments.readiness import Readiness


def _api() -> FastAPI:
    """Built in each replica."""
    return build_api(lambda: serve.get_replica_context().servable_object.service)


@serve.ingress(_api)
class Ingress:
    """See the module.

    Args:
        spec: how it works.
        director: its handle.

    Attributes:
        service: what the API works with.
    """

    def __init__(self, spec: IngressSpec, director: Any) -> None:
        self.service = Service.open(spec, director, Readiness())

    async def drain(self) -> None:
        """Say so at /ready: whoever balances the load sends no more. The Director refuses new requests."""
        self.service.is_draining = True
