"""Resources that all pipelines of one Director share: its handles, the closing of streams, the preview map."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import PreviewFailed
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.preview import PreviewMap, PreviewOrder
from deployments.config import DirectorStage
from deployments.director.guardrail_calls import PromptCheck
from deployments.failures import summarize_error, unwrap_error
from deployments.media.store import MediaStore
from deployments.messages import RequestContext
from deployments.stages.handles import StageHandles
from deployments.stages.streams import follow_stream
from deployments.threads import start_task

logger = logging.getLogger("ray.serve")

# A request waits this long for the map. A decoder has it from its start, but answers only between two chunks.
_WAIT_S = 10.0
# A decoder that could not fit the map at its start may take this long: 2.4 TFLOP, 10 to 20 s on one CPU thread.
_FIT_S = 600.0
_CLOSE_TRIES, _CLOSE_S, _CLOSE_PAUSE_S = 5, 10.0, 0.5
# Clips of one actor, and how many before its last the next one is started: a process takes a second or two.
_CLIPS_PER_ACTOR, _SPARE_CLIPS = 1_000, 20


@dataclass(frozen=True)
class PipelineResources:
    """Resources of a Director's pipelines.

    Attributes:
        stages: handles whose calls stream.
        clips: the :class:`cluster.clip_stream.ClipStreams` actor of one pipeline; None until one is picked for it.
        close_later: takes that actor and a stream's id; closes a clip's stream in the background.
        prompt_check: checks a prompt before the first stage; None without a guardrail.
    """

    layout: CheckpointLayout
    stages: StageHandles
    clips: Any
    media: MediaStore
    config: DirectorStage
    close_later: Callable[[Any, str], None]
    previews: Previews
    prompt_check: PromptCheck | None = None

    def without_guardrail(self) -> PipelineResources:
        """Return the resources for a request that skips the guardrail."""
        return replace(self, stages=replace(self.stages, guardrail=None), prompt_check=None)


class ClipActors:
    """Starts a fresh actor for clips' streams after each thousand clips; the old one ends with its last clip.

    Ray 2.60 keeps 0.7 kB of each reference that has passed through an actor, and of small objects every byte.
    """

    def __init__(self, start: Callable[[], Any]) -> None:
        self._start = start
        self.current = start()
        self._next: Any = None
        self._num_left = _CLIPS_PER_ACTOR

    def pick(self) -> Any:
        """Return the actor for one more clip."""
        if self._num_left == _SPARE_CLIPS:
            self._next = self._start()
        if self._num_left == 0:
            self.current, self._next, self._num_left = self._next, None, _CLIPS_PER_ACTOR
        self._num_left -= 1
        return self.current


class ClipCloser:
    """Closes clips' streams in a background task, because calls of a cancelled request may be lost."""

    def __init__(self) -> None:
        self._streams: asyncio.Queue[tuple[Any, str]] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def close_later(self, clips: Any, stream_id: str) -> None:
        """Close a clip's stream in the background. Call it in the event loop."""
        if self._task is None:
            self._task = start_task(self._close_streams())
        self._streams.put_nowait((clips, stream_id))

    async def _close_streams(self) -> None:
        while True:
            clips, stream_id = await self._streams.get()
            for _ in range(_CLOSE_TRIES):
                try:
                    async with asyncio.timeout(_CLOSE_S):
                        await clips.close.remote(stream_id, "the request has ended")
                    break
                except Exception:  # noqa: BLE001 - the actor is away for a moment, or dead with all its streams
                    await asyncio.sleep(_CLOSE_PAUSE_S)
            del clips  # an actor ends when nothing refers to it


class Previews:
    """Says what previews a clip gets. ``vae`` is a streaming handle, which gives the map from latents to colours."""

    def __init__(self, vae: Any) -> None:
        self._vae = vae
        self._fetching: asyncio.Task[PreviewMap | PreviewFailed] | None = None

    async def order(self, num_previews: int, duration_s: float) -> PreviewOrder:
        """Return the preview order of a clip; raise PreviewFailed without a map in time: the next request retries."""
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
