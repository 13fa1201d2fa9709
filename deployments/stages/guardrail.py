"""Guardrails: looks at prompts before they are accepted, and at pictures before they are in a file. Fails closed.

Looked at are the prompt, not the negative one, and every decoded frame, not the sound; an image or clip that a request
gives is not, beyond what is made of it. So it is with NVIDIA.
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
from deployments import service_config
from deployments.errors import ContentBlocked, GuardrailUnavailable
from deployments.messages import FrameChunk, FramesChecked, RequestContext, TextChecked
from deployments.observability.logs import watch_stage
from deployments.stages.guardrail_adapter import load_guardrail
from deployments.stages.streams import wait_within

logger = logging.getLogger("ray.serve")

_STAGE = "guardrail"
_ROWS = 1
# Long enough for the failure to reach its caller before the process ends.
_LAST_WORDS_S = 0.2
T = TypeVar("T")


class Guardrails:
    """The stage. One prompt and one chunk are looked at at a time; more of them take more replicas.

    Args:
        config: the adapter, its options, and how long it may take.

    Raises:
        AdapterError: the adapter cannot be used.
    """

    def __init__(self, config: service_config.GuardrailsConfig) -> None:
        assert config.adapter is not None, "without an adapter there is no such stage"
        self._adapter = load_guardrail(config.adapter, config.options)
        self._text = _Turn("prompt", config.text_timeout_s)
        self._frames = _Turn("pictures", config.frames_timeout_s)

    async def check_text(self, context: RequestContext, prompt: str) -> AsyncIterator[TextChecked]:
        """One item where the prompt may be used.

        Raises:
            ContentBlocked: it must not.
            GuardrailUnavailable: the adapter has failed, or takes too long.
            DeadlineExceeded: the request's time is up.
        """
        with watch_stage(context, "check text"):
            await self._text.take(context, lambda: self._adapter.check_text(prompt))
        yield TextChecked(os.getpid())

    async def check_frames(
        self, context: RequestContext, chunk: FrameChunk
    ) -> AsyncIterator[FrameChunk | FramesChecked]:
        """What may be shown of a chunk, as one strip, then its :class:`FramesChecked`.

        Raises:
            ContentBlocked: nothing may.
            GuardrailUnavailable: the adapter has failed, or takes too long.
            DeadlineExceeded: the request's time is up.
        """
        with watch_stage(context, "check frames"):
            frames = await self._frames.take(context, lambda: self._checked(chunk))
        yield replace(chunk, strips=(TensorEnvelope.of_array(frames),), axis=_ROWS)
        yield FramesChecked(chunk.index, os.getpid())

    def _checked(self, chunk: FrameChunk) -> Frames:
        frames = chunk.frames().view()
        frames.flags.writeable = False  # also where they are of several strips, and memory of their own
        checked: Any = self._adapter.check_frames(frames)
        if not isinstance(checked, np.ndarray) or (checked.dtype, checked.shape) != (frames.dtype, frames.shape):
            raise TypeError(f"the adapter gave back {type(checked).__name__}, not uint8 {list(frames.shape)}")
        return checked


class _Turn:
    """One call of the adapter after the other, in a thread. A call that hangs ends the process: no thread can be
    stopped, and Serve puts another process in the place of this one.

    Args:
        what: is looked at.
        limit_s: for one call.
    """

    def __init__(self, what: str, limit_s: float) -> None:
        self._what = what
        self._limit_s = limit_s
        self._free = asyncio.Lock()

    async def take(self, context: RequestContext, call: Callable[[], T]) -> T:
        """What the call returns.

        Raises:
            ContentBlocked: the call has raised it.
            GuardrailUnavailable: it has raised something else, or takes too long.
            DeadlineExceeded: the request's time is up.
        """
        loop = asyncio.get_running_loop()
        await wait_within(context, _STAGE, self._free.acquire())
        calling = loop.run_in_executor(None, call)
        hung = loop.call_later(self._limit_s, self._end_soon)

        def done(calling: asyncio.Future[T]) -> None:
            hung.cancel()
            self._free.release()
            calling.exception()  # or it would be reported as one that nobody asked for

        # The turn is over when the thread is, not when its caller has left.
        calling.add_done_callback(done)
        await wait_within(context, _STAGE, asyncio.wait([calling], timeout=self._limit_s))
        if not calling.done():
            raise GuardrailUnavailable(self._what)
        try:
            return await calling
        except ContentBlocked:
            raise ContentBlocked(self._what) from None
        except Exception:  # whatever an adapter raises, nothing passes
            logger.exception("the guardrail's adapter has failed on the %s", self._what)
            raise GuardrailUnavailable(self._what) from None

    def _end_soon(self) -> None:
        logger.error("the guardrail's adapter has hung on the %s for %g s; ending", self._what, self._limit_s)
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, os._exit, 1)
