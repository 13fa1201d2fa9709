"""Readiness of an app's stages, asked of Serve's controller and cached."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Any

from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

_ANSWER_S = 10.0
_CACHE_S = 1.0


class Readiness:
    """Readiness of the app that this replica belongs to. For use inside a replica."""

    def __init__(self) -> None:
        self._app_name = serve.get_replica_context().app_name
        self._deployments: dict[str, Any] = {}
        self._asked_at_s = -math.inf
        self._asking = asyncio.Lock()

    async def waiting_for(self) -> list[str]:
        """Return the stages without a running replica."""
        try:
            async with asyncio.timeout(_ANSWER_S):
                deployments = await self._all()
        except (TimeoutError, RayError, RayServeException):
            return ["Serve's controller"]
        if not deployments:
            return [f"the app {self._app_name}"]  # Serve is about to take it down
        return sorted(name for name, it in deployments.items() if it.replica_states.get("RUNNING", 0) < 1)

    async def _all(self) -> dict[str, Any]:
        async with self._asking:
            if time.monotonic() > self._asked_at_s + _CACHE_S:
                applications = (await asyncio.to_thread(serve.status)).applications
                self._deployments = applications[self._app_name].deployments if self._app_name in applications else {}
                self._asked_at_s = time.monotonic()
            return self._deployments
