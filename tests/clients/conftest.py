"""The four clients - for threads or an event loop, over HTTP or handles - in front of one app, under one face.

Tests call the blocking interface; the asynchronous client runs in a loop that each call starts and stops.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import httpx2
import pytest

from deployments.client import AsyncCosmos3Client, Connecting, Cosmos3Client, Patience
from deployments.clients.handle_transport import HandleTransport
from deployments.clients.http_transport import HttpTransport
from deployments.clients.transport import AsyncVideoStream, Transport
from tests.clients.app_double import App

QUICK = Patience(first_pause_s=0.001, max_pause_s=0.002)
CALL_S = 30.0


class InLoop:
    """An asynchronous client behind the blocking interface."""

    def __init__(self, client: AsyncCosmos3Client) -> None:
        self._client = client
        self._runner = asyncio.Runner()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            result = getattr(self._client, name)(*arguments, **options)
            if inspect.iscoroutine(result):
                result = self._runner.run(result)
            if isinstance(result, AsyncVideoStream | AsyncIterator):
                return BlockingIterator(self._runner, result)
            return result

        return call

    def close(self) -> None:
        self._runner.run(self._client.aclose())
        self._runner.close()


class BlockingIterator:
    """An asynchronous iterator behind the blocking interface."""

    def __init__(self, runner: asyncio.Runner, items: Any) -> None:
        self._runner, self._items = runner, items
        self.video_id = getattr(items, "video_id", None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        async def item() -> Any:
            return await anext(self._items)

        try:
            return self._runner.run(item())
        except StopAsyncIteration:
            raise StopIteration from None

    def close(self) -> None:
        self._runner.run(self._items.aclose())

    def __enter__(self) -> BlockingIterator:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@pytest.fixture
def app() -> App:
    return App()


@pytest.fixture(params=["http", "handle"])
def transport(request: pytest.FixtureRequest) -> str:
    """The kind of transport to the app."""
    return str(request.param)


@pytest.fixture(params=["blocking", "async"])
def client(request: pytest.FixtureRequest, transport: str, app: App) -> Iterator[Any]:
    """One of the four clients."""
    connected = connect_to(app, transport, QUICK)
    client = Cosmos3Client(connected) if request.param == "blocking" else InLoop(connected)
    yield client
    client.close()


def connect_to(app: App, kind: str, patience: Patience = QUICK, api_key: str | None = None) -> AsyncCosmos3Client:
    """Make an asynchronous client of the app."""
    transport: Transport
    if kind == "http":
        connecting = Connecting(transport=httpx2.MockTransport(app))
        transport = HttpTransport("http://app.test/", api_key, CALL_S, connecting)
    else:
        transport = HandleTransport(app.director, CALL_S)
    return AsyncCosmos3Client(transport, patience)
