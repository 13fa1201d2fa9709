"""A Director by its bare handle, on Ray or in process: every internal message, with process ids."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from cluster.errors import DeadlineExceeded
from cosmos3_core.request import GenerationRequest
from deployments.clients.blocking import LoopThread
from deployments.failures import translate_error
from deployments.jobs.job import SubmitOptions
from deployments.messages import Event, Generated, RequestContext
from deployments.stages.streams import RefStream

DEFAULT_TIMEOUT_S = 3600.0
# The Director enforces deadlines; this one is for a dead Director.
_SLACK_S = 30.0
_PART_BYTES = 1 << 20


class DirectorClient:
    """Calls a Director's methods and waits for the answers.

    Args:
        handle: of the Director deployment.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._loop = LoopThread()

    def generate(self, request: GenerationRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Generated:
        """Serve a request and wait for its file."""
        generated: Generated = self.ask("generate", request.packed(), SubmitOptions(), timeout_s, limit_s=timeout_s)
        return generated

    def stream(
        self, request: GenerationRequest, *, timeout_s: float = DEFAULT_TIMEOUT_S, previews: int = 0
    ) -> EventStream:
        """Serve a request and follow it."""
        packed, options = request.packed(), SubmitOptions(previews=previews)

        async def begin() -> Any:
            return self._streaming.stream.remote(packed, options, timeout_s)

        return EventStream(self._loop, self._loop.run(begin()), timeout_s)

    def read(self, job_id: str) -> Iterator[bytes]:
        """Read a finished file in parts."""
        start = 0
        while part := self.ask("read", job_id, start, _PART_BYTES):
            yield part
            start += len(part)

    def ask(self, method: str, *arguments: Any, limit_s: float = DEFAULT_TIMEOUT_S) -> Any:
        """Call a method of the Director."""

        async def answer() -> Any:
            response = getattr(self._handle, method).remote(*arguments)
            try:
                async with asyncio.timeout(limit_s + _SLACK_S):
                    return await response
            finally:
                response.cancel()

        try:
            return self._loop.run(answer())
        except TimeoutError:
            raise DeadlineExceeded("director", limit_s) from None
        except Exception as error:  # noqa: BLE001 - told apart by what it wraps
            raise translate_error(error, "director") from None


class EventStream:
    """An iterator of messages. Closing it, leaving its ``with`` block, or dropping it stops the work of every stage."""

    def __init__(self, loop: LoopThread, response: Any, timeout_s: float) -> None:
        self._loop, self._has_ended = loop, False
        self._stream = RefStream(response, RequestContext.new(None, timeout_s + _SLACK_S), "director")

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        try:
            event: Event | None = self._loop.run(self._stream.next_value())
        except Exception as error:  # noqa: BLE001 - told apart by what it wraps
            raise translate_error(error, "director") from None
        if event is None:
            self._has_ended = True
            raise StopIteration
        return event

    def close(self) -> None:
        """Stop. Does nothing once the stream has ended."""
        if not self._has_ended:
            self._has_ended = True
            self._loop.run(self._cancel())

    async def _cancel(self) -> None:
        self._stream.cancel()

    def __enter__(self) -> EventStream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __del__(self) -> None:
        # Serve does not stop a stream whose response is dropped. The app may be gone by now, and the stream with it.
        with contextlib.suppress(Exception):
            self.close()


def connect(app_name: str) -> DirectorClient:
    """Connect to the Director of an app that runs in the Ray cluster which this process has joined."""
    from ray import serve

    return DirectorClient(serve.get_deployment_handle("Director", app_name=app_name))
