"""Retry a stage whose process died, and wait for a full one."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster.errors import GangFailed, GangLost, OverloadedError, StageFailed
from deployments.failures import is_retryable, is_unavailable, summarize_error, translate_error
from deployments.messages import RequestContext, StageRetried

# Before the first retry: a dead replica stays in the routers' tables for a moment. Each further pause is longer, up to
# the time that a replica takes to start: one that is on a dying node may be tried again and again until then.
_RETRY_PAUSE_S, _PAUSE_GROWTH, _LONGEST_RETRY_PAUSE_S = 0.2, 10.0, 10.0
_LONGEST_WAIT_S = 2.0
# Tries that reach nobody do not count for so long: routers learn that a node is gone only after a while.
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

    A dead process is retried with the same seed, after pauses that grow.

    Args:
        max_attempts: attempts in all; waits for a full stage do not count, nor tries that reach no process at first.
        attempt: runs the stage once.
        num_saved_steps: steps after which the next attempt resumes, for :class:`StageRetried`.
        waits_when_full: whether to wait for a full stage, because an admitted request is never rejected.

    Raises:
        GangFailed, StageFailed: the attempts are used up.
        DeadlineExceeded: the request's time is up.
        Exception: as the stage raised, if a retry cannot help.
    """
    num_attempts, num_losses, first_loss_s = 1, 0, math.inf
    while True:
        try:
            async for item in attempt(context):
                yield item
            return
        except Exception as error:  # noqa: BLE001 - another process may raise anything
            meaning = translate_error(error, stage)
            if isinstance(meaning, OverloadedError) and waits_when_full:
                event = None
                pause_s = min(max(meaning.retry_after_s, _RETRY_PAUSE_S), _LONGEST_WAIT_S)
            elif not is_retryable(error):
                raise meaning from None
            else:
                first_loss_s = min(first_loss_s, time.monotonic())
                is_early = is_unavailable(error) and time.monotonic() < first_loss_s + _UNAVAILABLE_S
                if not isinstance(meaning, GangLost) and not is_early:  # GangLost: another request caused it
                    num_attempts += 1
                if num_attempts > max_attempts:
                    if isinstance(meaning, GangFailed):
                        raise meaning from None  # it names the phase and the rank
                    raise StageFailed(stage, max_attempts, summarize_error(error)) from None
                pause_s = min(_RETRY_PAUSE_S * _PAUSE_GROWTH**num_losses, _LONGEST_RETRY_PAUSE_S)
                num_losses += 1
                event = StageRetried(stage, context.attempt + 1, summarize_error(error), num_saved_steps())
        if event is not None:
            yield event
        context = context.next_attempt()
        await asyncio.sleep(min(pause_s, context.remaining_s(stage)))
