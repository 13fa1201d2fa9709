"""Log and measure each stage of a request. :mod:`cluster.logs` says where the log lines go."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, contextmanager

from cluster.errors import OverloadedError
from cluster.events import Event
from cluster.logs import LogOrigin, Value, log_event, log_failure
from deployments import messages
from deployments.failures import unwrap_error
from deployments.messages import RequestContext
from deployments.observability import metrics as table
from deployments.observability.metrics import metrics

logger = logging.getLogger("ray.serve")


def make_origin(context: RequestContext) -> LogOrigin:
    """Return the ids that log lines of a request carry."""
    return LogOrigin(context.request_id, context.job_id, context.attempt)


class StageWatch:
    """One attempt of a stage, logged and measured; made by :func:`watch_stage`."""

    def __init__(self, context: RequestContext, stage: str, **fields: Value) -> None:
        self._origin = make_origin(context)
        self._stage = stage
        self._start_s = time.monotonic()
        self._has_ended = False
        log_event(logger, "stage began", self._origin, stage=stage, **fields)

    def finish(self, **fields: Value) -> None:
        """Record that the stage is done. Call it before the last item is yielded: its consumer may not come back."""
        seconds = self._end("finished")
        if seconds is not None:
            log_event(logger, "stage finished", self._origin, stage=self._stage, seconds=seconds, **fields)

    def fail(self, error: BaseException) -> None:
        """Record that an exception ended the stage."""
        error = unwrap_error(error)
        is_failure = isinstance(error, Exception)
        # A full queue is no failure: the caller waits for it. A cancelled task or a closed generator counts as left.
        outcome = "full" if isinstance(error, OverloadedError) else "failed" if is_failure else "left"
        seconds = self._end(outcome)
        if seconds is None:
            return
        if outcome == "failed":
            log_failure(logger, "stage failed", self._origin, error, stage=self._stage, seconds=seconds)
        else:
            log_event(logger, f"stage {outcome}", self._origin, stage=self._stage, seconds=seconds)

    def _end(self, outcome: str) -> float | None:
        """Return the seconds that the stage took; None if it had ended before."""
        if self._has_ended:
            return None
        self._has_ended = True
        seconds = time.monotonic() - self._start_s
        metrics().record(table.STAGE_SECONDS, seconds, self._stage, outcome)
        return seconds


@contextmanager
def watch_stage(context: RequestContext, stage: str, **fields: Value) -> Iterator[StageWatch]:
    """Log the begin and the end of one attempt of a stage, and measure its seconds, in the process that does the work.

    The outcome is "finished" once :meth:`StageWatch.finish` was called or the block has ended, "left" when the caller
    has cancelled the stage.
    """
    watch = StageWatch(context, stage, **fields)
    try:
        yield watch
    except BaseException as error:
        watch.fail(error)
        raise
    watch.finish()


async def watch_request(
    events: AsyncIterator[Event], context: RequestContext, mode: str, waited_s: float = 0.0
) -> AsyncGenerator[Event, None]:
    """Pass a request's events on, and log and measure them; ``waited_s`` is the time since its admission."""
    origin, start_s = make_origin(context), time.monotonic()
    denoised_s: float | None = None
    has_frames = False
    with watch_stage(context, "request", mode=mode, waited_s=waited_s) as watch:
        async with aclosing(events) as stream:  # type: ignore[type-var] # it is an async generator
            async for event in stream:
                now_s = time.monotonic()
                match event:
                    case messages.LatentsReady():
                        denoised_s = now_s
                    case messages.ChunkDecoded() if denoised_s is not None:
                        metrics().record(table.FIRST_CHUNK_SECONDS, now_s - denoised_s)
                        denoised_s = None
                    case messages.ChunkEncoded() if not has_frames:
                        has_frames = True
                        metrics().record(table.FIRST_BYTE_SECONDS, waited_s + now_s - start_s, mode)
                    case messages.ClipEncoded():
                        metrics().record(table.FILE_BYTES, event.num_bytes, mode)
                    case messages.StageRetried():
                        metrics().record(table.STAGE_RETRIES, 1, event.stage)
                        about: dict[str, Value] = {"stage": event.stage, "next_attempt": event.attempt}
                        about |= {"reason": event.reason, "from_step": event.from_step}
                        log_event(logger, "stage retried", origin, logging.WARNING, **about)
                    case messages.Finished():
                        watch.finish(mode=mode, num_bytes=event.num_bytes, num_frames=event.num_frames)
                yield event
