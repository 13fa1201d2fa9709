"""Second half of a pipeline: latents -> a file in the media store, decoded and encoded side by side.

Decoders and the encoder fail independently. When a decoder dies, another one decodes the latents again, and chunks that
the encoder already has are dropped: the file keeps growing. When the encoder dies, its file is recorded as failed, and
the next attempt starts another file. A decoder's attempts therefore lie within one attempt of the encoder, which names
the clip's stream (:mod:`cluster.clip_stream` explains streams and credits).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import GangFailed, StageFailed, StreamClosed
from cluster.events import Event
from cosmos3_core.media.writer import ClipFormat
from deployments.director.guardrail_calls import PassedChunk, check_chunk
from deployments.director.resources import PipelineResources
from deployments.director.retries import retry_stage
from deployments.failures import summarize_error
from deployments.media.layout import new_media_id
from deployments.messages import ChunkDecoded, ClipEncoded, FileStarted, RequestContext, SoundDecoded
from deployments.stages.streams import RefStream, follow_stream, wait_within


@dataclass(frozen=True)
class LatentsDecoder:
    """Streaming handle of one modality's decoder, and the reference to its latents' envelope."""

    name: str
    handle: Any
    latents: Any


@dataclass
class ClipPipeline:
    """Decodes each modality of a clip and encodes its file; the last attempt takes ``seconds``."""

    resources: PipelineResources
    context: RequestContext
    clip_format: ClipFormat
    decoders: tuple[LatentsDecoder, ...]
    seconds: float = field(default=0.0, init=False)

    async def events(self) -> AsyncIterator[Event]:
        """Make the file; yield its events, :class:`ClipEncoded` at the end.

        Raise as the whole pipeline, MediaError if the file could not be written, MediaStoreError if this node cannot
        see it.
        """
        async for event in retry_stage("encode", self.context, self.resources.config.max_attempts, self._make_file):
            yield event

    async def _make_file(self, context: RequestContext) -> AsyncIterator[Event]:
        """Make the file in one attempt of the encoder."""
        stream_id, media_id = context.try_id, new_media_id(context.job_id)
        clips, media, encoder = self.resources.clips, self.resources.media, self.resources.stages.encoder
        start_s = time.monotonic()
        try:
            await wait_within(context, "decode", clips.open.remote(stream_id, self.resources.config.chunk_window))
            encode = encoder.encode.remote(context, self.clip_format, media_id, clips, stream_id)
            async with follow_stream(encode, context, "encode") as encoded:
                # The encoder's slot first, then the decoder's: two clips that hold one slot each would deadlock.
                started = await encoded.next_value()
                if not isinstance(started, FileStarted):
                    raise StreamClosed(stream_id, "the encoder went away")
                await asyncio.to_thread(media.require, media_id)  # fails if this node does not see the file
                yield started
                decoded = self._decode_all(context, stream_id)
                async for event in merge(decoded, _follow_encoder(encoded, context)):
                    self.seconds = time.monotonic() - start_s
                    yield event
        except BaseException as error:
            # A dead encoder cannot mark its file as failed; a live one has done so.
            await asyncio.to_thread(media.fail, media_id, summarize_error(error))
            raise
        finally:
            self.resources.close_later(clips, stream_id)

    async def _decode_all(self, context: RequestContext, stream_id: str) -> AsyncIterator[Event]:
        """Post all decoders' chunks to the clip's stream, and complete it at the end."""
        async for event in merge(*(self._decode(context, stream_id, decoder) for decoder in self.decoders)):
            yield event
        await wait_within(context, "decode", self.resources.clips.complete.remote(stream_id))

    async def _decode(self, context: RequestContext, stream_id: str, decoder: LatentsDecoder) -> AsyncIterator[Event]:
        posted = _PostedChunks()

        async def attempt(context: RequestContext) -> AsyncIterator[Event]:
            producer = f"{decoder.name}/{context.attempt}"
            decode = decoder.handle.decode.remote(context, decoder.latents, self.resources.clips, stream_id, producer)
            try:
                async with follow_stream(decode, context, "decode") as stream:
                    async for event in self._forward(stream, context, stream_id, producer, posted):
                        yield event
            except Exception:
                await wait_within(context, "decode", self.resources.clips.forget_producer.remote(stream_id, producer))
                raise

        try:
            async for event in retry_stage("decode", context, self.resources.config.max_attempts, attempt):
                yield event
        except GangFailed as error:
            # The decoder has used up its attempts: do not retry the encoder for it.
            raise StageFailed("decode", self.resources.config.max_attempts, summarize_error(error)) from error

    async def _forward(
        self, decoded: RefStream, context: RequestContext, stream_id: str, producer: str, posted: _PostedChunks
    ) -> AsyncIterator[Event]:
        """Post a decoder's chunks to the clip's stream by reference; yield the decoder's events about them."""
        clips, guardrail = self.resources.clips, self.resources.stages.guardrail
        while (chunk_ref := await decoded.next_ref()) is not None:
            # A dying decoder may leave its error in a chunk's place. An event follows each real chunk: without one, the
            # reference holds an error.
            event = await decoded.next_value()
            if event is None:
                await wait_within(context, "decode", chunk_ref)
            assert isinstance(event, ChunkDecoded | SoundDecoded)
            if event.index < posted.num_chunks:  # decoding is deterministic: the encoder has this chunk
                del chunk_ref  # frees its memory before its credit goes back
                await wait_within(context, "decode", clips.return_credit.remote(stream_id, producer))
                continue
            if guardrail is not None and isinstance(event, ChunkDecoded):
                # Uses the pipeline's context: the guardrail's attempts do not count as the decoder's.
                async for item in check_chunk(guardrail, self.context, self.resources.config.max_attempts, chunk_ref):
                    if isinstance(item, PassedChunk):
                        chunk_ref = item.ref
                    else:
                        yield item
            posted.num_chunks += 1
            # Yield the event before the chunk is posted, or its encoding could be reported first.
            yield event
            await wait_within(context, "decode", clips.post.remote(stream_id, producer, [chunk_ref]))


@dataclass
class _PostedChunks:
    """Number of a decoder's chunks in the clip's stream, over all its attempts."""

    num_chunks: int = 0


async def _follow_encoder(encoded: RefStream, context: RequestContext) -> AsyncIterator[Event]:
    """Yield the encoder's events; fail if they end before the file does."""
    is_whole = False
    while (event := await encoded.next_value()) is not None:
        is_whole = isinstance(event, ClipEncoded)
        yield event
    if not is_whole:
        raise StageFailed("encode", context.attempt, "the encoder's stream ended before the file did")


async def merge(*sources: AsyncIterator[Any]) -> AsyncIterator[Any]:
    """Yield the items of several iterators as they come; the first failure ends them all."""
    queue: asyncio.Queue[Any] = asyncio.Queue(maxsize=16)
    ended = object()

    async def pump(source: AsyncIterator[Any]) -> None:
        async for item in source:
            await queue.put(item)

    async def watch(pumps: list[asyncio.Task[None]]) -> None:
        # Ends with the first failure or the last pump, so the sentinel follows everything that they put.
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
