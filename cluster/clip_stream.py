"""The stream of one clip from its producers to its consumer: a bounded mailbox of references.

Serve's own streams have no back-pressure and spread calls over replicas. Here a producer takes a credit before it makes
a chunk, the Director posts the chunk's reference, and the one consumer of the clip takes it and gives the credit back.
Chunks themselves never pass through this actor.

Pictures and sound have a producer each. One that dies is replaced by another, of another name, which starts over: the
Director drops repeated chunks, and takes back the unused credits of the dead one.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import Any

import ray

from cluster.errors import OverloadedError, StreamClosed


@dataclass
class _Clip:
    credits: asyncio.Semaphore
    credits_in_use: Counter[str] = field(default_factory=Counter)  # by producer
    dead_producers: set[str] = field(default_factory=set)
    chunk_refs: deque[Any] = field(default_factory=deque)
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    is_complete: bool = False
    closed_because: str | None = None


class ClipStreams:
    """Async actor with the mailboxes of one Director's clips; waiting calls cost nothing.

    Its Director owns it. It dies with the Director, which ends every producer and consumer that waits here.
    """

    def __init__(self, max_clips: int) -> None:
        self._clips: dict[str, _Clip] = {}
        self._max_clips = max_clips

    async def open(self, stream_id: str, window: int) -> None:
        """Begin a clip of which at most ``window`` chunks exist between producer and consumer.

        Raises:
            OverloadedError: too many clips are open.
            StreamClosed: a clip of that name is open; their chunks would mix.
        """
        if stream_id in self._clips:
            raise StreamClosed(stream_id, "it is open already")
        if len(self._clips) >= self._max_clips:
            raise OverloadedError("open clips of one Director", self._max_clips, 1.0)
        self._clips[stream_id] = _Clip(asyncio.Semaphore(window))

    async def acquire(self, stream_id: str, producer: str, timeout_s: float) -> bool:
        """Wait for a producer's credit; return False if it must stop. Raise TimeoutError if no credit comes."""
        clip = self._clips.get(stream_id)
        if clip is None:
            return False
        async with asyncio.timeout(timeout_s):
            await clip.credits.acquire()
        if clip.closed_because is not None or producer in clip.dead_producers:
            clip.credits.release()  # for the next producer that waits: it takes the credit, or learns of the end
            return False
        clip.credits_in_use[producer] += 1
        return True

    async def post(self, stream_id: str, producer: str, boxed_ref: list[Any]) -> None:
        """Post a producer's next chunk: its reference in a list of one, which Ray does not resolve."""
        clip = self._clips.get(stream_id)
        if clip is not None:
            clip.credits_in_use[producer] -= 1
            clip.chunk_refs.append(boxed_ref[0])
            clip.changed.set()

    async def return_credit(self, stream_id: str, producer: str) -> None:
        """Give up a credit without posting a chunk: none is left, or the consumer already has it."""
        clip = self._clips.get(stream_id)
        if clip is not None and clip.credits_in_use[producer] > 0:
            clip.credits_in_use[producer] -= 1
            clip.credits.release()

    async def forget_producer(self, stream_id: str, producer: str) -> None:
        """Take back the unused credits of a producer that has died; the Director calls this."""
        clip = self._clips.get(stream_id)
        if clip is not None:
            clip.dead_producers.add(producer)
            for _ in range(clip.credits_in_use.pop(producer, 0)):
                clip.credits.release()

    async def complete(self, stream_id: str) -> None:
        """Mark the clip as complete: the Director posts no further chunk."""
        clip = self._clips.get(stream_id)
        if clip is not None:
            clip.is_complete = True
            clip.changed.set()

    async def take(self, stream_id: str, timeout_s: float) -> list[Any]:
        """Return the next chunk's reference to the consumer in a list, or an empty list after the last one.

        Raises:
            StreamClosed: the clip was given up.
            TimeoutError: nothing came in time.
        """
        clip = self._clips.get(stream_id)
        if clip is None:
            raise StreamClosed(stream_id, "not open")
        async with asyncio.timeout(timeout_s):
            while True:
                if clip.closed_because is not None:
                    raise StreamClosed(stream_id, clip.closed_because)
                if clip.chunk_refs:
                    return [clip.chunk_refs.popleft()]
                if clip.is_complete:
                    return []
                clip.changed.clear()
                await clip.changed.wait()

    async def release_chunk(self, stream_id: str) -> None:
        """Give a credit back after the consumer has used up a chunk."""
        clip = self._clips.get(stream_id)
        if clip is not None:
            clip.credits.release()

    async def close(self, stream_id: str, reason: str) -> None:
        """Close a clip, if it is open, and end all its waiting calls."""
        clip = self._clips.pop(stream_id, None)
        if clip is None:
            return
        clip.closed_because = reason
        clip.chunk_refs.clear()
        clip.changed.set()
        clip.credits.release()

    async def num_open(self) -> int:
        """Return the number of open clips."""
        return len(self._clips)


def start_clip_streams(max_clips: int) -> Any:
    """Start the actor as a child of the calling one; Ray replaces a dead one by an empty one."""
    # Two producers and a consumer of each clip may wait here, and dead producers' calls; the calls that end these waits
    # need room too.
    max_calls = 10 * max_clips + 100
    return ray.remote(ClipStreams).options(num_cpus=0, max_concurrency=max_calls, max_restarts=-1).remote(max_clips)
