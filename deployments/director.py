"""Director: takes a request, checks it, and walks it through the stages. Sees neither tensors nor frames."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from cluster.clip_stream import start_clip_streams
from cluster.errors import OverloadedError, ShuttingDown
from cosmos3_core import checks
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import GenerationRequest
from deployments.clip_closer import ClipCloser
from deployments.media_store import MediaSpec
from deployments.messages import Event, Finished, Generated, RequestContext
from deployments.previews import Previews
from deployments.request_check import RequestCheck
from deployments.walk import Stages, Walk

_FIRST_GUESS_S = 5.0  # for Retry-After, until a request has been timed
MAX_PART_BYTES = 4 * 2**20
_RESTART_S = 30.0  # what a restart of the app takes, about


class Director:
    """See the module.

    Args:
        checkpoint: the checkpoint's directory.
        max_requests: requests at once; one more is refused.
        max_attempts: tries of a stage whose process died.
        chunk_window: decoded chunks of a clip that may exist before they are encoded.
        request_timeout_s: of requests that name none.
        media: of the store where files go.
        tokenizer, ..., audio: handles of the stages; the last two if there are such.
    """

    def __init__(
        self,
        checkpoint: str,
        max_requests: int,
        max_attempts: int,
        chunk_window: int,
        request_timeout_s: float,
        media: MediaSpec,
        tokenizer: Any,
        transformer: Any,
        vae: Any,
        encoder: Any,
        unguided: Any = None,
        audio: Any = None,
    ) -> None:
        self._layout = CheckpointLayout.open(checkpoint)
        self._max_requests = max_requests
        self._max_attempts = max_attempts
        self._chunk_window = chunk_window
        self._request_timeout_s = request_timeout_s
        self._media = media.open()
        # Configured once: every differently configured handle has a router of its own.
        streaming = (handle and handle.options(stream=True) for handle in (transformer, vae, encoder, unguided, audio))
        self._stages = Stages(tokenizer, *streaming)
        self._clips = start_clip_streams(max_clips=4 * max_requests)
        self._closer = ClipCloser(self._clips)
        self._previews = Previews(self._stages.vae)
        self._check = RequestCheck(self._layout, is_sound_offered=audio is not None)
        self._num_requests = 0
        self._is_draining = False
        self._seconds_per_request = _FIRST_GUESS_S

    async def stream(
        self,
        request: GenerationRequest,
        request_id: str | None = None,
        timeout_s: float | None = None,
        previews: int = 0,
    ) -> AsyncIterator[Event]:
        """Serve a request; call with ``stream=True``. Cancelling the response stops every stage.

        Args:
            request: what is asked for.
            request_id: for logs and events; made up if omitted.
            timeout_s: from now to the whole file; the app's own limit if omitted or longer than that.
            previews: of the pictures while they are denoised, at most; 0 to 32.

        Yields:
            Events, :class:`Finished` the last; :meth:`read` has the file.

        Raises:
            RequestError: the request is wrong.
            OverloadedError, ShuttingDown: no place is free; the app is being stopped.
            DeadlineExceeded, StageFailed: it could not be done.
        """
        if self._is_draining:
            raise ShuttingDown(_RESTART_S)
        order_previews = self._previews.orders(previews)
        if self._num_requests >= self._max_requests:
            raise OverloadedError("requests of one Director", self._max_requests, self._seconds_per_request)
        self._num_requests += 1
        start_s = time.monotonic()
        try:
            asked_s = math.inf if timeout_s is None else checks.real("timeout_s", timeout_s, 0, math.inf)
            context = RequestContext.new(request_id, min(self._request_timeout_s, asked_s))
            resolved = await self._check.resolved(context, request)
            del request  # and its media with it, once they are encoded
            walk = Walk(
                request=resolved,
                context=context,
                layout=self._layout,
                stages=self._stages,
                clips=self._clips,
                media=self._media,
                chunk_window=self._chunk_window,
                max_attempts=self._max_attempts,
                close_later=self._closer.close_later,
                order_previews=order_previews,
            )
            async for event in walk.events():
                yield event
            self._seconds_per_request = time.monotonic() - start_s
        finally:
            self._num_requests -= 1

    async def generate(
        self, request: GenerationRequest, request_id: str | None = None, timeout_s: float | None = None
    ) -> Generated:
        """Serve a request and return its file in one piece.

        Raises:
            Cosmos3Error: as :meth:`stream`.
        """
        info: Finished | None = None
        async for event in self.stream(request, request_id, timeout_s):
            if isinstance(event, Finished):
                info = event
        assert info is not None, "a stream that raises nothing finishes"
        data = await asyncio.to_thread(self._media.read, info.media_id) if info.num_bytes else b""
        return Generated(data, info)

    async def read(self, media_id: str, start: int, num_bytes: int) -> bytes:
        """A part of a finished file, as long as the media store keeps it; empty behind its end.

        Any Director of the app can be asked: whoever reads asks for part after part, and holds nobody up by being slow.

        Raises:
            RequestError: there is no such file, or not any more; or ``num_bytes`` is too large.
        """
        num_bytes = checks.integer("num_bytes", num_bytes, 1, MAX_PART_BYTES)
        return await asyncio.to_thread(self._media.read, media_id, start, num_bytes)

    async def drain(self) -> int:
        """Take no new request from now on; returns how many are still running."""
        self._is_draining = True
        return self._num_requests

    async def num_open_clips(self) -> int:
        """How many clips are between decoder and encoder; 0 when idle."""
        return await self._clips.num_open.remote()
