"""Exchange of one HTTP request with the Director: submit, follow, cancel."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from cluster.errors import DeadlineExceeded, OverloadedError, StageFailed
from cosmos3_core.request import GenerationRequest
from deployments.failures import translate_error
from deployments.jobs.job import SubmitOptions
from deployments.messages import Accepted, FileStarted, Finished

# Beyond the request's own deadline, which the Director enforces.
_SLACK_S = 15.0
# For the Director to accept or refuse a request: it does so at once, and is back within seconds if it died. A clip is
# probed first, and may wait for others.
_ACCEPT_S = 60.0
_ACCEPT_CLIP_S = 600.0
# Between two tries to enter a full queue.
_LONGEST_PAUSE_S = 5.0

T = TypeVar("T")


class Exchange:
    """The Director's work for one HTTP request; one generation after the other.

    Attributes:
        request_id: the caller's, or made up.
        job_id: of the request that the Director accepted last; "" before.
    """

    def __init__(self, director: Any, request_id: str, timeout_s: float) -> None:
        self.request_id, self.job_id = request_id, ""
        self._director = director
        self._deadline_s = time.monotonic() + timeout_s
        self._events: Any = None

    @classmethod
    @asynccontextmanager
    async def open(cls, director: Any, request_id: str | None, timeout_s: float) -> AsyncIterator[Exchange]:
        """Open an exchange; an error in the ``with`` block stops the stages. A file may still grow after the block.

        The Director enforces ``timeout_s``; here it only ends the wait for a Director that is gone.

        Raises:
            DeadlineExceeded: the block takes too long.
        """
        exchange = cls(director, request_id or uuid.uuid4().hex, timeout_s)
        try:
            async with asyncio.timeout(timeout_s + _SLACK_S):
                yield exchange
        except BaseException as error:
            exchange.cancel()
            if isinstance(error, TimeoutError):
                raise DeadlineExceeded("director", timeout_s) from None
            raise

    async def submit(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float | None = None) -> None:
        """Submit a request to the Director, with a deadline of its own or the app's.

        Raises:
            StageFailed: the Director neither accepts nor refuses it.
            Exception: why the Director refuses it.
        """
        self.cancel()  # releases the stream of the previous request, which has ended
        self._events = self._director.stream.remote(request, options, timeout_s)
        accepted: Accepted = await accept(anext(self._events), accept_limit_s(request))
        self.job_id = accepted.job_id

    async def wait_for_file(self) -> FileStarted | Finished:
        """Wait until the request's file grows, or for its end if it has none; raise what the Director raised."""
        event: FileStarted | Finished = await self._next_of(FileStarted, Finished)
        return event

    async def wait_for_end(self) -> Finished:
        """Wait for the request's end, when the file is whole; raise what the Director raised."""
        event: Finished = await self._next_of(Finished)
        return event

    async def _next_of(self, *kinds: type) -> Any:
        async for event in self._events:
            if isinstance(event, kinds):
                return event
        raise RuntimeError("the Director's stream ended before the request did")

    async def submit_next(self, request: GenerationRequest, options: SubmitOptions) -> Finished:
        """Submit a further request and follow it to its end; wait while the queue is full."""
        while True:
            try:
                await self.submit(request, options, max(self._deadline_s - time.monotonic(), 0.0))
                return await self.wait_for_end()
            except Exception as error:  # the wrapped error decides
                self.cancel()
                reason = translate_error(error, "director")
                if not isinstance(reason, OverloadedError):
                    raise
            await asyncio.sleep(min(reason.retry_after_s, _LONGEST_PAUSE_S))

    def cancel(self) -> None:
        """Stop the stages: a stream that is only dropped runs on."""
        if self._events is not None:
            self._events.cancel()
            self._events = None


def accept_limit_s(request: GenerationRequest | None) -> float:
    """Return how long the Director may take to accept or refuse a request; None stands for a remix."""
    return _ACCEPT_CLIP_S if request is None or request.video is not None else _ACCEPT_S


async def accept(answer: Awaitable[T], limit_s: float) -> T:
    """Return the Director's first answer to a request.

    Raises:
        StageFailed: it does not come in time.
        Exception: why the Director refuses the request.
    """
    try:
        async with asyncio.timeout(limit_s):
            return await answer
    except TimeoutError:
        raise StageFailed("director", 1, f"no word of the request within {limit_s:g} s") from None
