"""Requests checked in the Director, given clips looked at on the way: few at a time, whoever comes and leaves."""

from __future__ import annotations

import asyncio
from functools import partial

from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.media.apart import probe_clip_apart
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from cosmos3_core.resolve import resolve
from deployments.messages import RequestContext
from deployments.stages.streams import wait_within

# Each is a process, and a thread that waits for it.
_MAX_PROBES = 2


class RequestCheck:
    """See the module.

    Args:
        layout: of the checkpoint.
        is_sound_offered: whether the app decodes sound.
    """

    def __init__(self, layout: CheckpointLayout, *, is_sound_offered: bool) -> None:
        self._resolve = partial(resolve, layout=layout, is_sound_offered=is_sound_offered, probe=probe_clip_apart)
        self._probes = asyncio.Semaphore(_MAX_PROBES)

    async def resolved(self, context: RequestContext, request: GenerationRequest) -> ResolvedRequest:
        """The request with every field decided.

        Raises:
            RequestError: it is wrong.
            DeadlineExceeded: its time is up.
            MediaError: a clip's reader was killed from outside.
        """
        if not isinstance(request.video, bytes):
            return self._resolve(request)  # moments: of an image the header is read
        await wait_within(context, "director", self._probes.acquire())
        probing = asyncio.get_running_loop().run_in_executor(None, self._resolve, request)
        # The place is free when the thread is, not when its caller has left.
        probing.add_done_callback(lambda _: self._probes.release())
        return await wait_within(context, "director", asyncio.shield(probing))
