"""The Director's calls to the guardrail: a prompt or chunk that cannot be checked does not pass."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import StageFailed
from cosmos3_core.errors import RequestError
from deployments.director.retries import retry_stage
from deployments.errors import GuardrailUnavailable
from deployments.failures import is_lost
from deployments.messages import FramesChecked, RequestContext, StageFull, StageRetried, TextChecked
from deployments.stages.streams import follow_stream, wait_within

_STAGE = "guardrail"
_Wait = StageRetried | StageFull
# For a prompt whose caller waits for admission; the second attempt covers a dead replica.
_MAX_ATTEMPTS = 2
# On top of the adapter's own timeout, for prompts ahead in its queue and for the call itself.
_WAIT_S = 10.0
# Bound of the cache of passed prompts; one takes 100 bytes.
_MAX_PASSED = 10_000


@dataclass(frozen=True)
class PromptCheck:
    """Checks the prompt of a request, not its negative prompt: at admission, and again before its pipeline starts.

    Attributes:
        handle: streaming handle of the Guardrails deployment.
        may_be_skipped: whether the operator lets requests skip the guardrail.
    """

    handle: Any
    text_timeout_s: float
    may_be_skipped: bool
    # Hashes of passed prompts, which need no second check: the adapter is the same as long as this process lives.
    _passed: OrderedDict[bytes, None] = field(default_factory=OrderedDict, repr=False, compare=False)

    async def check_at_admission(self, context: RequestContext, prompt: str, *, is_skipped: bool) -> None:
        """Check a prompt before admission, unless the request skips the guardrail.

        Raises:
            RequestError: the request must not skip the guardrail.
            ContentBlocked: the prompt must not be used.
            GuardrailUnavailable: the stage is down, fails, or takes too long.
            OverloadedError: the stage's queue is full.
            DeadlineExceeded: the request's time is up.
        """
        if is_skipped:
            if not self.may_be_skipped:
                hint = "The operator of this service does not let clients turn the guardrails off."
                raise RequestError("skip_guardrails", True, "false", hint)
            return
        limit = asyncio.timeout(self.text_timeout_s + _WAIT_S)
        try:
            async with limit:
                # Retries a dead replica, but does not wait for a full stage: the caller can come again.
                async for _ in self._check(context, _MAX_ATTEMPTS, prompt, waits_when_full=False):
                    pass
        except TimeoutError:
            if not limit.expired():
                raise
            raise GuardrailUnavailable("prompt") from None
        except StageFailed:
            raise GuardrailUnavailable("prompt") from None

    async def check_job(self, context: RequestContext, max_attempts: int, prompt: str) -> AsyncIterator[_Wait]:
        """Check a job's prompt unless this process has done so; wait for a guardrail that is not up yet.

        Raise as :meth:`check_at_admission`, and StageFailed if the attempts are used up.
        """
        if _digest(prompt) not in self._passed:
            async for item in self._check(context, max_attempts, prompt):
                if not isinstance(item, TextChecked):
                    yield item

    async def _check(
        self, context: RequestContext, max_attempts: int, prompt: str, *, waits_when_full: bool = True
    ) -> AsyncIterator[_Wait | TextChecked]:
        async def attempt(context: RequestContext) -> AsyncIterator[TextChecked]:
            yield await self._check_once(context, prompt)

        async for item in retry_stage(_STAGE, context, max_attempts, attempt, waits_when_full=waits_when_full):
            yield item
        self._passed[_digest(prompt)] = None
        if len(self._passed) > _MAX_PASSED:
            self._passed.popitem(last=False)

    async def _check_once(self, context: RequestContext, prompt: str) -> TextChecked:
        async with follow_stream(self.handle.check_text.remote(context, prompt), context, _STAGE) as stream:
            checked = await stream.next_value()
            if not isinstance(checked, TextChecked):
                raise GuardrailUnavailable("prompt")
            return checked


def _digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True)
class PassedChunk:
    """Reference to a chunk that may be shown."""

    ref: Any


async def check_chunk(
    handle: Any, context: RequestContext, max_attempts: int, chunk_ref: Any
) -> AsyncIterator[_Wait | PassedChunk]:
    """Check a chunk of frames with the Guardrails deployment; :class:`PassedChunk` is the last item.

    Raises:
        ContentBlocked: the frames must not be shown.
        GuardrailUnavailable, StageFailed: the guardrail cannot check them.
        DeadlineExceeded: the request's time is up.
        ObjectLostError: the chunk is lost and must be decoded again.
    """

    async def attempt(context: RequestContext) -> AsyncIterator[PassedChunk]:
        try:
            yield PassedChunk(await _check_frames_once(handle, context, chunk_ref))
        except Exception as error:
            if is_lost(error):
                raise _ChunkLost(error) from error
            raise

    try:
        async for item in retry_stage(_STAGE, context, max_attempts, attempt):
            yield item
    except _ChunkLost as error:
        raise error.reason from None


async def _check_frames_once(handle: Any, context: RequestContext, chunk_ref: Any) -> Any:
    async with follow_stream(handle.check_frames.remote(context, chunk_ref), context, _STAGE) as stream:
        checked_ref = await stream.next_ref()
        # A dying stage may leave its error in the chunk's place; FramesChecked follows only a real chunk.
        if isinstance(await stream.next_value(), FramesChecked):
            return checked_ref
        if checked_ref is not None:
            await wait_within(context, _STAGE, checked_ref)
        raise StageFailed(_STAGE, context.attempt, "the stream ended without checked frames")


class _ChunkLost(Exception):
    """The chunk to check is lost; a retry here cannot help."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason
