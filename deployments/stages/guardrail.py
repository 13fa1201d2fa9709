"""Guardrails: checks prompts before admission, and every decoded frame before it enters a file. Fails closed.

Like NVIDIA's guardrail it leaves the negative prompt, the sound, and a request's image or clip unchecked.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np

from cluster.envelope import TensorEnvelope
from cosmos3_core.media.pixels import Frames
from deployments.config import GuardrailsConfig
from deployments.errors import ContentBlocked, GuardrailUnavailable
from deployments.messages import FrameChunk, FramesChecked, RequestContext, TextChecked
from deployments.observability.logs import watch_stage
from deployments.stages.guardrail_adapter import load_guardrail
from deployments.stages.streams import wait_within
from deployments.threads import exit_soon

logger = logging.getLogger("ray.serve")

_STAGE = "guardrail"
_ROWS = 1
T = TypeVar("T")


class Guardrails:
    """Serve deployment of the guardrail. A replica checks one prompt and one chunk at a time.

    Raises:
        AdapterError: the adapter cannot be used.
    """

    def __init__(self, config: GuardrailsConfig) -> None:
        assert config.adapter is not None, "without an adapter there is no such stage"
        self._adapter = load_guardrail(config.adapter, config.options)
        self._text = _SerialCalls("prompt", config.text_timeout_s)
        self._frames = _SerialCalls("pictures", config.frames_timeout_s)

    async def check_text(self, context: RequestContext, prompt: str) -> AsyncIterator[TextChecked]:
        """Yield one item if the prompt may be used, or raise ContentBlocked.

        Raise GuardrailUnavailable if the adapter fails or takes too long, DeadlineExceeded if the time is up.
        """
        with watch_stage(context, "check text"):
            await self._text.run(context, lambda: self._adapter.check_text(prompt))
        yield TextChecked(os.getpid())

    async def check_frames(
        self, context: RequestContext, chunk: FrameChunk
    ) -> AsyncIterator[FrameChunk | FramesChecked]:
        """Yield the frames that may be shown, as one strip, then their :class:`FramesChecked`.

        Raise ContentBlocked if none of them may be shown, and as :meth:`check_text`.
        """
        with watch_stage(context, "check frames"):
            frames = await self._frames.run(context, lambda: self._check_chunk(chunk))
        yield replace(chunk, strips=(TensorEnvelope.of_array(frames),), axis=_ROWS)
        yield FramesChecked(chunk.index, os.getpid())

    def _check_chunk(self, chunk: FrameChunk) -> Frames:
        frames = chunk.frames().view()
        frames.flags.writeable = False  # concatenated strips would be writable
        checked: Any = self._adapter.check_frames(frames)
        if not isinstance(checked, np.ndarray) or (checked.dtype, checked.shape) != (frames.dtype, frames.shape):
            raise TypeError(f"the adapter gave back {type(checked).__name__}, not uint8 {list(frames.shape)}")
        return checked


class _SerialCalls:
    """Runs calls of the adapter one after the other, in a thread.

    A call that hangs for ``limit_s`` ends the process, because a thread cannot be stopped. Serve then starts another
    replica. Messages name ``what`` is checked.
    """

    def __init__(self, what: str, limit_s: float) -> None:
        self._what = what
        self._limit_s = limit_s
        self._free = asyncio.Lock()

    async def run(self, context: RequestContext, call: Callable[[], T]) -> T:
        """Run a call after the earlier ones, and return its result.

        Raise ContentBlocked as the call does, else GuardrailUnavailable, also if it takes too long.
        """
        loop = asyncio.get_running_loop()
        await wait_within(context, _STAGE, self._free.acquire())
        calling = loop.run_in_executor(None, call)
        hung = loop.call_later(self._limit_s, self._exit_soon)

        def release(calling: asyncio.Future[T]) -> None:
            hung.cancel()
            self._free.release()
            calling.exception()  # marks it as retrieved, so that asyncio does not log it

        # The next call waits for the thread's end, even if this caller has left.
        calling.add_done_callback(release)
        await wait_within(context, _STAGE, asyncio.wait([calling], timeout=self._limit_s))
        if not calling.done():
            raise GuardrailUnavailable(self._what)
        try:
            return await calling
        except ContentBlocked:
            raise ContentBlocked(self._what) from None
        except Exception:  # adapters may raise anything; nothing passes unchecked
            logger.exception("the guardrail's adapter has failed on the %s", self._what)
            raise GuardrailUnavailable(self._what) from None

    def _exit_soon(self) -> None:
        logger.error("the guardrail's adapter has hung on the %s for %g s; ending", self._what, self._limit_s)
        exit_soon()
