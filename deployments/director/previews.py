"""The app's map of previews: asked of a decoder when somebody first wants a preview, and kept."""

from __future__ import annotations

import asyncio
import contextvars
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from cluster.errors import PreviewFailed
from cosmos3_core import checks
from cosmos3_core.preview import MAX_PREVIEWS, PreviewMap, PreviewOrder
from deployments.failures import summarize_error, unwrap_error
from deployments.messages import RequestContext
from deployments.stages.streams import follow_stream

logger = logging.getLogger("ray.serve")

# How long a request waits for the map. A decoder has it from its start, but hands it out between two chunks of clips.
_WAIT_S = 10.0
# How long a decoder may take for it, where it could not at its start: 2.4 TFLOP, 10 to 20 s on one CPU thread.
_FIT_S = 600.0


class Previews:
    """See the module.

    Args:
        vae: handle of the VideoVAE deployment, streaming.
    """

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._fetching: asyncio.Task[PreviewMap | PreviewFailed] | None = None

    def orders(self, num_previews: int) -> Callable[[float], Awaitable[PreviewOrder]] | None:
        """What makes a request's :meth:`order`, of its clip's seconds; None where it wants none.

        Raises:
            RequestError: not a number of previews that a request may have.
        """
        num_previews = checks.integer("previews", num_previews, 0, MAX_PREVIEWS)
        return partial(self.order, num_previews) if num_previews else None

    async def order(self, num_previews: int, duration_s: float) -> PreviewOrder:
        """What a transformer has to be told for previews of a clip of so many seconds.

        Raises:
            PreviewFailed: there is no map, or not in time; the next request may find one.
        """
        if self._fetching is None:
            # A context of its own: a call made inside a request would be cancelled with that request.
            loop = asyncio.get_running_loop()
            self._fetching = loop.create_task(self._fetch(), context=contextvars.Context())
        fetching = self._fetching
        await asyncio.wait([fetching], timeout=_WAIT_S)
        if not fetching.done():
            raise PreviewFailed(f"the decoder has not made their map within {_WAIT_S:.0f} s, and goes on making it")
        result = fetching.result()
        if isinstance(result, PreviewFailed):
            if self._fetching is fetching:
                self._fetching = None  # to be tried again, by the next request
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
        except Exception as error:  # noqa: BLE001 - a preview fails no request, whatever another process raised
            refusal = unwrap_error(error)
            reason = refusal.reason if isinstance(refusal, PreviewFailed) else summarize_error(error)
        logger.warning("previews cannot be made: %s", reason)
        return PreviewFailed(reason)
