"""Resolve requests in the Director, and probe the clips that they give, a few at a time."""

from __future__ import annotations

import asyncio
from functools import partial

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.media.apart import probe_clip_apart
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from cosmos3_core.resolve import resolve
from deployments.messages import RequestContext
from deployments.stages.streams import wait_within

# A probe is a process, and a thread that waits for it.
_MAX_PROBES = 2


class RequestCheck:
    """Resolves requests against a checkpoint.

    Args:
        layout: of the checkpoint.
        is_sound_offered: whether the app decodes sound.
    """

    def __init__(self, layout: CheckpointLayout, *, is_sound_offered: bool) -> None:
        self._resolve = partial(resolve, layout=layout, is_sound_offered=is_sound_offered, probe=probe_clip_apart)
        self._probes = asyncio.Semaphore(_MAX_PROBES)

    async def resolve(self, context: RequestContext, request: GenerationRequest) -> ResolvedRequest:
        """Resolve every field of a request.

        Raises:
            RequestError: a value is wrong.
            DeadlineExceeded: the request's time is up.
            MediaError: the process that probes the clip was killed.
        """
        if not isinstance(request.video, bytes):
            return self._resolve(request)  # quick: of an image only the header is read
        await wait_within(context, "director", self._probes.acquire())
        probing = asyncio.get_running_loop().run_in_executor(None, self._resolve, request)
        # The slot is free when the thread ends, even if the caller has left.
        probing.add_done_callback(lambda _: self._probes.release())
        return await wait_within(context, "director", asyncio.shield(probing))
