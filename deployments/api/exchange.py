"""Exchange of one HTTP request with the Director: submit, follow, cancel."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.responses import Response

from cluster.errors import DeadlineExceeded, OverloadedError, StageFailed
from cosmos3_core.request import GenerationRequest
from deployments.failures import translate_error
from deployments.jobs.job import SubmitOptions
from deployments.messages import Accepted, FileStarted, Finished

# Beyond the request's own deadline, which the Director keeps.
_SLACK_S = 15.0
# Until the Director says that it has a request, or why not: at once, and a dead one is back within seconds; but for a
# clip, which is looked at first, and may wait for others.
_ACCEPT_S = 60.0
_ACCEPT_CLIP_S = 600.0
# Between two tries for a place.
_LONGEST_PAUSE_S = 5.0


class Exchange:
    """The Director's work for one HTTP request; one generation after the other.

    Args:
        director: its handle, streaming.
        request_id: the caller's, or made up.
        timeout_s: for all of it.

    Attributes:
        job_id: of the request that the Director took last; "" before.
    """

    def __init__(self, director: Any, request_id: str, timeout_s: float) -> None:
        self.request_id = request_id
        self._director = director
        self._deadline_s = time.monotonic() + timeout_s
        self._events: Any = None
        self.job_id = ""

    async def ask(self, request: GenerationRequest, options: SubmitOptions, timeout_s: float | None = None) -> None:
        """Submit a request to the Director.

        Args:
            request: what is asked for.
            asked: how.
            timeout_s: None for the app's own.

        Raises:
            StageFailed: no word of it.
            Exception: why it does not.
        """
        self.cancel()  # the last one has ended; Serve is told so
        self._events = self._director.stream.remote(request, options, timeout_s)
        limit_s = accept_limit_s(request)
        try:
            async with asyncio.timeout(limit_s):
                accepted: Accepted = await anext(self._events)  # or why it is not
        except TimeoutError:
            raise StageFailed("director", 1, f"no word of the request within {limit_s:g} s") from None
        self.job_id = accepted.job_id

    async def started(self) -> FileStarted | Finished:
        """Follow the request until its file grows; to its end where it has none.

        Raises:
            Exception: whatever the Director raised.
        """
        event: FileStarted | Finished = await self._first(FileStarted, Finished)
        return event

    async def finished(self) -> Finished:
        """Follow the request to its end: the file is whole.

        Raises:
            Exception: whatever the Director raised.
        """
        event: Finished = await self._first(Finished)
        return event

    async def _first(self, *kinds: type) -> Any:
        async for event in self._events:
            if isinstance(event, kinds):
                return event
        raise RuntimeError("the Director's stream ended before the request did")

    async def asked_again(self, request: GenerationRequest, options: SubmitOptions) -> Finished:
        """Submit a further request of the same exchange and follow it to its end; a full queue is waited out.

        Raises:
            Exception: as there.
        """
        while True:
            try:
                await self.ask(request, options, max(self._deadline_s - time.monotonic(), 0.0))
                return await self.finished()
            except Exception as error:  # told apart by what it wraps
                self.cancel()
                reason = translate_error(error, "director")
                if not isinstance(reason, OverloadedError):
                    raise
            await asyncio.sleep(min(reason.retry_after_s, _LONGEST_PAUSE_S))

    def cancel(self) -> None:
        """Stop the stages. A stream that is only dropped runs on."""
        if self._events is not None:
            self._events.cancel()
            self._events = None


def accept_limit_s(request: GenerationRequest | None) -> float:
    """Return how long the Director may take to accept or refuse a request; None: one that it has already."""
    return _ACCEPT_CLIP_S if request is None or request.video is not None else _ACCEPT_S


async def answered(
    director: Any, request_id: str | None, timeout_s: float, work: Callable[[Exchange], Awaitable[Response]]
) -> Response:
    """Return the answer that some work makes; whatever stops it, stops the stages.

    Args:
        director: its handle, streaming.
        request_id: the caller's; None: one is made up.
        timeout_s: of the request. The Director keeps it; here it is for one that is gone.
        work: makes the answer; a file may still be on its way in it.

    Raises:
        DeadlineExceeded: it takes too long.
        Exception: whatever the work raises.
    """
    exchange = Exchange(director, request_id or uuid.uuid4().hex, timeout_s)
    try:
        async with asyncio.timeout(timeout_s + _SLACK_S):
            return await work(exchange)
    except TimeoutError:
        exchange.cancel()
        raise DeadlineExceeded("director", timeout_s) from None
    except BaseException:
        exchange.cancel()
        raise
