"""Previews: the app's preview map, fetched from a decoder for the first request with previews, and cached."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from cluster.errors import PreviewFailed
from cosmos3_core.preview import PreviewMap, PreviewOrder
from deployments.failures import summarize_error, unwrap_error
from deployments.messages import RequestContext
from deployments.stages.streams import follow_stream
from deployments.threads import start_task

logger = logging.getLogger("ray.serve")

# A request waits this long for the map. A decoder has it from its start, but answers only between two chunks.
_WAIT_S = 10.0
# A decoder that could not fit the map at its start may take this long: 2.4 TFLOP, 10 to 20 s on one CPU thread.
_FIT_S = 600.0


class Previews:
    """Makes the preview orders of requests; ``vae`` is a streaming handle."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._fetching: asyncio.Task[PreviewMap | PreviewFailed] | None = None

    async def order(self, num_previews: int, duration_s: float) -> PreviewOrder:
        """Make the preview order of a clip; raise PreviewFailed without a map in time: the next request retries."""
        if self._fetching is None:
            self._fetching = start_task(self._fetch())
        fetching = self._fetching
        await asyncio.wait([fetching], timeout=_WAIT_S)
        if not fetching.done():
            raise PreviewFailed(f"the decoder has not made their map within {_WAIT_S:.0f} s, and goes on making it")
        result = fetching.result()
        if isinstance(result, PreviewFailed):
            if self._fetching is fetching:
                self._fetching = None  # the next request tries again
            raise result
        return PreviewOrder(num_previews, duration_s, result)

    async def _fetch(self) -> PreviewMap | PreviewFailed:
        context = RequestContext.new("previews", _FIT_S)
        try:
            call = self._vae.preview_map.remote(context)
            async with follow_stream(call, context, "previews") as stream:
                preview_map = await stream.next_value()
            if isinstance(preview_map, PreviewMap):
                return preview_map
            reason = "the decoder's stream ended without their map"
        except Exception as error:  # noqa: BLE001 - another process may raise anything, and a preview never fails a request
            refusal = unwrap_error(error)
            reason = refusal.reason if isinstance(refusal, PreviewFailed) else summarize_error(error)
        logger.warning("previews cannot be made: %s", reason)
        return PreviewFailed(reason)
