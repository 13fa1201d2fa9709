"""Address that the Serve of this Ray cluster listens at; it is set when Serve starts."""

from __future__ import annotations

import ray

_ANSWER_S = 30.0


def http_in_force() -> tuple[str, int]:
    """Return the host and port, which cannot be changed while Serve runs.

    Raises:
        ValueError: no Serve runs.
        RayError: it does not answer.
    """
    controller = ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")
    options = ray.get(controller.get_http_config.remote(), timeout=_ANSWER_S)
    return str(options.host), int(options.port)
