"""Closing the streams of clips whose request is over, however it ended."""

from __future__ import annotations

import asyncio
import contextvars
from typing import Any

_CLOSE_TRIES, _CLOSE_S, _CLOSE_PAUSE_S = 5, 10.0, 0.5


class ClipCloser:
    """Closes streams in a task of no request: calls made while one is cancelled may be lost.

    Args:
        clips: the Director's :class:`cluster.clip_stream.ClipStreams` actor.
    """

    def __init__(self, clips: Any) -> None:
        self._clips = clips
        self._stream_ids: asyncio.Queue[str] = asyncio.Queue()
        self._task: asyncio.Task[None] | None = None

    def close_later(self, stream_id: str) -> None:
        """Have a clip's stream closed. Inside the event loop; returns at once."""
        if self._task is None:
            loop = asyncio.get_running_loop()
            self._task = loop.create_task(self._close_streams(), context=contextvars.Context())
        self._stream_ids.put_nowait(stream_id)

    async def _close_streams(self) -> None:
        while True:
            stream_id = await self._stream_ids.get()
            for _ in range(_CLOSE_TRIES):
                try:
                    async with asyncio.timeout(_CLOSE_S):
                        await self._clips.close.remote(stream_id, "the request has ended")
                    break
                except Exception:  # noqa: BLE001 - away for a moment, or dead, and then the stream with it
                    await asyncio.sleep(_CLOSE_PAUSE_S)
