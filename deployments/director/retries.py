"""A stage is tried again when its process died, and waited for when it is full."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any

from cluster.errors import GangFailed, GangLost, OverloadedError, StageFailed
from deployments.failures import is_retryable, summarize_error, translate_error
from deployments.messages import RequestContext, StageRetried

# Before a stage is tried again: a dead replica is still in the routers' tables for a moment.
_RETRY_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0


async def retried(
    stage: str,
    context: RequestContext,
    max_attempts: int,
    attempt: Callable[[RequestContext], AsyncIterator[Any]],
    done_steps: Callable[[], int] = lambda: 0,
) -> AsyncIterator[Any]:
    """Run a stage until it succeeds or fails for good.

    Deaths are retried with the same seed. A stage that is full is waited for: a request that was accepted is not
    refused any more.

    Args:
        stage: for messages.
        context: of the first try.
        max_attempts: tries that may be a death's.
        attempt: a try; its items are handed on as they come.
        done_steps: how many steps the next try need not do again, for :class:`StageRetried`.

    Raises:
        GangFailed, StageFailed: the tries are used up.
        DeadlineExceeded: the request's time is up.
        Exception: what trying again cannot help.
    """
    num_tries = 1
    while True:
        pause_s = _RETRY_PAUSE_S
        try:
            async for item in attempt(context):
                yield item
            return
        except Exception as error:  # noqa: BLE001 - what another process raised can be anything
            meaning = translate_error(error, stage)
            if isinstance(meaning, OverloadedError):
                event = None
                pause_s = min(max(meaning.retry_after_s, _RETRY_PAUSE_S), _LONGEST_PAUSE_S)
            elif not is_retryable(error):
                raise meaning from None
            else:
                if not isinstance(meaning, GangLost):  # else the fault was another request's
                    num_tries += 1
                if num_tries > max_attempts:
                    if isinstance(meaning, GangFailed):
                        raise meaning from None  # says more: the phase and the rank
                    raise StageFailed(stage, max_attempts, summarize_error(error)) from None
                event = StageRetried(stage, context.attempt + 1, summarize_error(error), done_steps())
        if event is not None:
            yield event
        context = context.retried()
        await asyncio.sleep(min(pause_s, context.remaining_s(stage)))
