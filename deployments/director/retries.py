"""Run a stage again if its process died, and wait while it is full."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster.errors import GangFailed, GangLost, OverloadedError, StageFailed
from deployments.failures import is_retryable, is_unavailable, summarize_error, translate_error
from deployments.messages import RequestContext, StageFull, StageRetried

# Pause before the first retry, as routers keep a dead replica for a moment. Each further pause is this many times as
# long, up to the time that a replica takes to start.
_RETRY_PAUSE_S, _PAUSE_GROWTH, _LONGEST_RETRY_PAUSE_S = 0.2, 10.0, 10.0
_LONGEST_WAIT_S = 2.0
# Attempts that reach no process do not count for this long after the first failure: routers learn late that a node is
# gone.
_UNAVAILABLE_S = 30.0


async def retry_stage(
    stage: str,
    context: RequestContext,
    max_attempts: int,
    attempt: Callable[[RequestContext], AsyncIterator[Any]],
    num_saved_steps: Callable[[], int] = lambda: 0,
    *,
    waits_when_full: bool = True,
) -> AsyncIterator[Any]:
    """Run a stage until it succeeds or fails for good; yield its items.

    A stage whose process died is run again on another one with the same seed, after pauses that grow.

    Yields :class:`StageRetried` and :class:`StageFull` as well.

    Args:
        max_attempts: attempts in all; waits for a full stage do not count, nor do early ones that reach no process.
        attempt: runs the stage once.
        num_saved_steps: steps after which the next attempt resumes, for :class:`StageRetried`.
        waits_when_full: whether to wait for a full stage, because an admitted request is never rejected.

    Raises:
        GangFailed, StageFailed: the attempts are used up.
        DeadlineExceeded: the request's time is up.
        Exception: as the stage raised, if a retry cannot help.
    """
    num_attempts, next_pause_s, first_failure_s = 1, _RETRY_PAUSE_S, math.inf
    while True:
        try:
            async for item in attempt(context):
                yield item
            return
        except Exception as error:  # noqa: BLE001 - another process may raise anything
            meaning = translate_error(error, stage)
            if isinstance(meaning, OverloadedError) and waits_when_full:
                event: StageFull | StageRetried = StageFull(stage)
                pause_s = min(max(meaning.retry_after_s, _RETRY_PAUSE_S), _LONGEST_WAIT_S)
            elif not is_retryable(error):
                raise meaning from None
            else:
                first_failure_s = min(first_failure_s, time.monotonic())
                is_early = is_unavailable(error) and time.monotonic() < first_failure_s + _UNAVAILABLE_S
                if not isinstance(meaning, GangLost) and not is_early:  # GangLost: another request caused it
                    num_attempts += 1
                if num_attempts > max_attempts:
                    if isinstance(meaning, GangFailed):
                        raise meaning from None  # it names the phase and the rank
                    raise StageFailed(stage, max_attempts, summarize_error(error)) from None
                pause_s = next_pause_s
                next_pause_s = min(_PAUSE_GROWTH * pause_s, _LONGEST_RETRY_PAUSE_S)
                event = StageRetried(stage, context.attempt + 1, summarize_error(error), num_saved_steps())
        yield event
        context = context.next_attempt()
        await asyncio.sleep(min(pause_s, context.remaining_s(stage)))
