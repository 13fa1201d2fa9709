"""How the Director calls the guardrail. What cannot be looked at does not pass."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import StageFailed
from cosmos3_core.errors import RequestError
from deployments.director.retries import retried
from deployments.errors import GuardrailUnavailable
from deployments.failures import is_lost, is_retryable, translate_error
from deployments.messages import FramesChecked, RequestContext, StageRetried, TextChecked
from deployments.stages.streams import follow_stream, wait_within

_STAGE = "guardrail"
# For a prompt, whose caller waits to be accepted: the second is for a replica that died.
_MAX_TRIES = 2
_RETRY_PAUSE_S = 0.2
# Beside what the adapter may take for a prompt: for others' prompts that are before it, and the way.
_WAIT_S = 10.0
# Prompts that are known to have passed; one takes 100 bytes.
_MAX_PASSED = 10_000


@dataclass(frozen=True)
class PromptCheck:
    """What a request has to go through before it is accepted, whoever asks and however, and a job before it is begun.

    Attributes:
        handle: of the Guardrails deployment, streaming.
        text_timeout_s: that its adapter may take.
        may_be_skipped: whether the operator lets requests do without.
    """

    handle: Any
    text_timeout_s: float
    may_be_skipped: bool
    # By hash. As long as this process lives the adapter is the same: what it has passed it need not see again.
    _passed: OrderedDict[bytes, None] = field(default_factory=OrderedDict, repr=False, compare=False)

    async def check(self, context: RequestContext, prompt: str, *, is_skipped: bool) -> None:
        """Have a prompt looked at, unless the request does without.

        Raises:
            RequestError: the request does without, and may not.
            Cosmos3Error: as :func:`check_prompt`.
        """
        if not is_skipped:
            await check_prompt(self.handle, self.text_timeout_s, context, prompt)
            self._note(prompt)
        elif not self.may_be_skipped:
            hint = "The operator of this service does not let clients turn the guardrails off."
            raise RequestError("skip_guardrails", True, "false", hint)

    async def check_before(
        self, context: RequestContext, max_attempts: int, prompt: str
    ) -> AsyncIterator[StageRetried]:
        """Have the prompt of a job looked at, unless that was done. A guardrail that is not up yet is waited for.

        Args:
            context: of the request.
            max_attempts: tries of a guardrail whose process died.
            prompt: of the job.

        Raises:
            ContentBlocked: it must not be used.
            GuardrailUnavailable, StageFailed: nobody can say so.
            DeadlineExceeded: the request's time is up.
        """

        async def attempt(context: RequestContext) -> AsyncIterator[TextChecked]:
            yield await _text_checked(self.handle, context, prompt)

        if _digest(prompt) in self._passed:
            return
        async for item in retried(_STAGE, context, max_attempts, attempt):
            if isinstance(item, StageRetried):
                yield item
        self._note(prompt)

    def _note(self, prompt: str) -> None:
        self._passed[_digest(prompt)] = None
        if len(self._passed) > _MAX_PASSED:
            self._passed.popitem(last=False)


def _digest(prompt: str) -> bytes:
    return hashlib.sha256(prompt.encode("utf-8", "surrogatepass")).digest()


async def check_prompt(handle: Any, text_timeout_s: float, context: RequestContext, prompt: str) -> None:
    """Have a request's prompt looked at, before the request is accepted. The negative prompt is not.

    Args:
        handle: of the Guardrails deployment, streaming.
        text_timeout_s: that the adapter may take.
        context: of the request.
        prompt: as it was given.

    Raises:
        ContentBlocked: it must not be used.
        GuardrailUnavailable: nobody can say so: the stage is down, fails, or takes too long.
        OverloadedError: its queue is full.
        DeadlineExceeded: the request's time is up.
    """
    limit = asyncio.timeout(text_timeout_s + _WAIT_S)
    try:
        async with limit:
            for num_tries in range(1, _MAX_TRIES + 1):
                try:
                    await _text_checked(handle, context, prompt)
                    return
                except Exception as error:  # noqa: BLE001 - what another process raised can be anything
                    if num_tries == _MAX_TRIES or not is_retryable(error):
                        raise _meaning(error) from None
                await asyncio.sleep(_RETRY_PAUSE_S)
    except TimeoutError:
        if not limit.expired():
            raise
    raise GuardrailUnavailable("prompt")


def _meaning(error: Exception) -> BaseException:
    meaning = translate_error(error, _STAGE)
    return GuardrailUnavailable("prompt") if isinstance(meaning, StageFailed) else meaning


async def _text_checked(handle: Any, context: RequestContext, prompt: str) -> TextChecked:
    async with follow_stream(handle.check_text.remote(context, prompt), context, _STAGE) as stream:
        word = await stream.next_value()
        if not isinstance(word, TextChecked):
            raise GuardrailUnavailable("prompt")
        return word


@dataclass(frozen=True)
class Passed:
    """A chunk that may be shown.

    Attributes:
        ref: to it.
    """

    ref: Any


async def passed_chunk(
    handle: Any, context: RequestContext, max_attempts: int, chunk_ref: Any
) -> AsyncIterator[StageRetried | Passed]:
    """Have a chunk of frames looked at; :class:`Passed` is the last item.

    Args:
        handle: of the Guardrails deployment, streaming.
        context: of the request.
        max_attempts: tries of a guardrail whose process died.
        chunk_ref: to the chunk.

    Raises:
        ContentBlocked: it must not be used.
        GuardrailUnavailable, StageFailed: nobody can say so.
        DeadlineExceeded: the request's time is up.
        ObjectLostError: the chunk is gone, and has to be made anew.
    """

    async def attempt(context: RequestContext) -> AsyncIterator[Passed]:
        try:
            yield Passed(await _frames_checked(handle, context, chunk_ref))
        except Exception as error:
            if is_lost(error):
                raise _ChunkLost(error) from error
            raise

    try:
        async for item in retried(_STAGE, context, max_attempts, attempt):
            yield item
    except _ChunkLost as error:
        raise error.reason from None


async def _frames_checked(handle: Any, context: RequestContext, chunk_ref: Any) -> Any:
    async with follow_stream(handle.check_frames.remote(context, chunk_ref), context, _STAGE) as stream:
        checked_ref = await stream.next_ref()
        # What comes in the place of a chunk may be the error that the stage has died of; its word comes behind it.
        if isinstance(await stream.next_value(), FramesChecked):
            return checked_ref
        if checked_ref is not None:
            await wait_within(context, _STAGE, checked_ref)
        raise StageFailed(_STAGE, context.attempt, "the stream ended without checked frames")


class _ChunkLost(Exception):
    """Not to be tried again here: what was to be looked at is gone."""

    def __init__(self, reason: Exception) -> None:
        self.reason = reason
