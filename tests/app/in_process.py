"""The whole app in one process: the graph of :func:`deployments.app.build_app` on :mod:`tests.app.local_ray`.

Every deployment is the product's own class, gangs are one rank in a thread with the real model, HTTP goes over a real
socket. Not covered: deaths and memory of processes, Serve's proxy and controller.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import socket
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster import clip_stream, gang
from deployments.api.app import build_api
from deployments.api.ingress import find_faults
from deployments.api.service import Service
from deployments.app import build_app
from deployments.config import AppConfig
from deployments.director import pipeline
from deployments.director.director import Director
from tests.app.director_client import DirectorClient
from tests.app.local_ray import Deployment, Handle, LocalRay, Loop, Packed

REPOSITORY = Path(__file__).parents[2]
LAPTOP = REPOSITORY / "cluster" / "configs" / "laptop.yaml"
_START_S = _STOP_S = 100.0

logger = logging.getLogger(__name__)


def app_config(checkpoint: Path, media: Path, name: str, overrides: dict[str, Any]) -> AppConfig:
    """Return the laptop's configuration with some keys replaced; ``__`` stands for the dots in their names."""
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    # Each app has its own jobs; apps of one model would run each other's.
    own = {"media.directory": str(media), "jobs.database": f"sqlite:///{media}/{name}.sqlite3"}
    return AppConfig.read(LAPTOP, {"checkpoint": str(checkpoint), **own, **dotted})


@contextmanager
def local_ray() -> Iterator[Loop]:
    """Run a loop for apps in which :mod:`cluster` and pipelines use a Ray of this process."""
    loop = Loop()
    ray = LocalRay(loop)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clip_stream, "ray", ray)
        patch.setattr(gang, "ray", ray)
        patch.setattr(pipeline, "ray", ray)
        patch.setattr(gang, "get_current_placement_group", lambda: "the leader's")
        patch.setattr(gang, "placement_group_table", lambda _: {"bundles_to_node_id": {0: "here"}})
        yield loop
        loop.close()
        ray.close()


class InProcessApp:
    """A running app.

    Args:
        loop: of :func:`local_ray`.
        name: name in messages.
        config: of the app.

    Attributes:
        url: of the API.
        client: calls the Director.
        director: its handle.
        service: of the ingress.
        failures: gang failures; a real leader would have ended its process.
    """

    def __init__(self, loop: Loop, name: str, config: AppConfig) -> None:
        self.name, self.config = name, config
        self.failures: list[str] = []
        self._loop = loop
        self._deployments: dict[str, Deployment] = {}
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self._socket.listen(128)
        self.url = "http://{}:{}".format(*self._socket.getsockname())
        # As `serve run deployments.app:build` does: Serve's name of the app is not in the configuration.
        ingress = build_app(AppConfig.parse(config.model_dump(mode="json")))._bound_deployment
        spec, director = self._arguments_of(ingress)
        self.director: Handle = director
        self.service = loop.run(self._open(spec), _START_S)
        app = _ends_with_its_client(build_api(lambda: self.service))
        # As long as Serve's proxy keeps a connection: within uvicorn's 5 s a client that pauses meets a closed one.
        server = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=90)
        self._server = uvicorn.Server(server)
        self._serving = loop.start(self._server.serve([self._socket]))
        self.client = DirectorClient(director)

    def close(self) -> None:
        """Stop as Serve does: the Director releases its jobs. Then stop what would end with its process."""
        for replica in self.replicas("Director"):
            self._loop.run(Director.__del__(replica), _STOP_S)
            self._loop.run(_cancel([*replica._maintenance, *replica._runner._tasks]), _STOP_S)
            replica._jobs.store.close()
        self._server.should_exit = self._server.force_exit = True
        try:
            self._serving.result(_STOP_S)
        except TimeoutError:
            faulthandler.dump_traceback(sys.__stderr__)  # which thread does what
            raise
        self.service.jobs.store.close()
        assert not self.failures

    def replicas(self, name: str) -> list[Any]:
        """Return the objects of a deployment."""
        return self._deployments[name].replicas

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Hold the transformer's ranks: calls made in the block run after it."""
        ended = threading.Event()
        begun = [rank.hold(ended) for leader in self.replicas("Transformer") for rank in leader._gang._actors]
        try:
            for each in begun:
                assert each.wait(_START_S)
            yield
        finally:
            ended.set()

    async def _open(self, config: AppConfig) -> Service:
        return await asyncio.to_thread(Service.open, config, self.director, self._find_faults, "127.0.0.1")

    async def _find_faults(self) -> list[str]:
        """Report no missing stage, as all of them are up once the app is made."""
        return await find_faults(self.director)

    def _arguments_of(self, deployment: Any) -> Any:
        """Return a deployment's arguments, with handles in place of the running deployments."""
        return Packed.of(deployment.init_args).unpack(lambda application: self._handle(application._bound_deployment))

    def _handle(self, deployment: Any) -> Handle:
        if deployment.name not in self._deployments:
            arguments = self._arguments_of(deployment)
            replicas = [self._replica(deployment, arguments) for _ in range(deployment.num_replicas)]
            self._deployments[deployment.name] = Deployment(
                self._loop, replicas, deployment.max_ongoing_requests, deployment.max_queued_requests
            )
        return Handle(self._deployments[deployment.name])

    def _replica(self, deployment: Any, arguments: Any) -> Any:
        # Serve awaits a replica's shutdown; here :meth:`close` does.
        body = type(deployment.name, (deployment.func_or_class,), {"__del__": lambda _: None})
        replica = body.__new__(body)
        # A leader whose gang has failed ends its process.
        replica._exit_soon = lambda: self.failures.append(deployment.name)

        async def make() -> None:
            making = replica.__init__(*arguments)
            if making is not None:
                await making

        self._loop.run(make(), _START_S)
        return replica


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _ends_with_its_client(app: Any) -> Any:
    """Cancel a call whose client disconnects, as Serve does."""

    async def answer(scope: Any, receive: Any, send: Any) -> None:
        messages: asyncio.Queue[Any] = asyncio.Queue(maxsize=1)  # the body is read as the app consumes it

        async def listen() -> None:
            while (message := await receive())["type"] != "http.disconnect":
                await messages.put(message)
            calling.cancel()
            await messages.put(message)

        calling = asyncio.ensure_future(app(scope, messages.get, send))
        listening = asyncio.ensure_future(listen())
        try:
            with suppress(asyncio.CancelledError):
                await calling
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)

    return answer
