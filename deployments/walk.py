"""One request's walk through the stages: tokenize, condition, denoise, then decode and encode side by side."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.envelope import TensorEnvelope
from cluster.errors import GangFailed, GangLost, OverloadedError, PreviewFailed, StageFailed, StreamClosed
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.preview import PreviewOrder
from cosmos3_core.request import ResolvedRequest
from deployments.errors import in_words, is_lost, is_retryable, typed
from deployments.messages import (
    Accepted,
    ChunkDecoded,
    ClipEncoded,
    EncoderReady,
    Event,
    Finished,
    LatentsReady,
    MediaPart,
    PictureEncoded,
    PreviewsOff,
    RequestContext,
    SoundDecoded,
    StageRetried,
    StateSaved,
    Tokenized,
    TokenizedPair,
)
from deployments.streams import RefStream, following, in_time

# Before a stage is tried again: a dead replica is still in the routers' tables for a moment.
_RETRY_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 2.0
# A leader that is up says at once where in its queue a request stands.
_FIRST_WORD_S = 5.0


@dataclass(frozen=True)
class Stages:
    """Handles of the stages that the Director calls; all but the tokenizer's with ``stream=True``.

    ``unguided`` are gangs for requests that need one branch of guidance only, ``audio`` decodes sound; where the
    app has such.
    """

    tokenizer: Any
    transformer: Any
    vae: Any
    encoder: Any
    unguided: Any = None
    audio: Any = None

    def gangs_for(self, job: DenoiseRequest) -> list[Any]:
        """The transformers that can take a request, the best one first."""
        if self.unguided is None:
            return [self.transformer]
        if len(job.prompts) == 1:
            return [self.unguided, self.transformer]
        return [self.transformer, self.unguided]


@dataclass
class Walk:
    """A request on its way; :meth:`events` does it all.

    Attributes:
        request: with every field decided.
        context: its id and deadline.
        layout: of the checkpoint.
        stages: whom to call.
        clips: the Director's :class:`cluster.clip_stream.ClipStreams` actor.
        chunk_window: decoded chunks that may exist before they are encoded.
        max_attempts: tries of a stage whose process died.
        close_later: takes a stream id to be closed once nobody is waiting here any more.
        order_previews: makes the order for previews of a clip of so many seconds; None where nobody wants any.
    """

    request: ResolvedRequest
    context: RequestContext
    layout: CheckpointLayout
    stages: Stages
    clips: Any
    chunk_window: int
    max_attempts: int
    close_later: Callable[[str], None]
    order_previews: Callable[[float], Awaitable[PreviewOrder]] | None = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _saved: _Saved | None = None
    _clean: _Held | None = None

    async def events(self) -> AsyncIterator[Event]:
        """Every event of the request, the finished file's parts last.

        Raises:
            RequestError: the request's fault, found by a stage.
            OverloadedError: a stage's queue is full.
            DeadlineExceeded: the time is up.
            GangFailed, StageFailed: a stage's tries are used up.
        """
        start_s = time.monotonic()
        yield self._accepted()
        pair, tokenized_events = await self._tokenize()
        for event in tokenized_events:
            yield event
        if self.request.picture is not None:
            async for event in self._retried("condition", self._condition):
                yield event
            # As large as the caller's file; nobody needs it any more.
            self.request = replace(self.request, picture=replace(self.request.picture, media=b""))
        previews: PreviewOrder | None = None
        if self.order_previews is not None:
            try:
                previews = await self._previews(self.order_previews)
            except PreviewFailed as error:
                yield PreviewsOff(error.reason, os.getpid())
        latents: _Latents
        async for item in self._retried("denoise", lambda context: self._denoise(context, pair, previews)):
            if isinstance(item, _Latents):
                latents = item
            else:
                yield item
        actions = self._actions(latents)
        if not self.request.has_file:
            self._seconds["total"] = time.monotonic() - start_s
            yield self._finished(None, pair, actions)
            return
        async for item in self._retried("decode", lambda context: self._decode_and_encode(context, latents)):
            if not isinstance(item, _Encoded):
                yield item
                continue
            self._seconds["total"] = time.monotonic() - start_s
            yield item.clip
            yield self._finished(item.clip, pair, actions)
            for part in item.parts:
                yield part

    def _accepted(self) -> Accepted:
        request = self.request
        return Accepted(
            self.context.request_id,
            request.num_inference_steps,
            request.num_frames,
            request.seed,
            request.notes,
            os.getpid(),
        )

    async def _tokenize(self) -> tuple[TokenizedPair, list[Event]]:
        start_s = time.monotonic()
        events: list[Event] = []
        async for item in self._retried("tokenize", self._tokenize_once):
            if isinstance(item, TokenizedPair):
                pair = item
            else:
                events.append(item)
        self._seconds["tokenize"] = time.monotonic() - start_s
        counts = len(pair.text_ids), len(pair.negative_text_ids)
        return pair, [*events, Tokenized(*counts, pair.negative_origin, pair.pid)]

    async def _tokenize_once(self, context: RequestContext) -> AsyncIterator[TokenizedPair]:
        response = self.stages.tokenizer.tokenize.remote(context, replace(self.request, picture=None))
        try:
            yield await in_time(context, "tokenize", response)
        finally:
            response.cancel()

    async def _condition(self, context: RequestContext) -> AsyncIterator[Event]:
        """Have what the request gives encoded, and hold its latents."""
        encode = self.stages.vae.encode.remote(context, self.request.picture)
        async with following(encode, context, "condition") as stream:
            event = await stream.next_value()
            if not isinstance(event, PictureEncoded):
                raise StageFailed("condition", context.attempt, "the stream ended without latents")
            self._clean = await self._held(stream, context, "condition")
            self._seconds["condition"] = event.seconds
            yield event

    async def _held(self, stream: RefStream, context: RequestContext, stage: str) -> _Held:
        ref = await stream.next_ref()
        return _Held(ref, await in_time(context, stage, ref))

    async def _previews(self, order_previews: Callable[[float], Awaitable[PreviewOrder]]) -> PreviewOrder:
        if not self.request.has_pictures:
            raise PreviewFailed("the request makes no pictures")
        duration_s = self.request.num_frames / self.request.fps
        return await in_time(self.context, "denoise", order_previews(duration_s))

    async def _denoise(
        self, context: RequestContext, pair: TokenizedPair, previews: PreviewOrder | None
    ) -> AsyncIterator[Event | _Latents]:
        job = DenoiseRequest.of(self.request, pair.text_ids, pair.negative_text_ids, self.layout.geometry)
        *others, last = self.stages.gangs_for(job)
        for gang in others:
            try:
                async for item in self._denoise_on(gang, context, job, previews, first_word_s=_FIRST_WORD_S):
                    yield item
                return
            except Exception as error:
                # Full, or away: nothing of the request was done. The next gang may have room.
                if not isinstance(typed(error, "denoise"), OverloadedError | _NoWord):
                    raise
        async for item in self._denoise_on(last, context, job, previews):
            yield item

    async def _denoise_on(
        self,
        gang: Any,
        context: RequestContext,
        job: DenoiseRequest,
        previews: PreviewOrder | None,
        *,
        first_word_s: float | None = None,
    ) -> AsyncIterator[Event | _Latents]:
        saved_ref = None if self._saved is None else self._saved.held.ref
        clean_ref = None if self._clean is None else self._clean.ref
        has_arrived = False
        try:
            denoise = gang.denoise.remote(context, job, saved_ref, clean_ref, previews)
            async with following(denoise, context, "denoise") as stream:
                event = await _within(first_word_s, stream.next_value())
                while event is not None:
                    has_arrived = True
                    if isinstance(event, StateSaved):
                        self._saved = _Saved(event.step, await self._held(stream, context, "denoise"))
                    yield event
                    if isinstance(event, LatentsReady):
                        self._seconds["denoise"] = event.seconds
                        latents = {name: await self._held(stream, context, "denoise") for name in event.modalities}
                        self._saved = None
                        yield _Latents(latents)
                        return
                    event = await stream.next_value()
        except Exception as error:
            if is_lost(error) and not has_arrived:  # the state that this try was to begin with; the next starts anew
                self._saved = None
            raise
        raise StageFailed("denoise", context.attempt, "the stream ended without latents")

    def _actions(self, latents: _Latents) -> GeneratedActions | None:
        """Generated actions are small: they are read here."""
        track = self.request.action
        if track is None or not self.request.has_generated_actions:
            return None
        return track.result(latents.held["action"].envelope.array()[:, : track.width])

    async def _decode_and_encode(self, context: RequestContext, latents: _Latents) -> AsyncIterator[Event | _Encoded]:
        stream_id = context.try_id
        start_s = time.monotonic()
        try:
            await in_time(context, "decode", self.clips.open.remote(stream_id, self.chunk_window))
            encode = self.stages.encoder.encode.remote(context, self.request.clip_format(), self.clips, stream_id)
            async with following(encode, context, "encode") as encoded:
                # First the encoder's place, then the decoder's: two clips that hold one each would wait for ever.
                ready = await encoded.next_value()
                if not isinstance(ready, EncoderReady):
                    raise StreamClosed(stream_id, "the encoder went away")
                async with AsyncExitStack() as decoders:
                    decoded = [
                        await decoders.enter_async_context(
                            following(
                                decoder.decode.remote(context, latents.held[name].ref, self.clips, stream_id),
                                context,
                                "decode",
                            )
                        )
                        for name, decoder in self._decoders()
                    ]
                    forwarded = self._forward_all(decoded, context, stream_id)
                    async for item in _merged(forwarded, _collect(encoded, context)):
                        self._seconds["decode_encode"] = time.monotonic() - start_s
                        yield item
        finally:
            self.close_later(stream_id)

    def _decoders(self) -> list[tuple[str, Any]]:
        """Who decodes which of the latents."""
        video = [("video", self.stages.vae)] if self.request.has_pictures else []
        return video + ([("sound", self.stages.audio)] if self.request.sound is not None else [])

    async def _forward_all(
        self, decoded: list[RefStream], context: RequestContext, stream_id: str
    ) -> AsyncIterator[Event]:
        """Post all decoders' chunks to the clip's stream; it is complete when all are done."""
        async for event in _merged(*(self._forward(stream, context, stream_id) for stream in decoded)):
            yield event
        await in_time(context, "decode", self.clips.complete.remote(stream_id))

    async def _forward(self, decoded: RefStream, context: RequestContext, stream_id: str) -> AsyncIterator[Event]:
        """Post a decoder's chunks to the clip's stream, unseen; yields what the decoder says about them."""
        while (event := await decoded.next_value()) is not None:
            assert isinstance(event, ChunkDecoded | SoundDecoded)
            chunk_ref = await decoded.next_ref()
            # Announced before it is posted, so that nobody hears of its encoding first.
            yield event
            await in_time(context, "decode", self.clips.post.remote(stream_id, [chunk_ref]))

    async def _retried(self, stage: str, attempt: Callable[[RequestContext], AsyncIterator[Any]]) -> AsyncIterator[Any]:
        """Run a stage until it succeeds or fails for good.

        Deaths are retried with the same seed. A stage that is full is waited for: a request that was accepted is not
        refused any more.
        """
        context = self.context
        num_tries = 1
        while True:
            pause_s = _RETRY_PAUSE_S
            try:
                async for item in attempt(context):
                    yield item
                return
            except Exception as error:  # noqa: BLE001 - what another process raised can be anything
                meaning = typed(error, stage)
                if isinstance(meaning, OverloadedError):
                    retried = None
                    pause_s = min(max(meaning.retry_after_s, _RETRY_PAUSE_S), _LONGEST_PAUSE_S)
                elif not is_retryable(error):
                    raise meaning from None
                else:
                    if not isinstance(meaning, GangLost):  # else the fault was another request's
                        num_tries += 1
                    if num_tries > self.max_attempts:
                        if isinstance(meaning, GangFailed):
                            raise meaning from None  # says more: the phase and the rank
                        raise StageFailed(stage, self.max_attempts, in_words(error)) from None
                    from_step = 0 if self._saved is None else self._saved.step
                    retried = StageRetried(stage, context.attempt + 1, in_words(error), from_step)
            if retried is not None:
                yield retried
            context = context.retried()
            await asyncio.sleep(min(pause_s, context.remaining_s(stage)))

    def _finished(self, clip: ClipEncoded | None, pair: TokenizedPair, actions: GeneratedActions | None) -> Finished:
        encode_s = {} if clip is None else {"encode": clip.seconds}
        return Finished(
            request_id=self.context.request_id,
            mode=self.request.mode,
            media_type="" if clip is None else self.request.clip_format().media_type,
            num_bytes=0 if clip is None else clip.num_bytes,
            num_frames=0 if clip is None else clip.num_frames,
            fps=self.request.fps,
            height=self.request.height,
            width=self.request.width,
            seed=self.request.seed,
            frames_sha256="" if clip is None else clip.frames_sha256,
            negative_origin=pair.negative_origin,
            notes=self.request.notes,
            stage_seconds={**self._seconds, **encode_s},
            actions=actions,
        )


class _NoWord(Exception):
    """A gang has not said that it has the request: none of its kind is up."""


async def _within(limit_s: float | None, awaitable: Awaitable[Any]) -> Any:
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise _NoWord from None
        raise


@dataclass(frozen=True)
class _Held:
    """A tensor of a stage, to be passed on. Its envelope is held, unread, so that the bytes stay on this node when the
    stage's is gone: what comes after can be tried again."""

    ref: Any
    envelope: TensorEnvelope


@dataclass(frozen=True)
class _Latents:
    """The latents, by modality."""

    held: dict[str, _Held]


@dataclass(frozen=True)
class _Saved:
    """A denoising state, after ``step`` steps."""

    step: int
    held: _Held


@dataclass(frozen=True)
class _Encoded:
    """A whole file. Handed on only now: a retry after the first byte could not be taken back."""

    clip: ClipEncoded
    parts: tuple[MediaPart, ...]


async def _collect(encoded: RefStream, context: RequestContext) -> AsyncIterator[Event | _Encoded]:
    """The encoder's events as they come, then its file in one piece."""
    clip: ClipEncoded | None = None
    parts: list[MediaPart] = []
    while (event := await encoded.next_value()) is not None:
        if isinstance(event, ClipEncoded):
            clip = event
        elif isinstance(event, MediaPart):
            parts.append(event)
        else:
            yield event
    if clip is None or sum(len(part.data) for part in parts) != clip.num_bytes:
        raise StageFailed("encode", context.attempt, "the encoder's stream ended before the file did")
    yield _Encoded(clip, tuple(parts))


async def _merged(*sources: AsyncIterator[Any]) -> AsyncIterator[Any]:
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
