"""The second half of a pipeline: latents -> a file in the media store, decoded and encoded side by side.

Decoders and encoder fail apart. When a decoder dies, another one begins anew with the latents; what the encoder has had
already is dropped, so the file and whoever watches it grow go on. When the encoder dies, the file is lost with it: its
record says so, and another one is begun. So a decoder's tries lie inside one of the encoder's, whose name the clip's
stream has (:mod:`cluster.clip_stream`, where credits are explained as well).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import GangFailed, StageFailed, StreamClosed
from cosmos3_core.media.writer import ClipFormat
from deployments.director.guardrail_calls import Passed, passed_chunk
from deployments.director.retries import retried
from deployments.failures import summarize_error
from deployments.media.store import MediaStore, new_media_id
from deployments.messages import ChunkDecoded, ClipEncoded, Event, FileStarted, RequestContext, SoundDecoded
from deployments.stages.streams import RefStream, follow_stream, wait_within


@dataclass(frozen=True)
class Decoder:
    """Who decodes one of the latents.

    Attributes:
        name: of the modality.
        handle: of the deployment, with ``stream=True``.
        latents: the reference to their envelope.
    """

    name: str
    handle: Any
    latents: Any


@dataclass
class ClipPipeline:
    """A clip on its way; :meth:`events` does it all.

    Attributes:
        context: of the request.
        clip_format: of the file.
        decoders: of what goes into it.
        encoder: the deployment's handle, with ``stream=True``.
        clips: the Director's :class:`cluster.clip_stream.ClipStreams` actor.
        media: where the file goes.
        chunk_window: decoded chunks that may exist before they are encoded.
        max_attempts: tries of a stage whose process died.
        close_later: takes a stream id to be closed once nobody is waiting here any more.
        guardrail: the deployment's handle, with ``stream=True``, which has to let every frame pass; None where none is
            looked at.
        seconds: that the last try took.
    """

    context: RequestContext
    clip_format: ClipFormat
    decoders: tuple[Decoder, ...]
    encoder: Any
    clips: Any
    media: MediaStore
    chunk_window: int
    max_attempts: int
    close_later: Callable[[str], None]
    guardrail: Any = None
    seconds: float = field(default=0.0, init=False)

    async def events(self) -> AsyncIterator[Event]:
        """Every event, :class:`ClipEncoded` the last: the file is whole then.

        Raises:
            StageFailed, GangFailed: a stage's tries are used up.
            DeadlineExceeded: the time is up.
            MediaError: the file could not be written.
            MediaStoreError: nobody here can read it.
            ContentBlocked, GuardrailUnavailable: its frames must not be used, or nobody can say whether they may.
        """
        async for event in retried("encode", self.context, self.max_attempts, self._file):
            yield event

    async def _file(self, context: RequestContext) -> AsyncIterator[Event]:
        """One try to make the file."""
        stream_id, media_id = context.try_id, new_media_id()
        start_s = time.monotonic()
        try:
            await wait_within(context, "decode", self.clips.open.remote(stream_id, self.chunk_window))
            encode = self.encoder.encode.remote(context, self.clip_format, media_id, self.clips, stream_id)
            async with follow_stream(encode, context, "encode") as encoded:
                # First the encoder's place, then the decoder's: two clips that hold one each would wait for ever.
                started = await encoded.next_value()
                if not isinstance(started, FileStarted):
                    raise StreamClosed(stream_id, "the encoder went away")
                await asyncio.to_thread(self.media.expect, media_id)  # or nobody here could read it
                yield started
                decoded = self._decode_all(context, stream_id)
                async for event in merged(decoded, _encoded(encoded, context)):
                    self.seconds = time.monotonic() - start_s
                    yield event
        except BaseException as error:
            # An encoder that is alive says so itself; one that died cannot.
            await asyncio.to_thread(self.media.fail, media_id, summarize_error(error))
            raise
        finally:
            self.close_later(stream_id)

    async def _decode_all(self, context: RequestContext, stream_id: str) -> AsyncIterator[Event]:
        """Post all decoders' chunks to the clip's stream; it is complete when all are done."""
        async for event in merged(*(self._decode(context, stream_id, decoder) for decoder in self.decoders)):
            yield event
        await wait_within(context, "decode", self.clips.complete.remote(stream_id))

    async def _decode(self, context: RequestContext, stream_id: str, decoder: Decoder) -> AsyncIterator[Event]:
        posted = _Posted()

        async def attempt(context: RequestContext) -> AsyncIterator[Event]:
            producer = f"{decoder.name}/{context.attempt}"
            decode = decoder.handle.decode.remote(context, decoder.latents, self.clips, stream_id, producer)
            try:
                async with follow_stream(decode, context, "decode") as stream:
                    async for event in self._forward(stream, context, stream_id, producer, posted):
                        yield event
            except Exception:
                await wait_within(context, "decode", self.clips.forget.remote(stream_id, producer))
                raise

        try:
            async for event in retried("decode", context, self.max_attempts, attempt):
                yield event
        except GangFailed as error:
            # These were all its tries: the encoder's are not for it.
            raise StageFailed("decode", self.max_attempts, summarize_error(error)) from error

    async def _forward(
        self, decoded: RefStream, context: RequestContext, stream_id: str, producer: str, posted: _Posted
    ) -> AsyncIterator[Event]:
        """Post a decoder's chunks to the clip's stream, unseen; yields what the decoder says about them."""
        while (chunk_ref := await decoded.next_ref()) is not None:
            # The last thing that comes of a decoder that died may be its error in a chunk's place: what is said of a
            # chunk comes behind it, and so only of one that is there.
            event = await decoded.next_value()
            if event is None:
                await wait_within(context, "decode", chunk_ref)
            assert isinstance(event, ChunkDecoded | SoundDecoded)
            if event.index < posted.num_chunks:  # a clip decodes alike every time
                del chunk_ref  # before the credit that stands for its memory goes back
                await wait_within(context, "decode", self.clips.drop.remote(stream_id, producer))
                continue
            if self.guardrail is not None and isinstance(event, ChunkDecoded):
                # While it is looked at there are two of it. Of the other try's context, which this one's tries are not.
                async for item in passed_chunk(self.guardrail, self.context, self.max_attempts, chunk_ref):
                    if isinstance(item, Passed):
                        chunk_ref = item.ref
                    else:
                        yield item
            posted.num_chunks += 1
            # Announced before it is posted, so that nobody hears of its encoding first.
            yield event
            await wait_within(context, "decode", self.clips.post.remote(stream_id, producer, [chunk_ref]))


@dataclass
class _Posted:
    """How many of a decoder's chunks are in the clip's stream, whichever try made them."""

    num_chunks: int = 0


async def _encoded(encoded: RefStream, context: RequestContext) -> AsyncIterator[Event]:
    """The encoder's events as they come."""
    is_whole = False
    while (event := await encoded.next_value()) is not None:
        is_whole = isinstance(event, ClipEncoded)
        yield event
    if not is_whole:
        raise StageFailed("encode", context.attempt, "the encoder's stream ended before the file did")


async def merged(*sources: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Items of several iterators as they come; the first failure ends them all."""
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=16)
    ended = object()

    async def pump(source: AsyncIterator[Any]) -> None:
        async for item in source:
            await queue.put(item)

    async def watch(pumps: list[asyncio.Task[None]]) -> None:
        # Ends with the first failure or with the last pump; the mark comes after everything they put.
        await asyncio.wait(pumps, return_when=asyncio.FIRST_EXCEPTION)
        await queue.put(ended)

    pumps = [asyncio.create_task(pump(source)) for source in sources]
    watcher = asyncio.create_task(watch(pumps))
    try:
        while (item := await queue.get()) is not ended:
            yield item
        for task in pumps:
            if task.done():
                task.result()
    finally:
        for task in (*pumps, watcher):
            task.cancel()
        await asyncio.gather(*pumps, watcher, return_exceptions=True)
