"""The way of one request through the stages: tokenize, condition, denoise, then decode and encode side by side."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any

import ray

from cluster.envelope import TensorEnvelope
from cluster.errors import OverloadedError, PreviewFailed, StageFailed
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import StateError
from cosmos3_core.preview import PreviewOrder
from cosmos3_core.request import ResolvedRequest
from deployments.director.clip_pipeline import ClipPipeline, Decoder
from deployments.director.retries import retried
from deployments.failures import is_lost, translate_error, unwrap_error
from deployments.media.store import MediaStore
from deployments.messages import (
    ClipEncoded,
    Event,
    Finished,
    LatentsReady,
    PictureEncoded,
    PreviewsOff,
    RequestContext,
    StateSaved,
    Tokenized,
    TokenizedPair,
)
from deployments.stages.handles import Stages
from deployments.stages.streams import RefStream, follow_stream, wait_within

# A leader that is up says at once where in its queue a request stands.
_FIRST_WORD_S = 5.0


@dataclass
class Pipeline:
    """A request on its way; :meth:`events` does it all.

    Attributes:
        request: with every field decided.
        context: its id and deadline.
        layout: of the checkpoint.
        stages: whom to call.
        clips: the Director's :class:`cluster.clip_stream.ClipStreams` actor.
        media: where files go.
        chunk_window: decoded chunks that may exist before they are encoded.
        max_attempts: tries of a stage whose process died.
        close_later: takes a stream id to be closed once nobody is waiting here any more.
        order_previews: makes the order for previews of a clip of so many seconds; None where nobody wants any.
        begin_from: a state of the same request that another run has left, to go on from.
        on_saved: is given every saved state, with the number of steps that are done.
    """

    request: ResolvedRequest
    context: RequestContext
    layout: CheckpointLayout
    stages: Stages
    clips: Any
    media: MediaStore
    chunk_window: int
    max_attempts: int
    close_later: Callable[[str], None]
    order_previews: Callable[[float], Awaitable[PreviewOrder]] | None = None
    begin_from: TensorEnvelope | None = None
    on_saved: Callable[[int, TensorEnvelope], None] | None = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _saved: _Saved | None = None
    _clean: _Held | None = None

    async def events(self) -> AsyncIterator[Event]:
        """Every event of the request, :class:`Finished` the last.

        Raises:
            RequestError: the request's fault, found by a stage.
            OverloadedError: a stage's queue is full.
            DeadlineExceeded: the time is up.
            GangFailed, StageFailed: a stage's tries are used up.
            ContentBlocked, GuardrailUnavailable: its pictures must not be used, or nobody can say whether they may.
        """
        start_s = time.monotonic()
        if self.begin_from is not None:
            self._saved = _Saved(0, _Held(ray.put(self.begin_from), self.begin_from))
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
        clip_walk = self._clip_walk(latents)
        async for event in clip_walk.events():
            yield event
            if isinstance(event, ClipEncoded):
                self._seconds |= {"decode_encode": clip_walk.seconds, "encode": event.seconds}
                self._seconds["total"] = time.monotonic() - start_s
                yield self._finished(event, pair, actions)

    def _clip_walk(self, latents: _Latents) -> ClipPipeline:
        handles = self.stages.decoders_for(self.request)
        return ClipPipeline(
            context=self.context,
            clip_format=self.request.clip_format(),
            decoders=tuple(Decoder(name, handle, latents.held[name].ref) for name, handle in handles.items()),
            encoder=self.stages.encoder,
            clips=self.clips,
            media=self.media,
            chunk_window=self.chunk_window,
            max_attempts=self.max_attempts,
            close_later=self.close_later,
            guardrail=self.stages.guardrail,
        )

    def _retried(self, stage: str, attempt: Callable[[RequestContext], AsyncIterator[Any]]) -> AsyncIterator[Any]:
        def done_steps() -> int:
            return 0 if self._saved is None else self._saved.step

        return retried(stage, self.context, self.max_attempts, attempt, done_steps)

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
            yield await wait_within(context, "tokenize", response)
        finally:
            response.cancel()

    async def _condition(self, context: RequestContext) -> AsyncIterator[Event]:
        """Have what the request gives encoded, and hold its latents."""
        encode = self.stages.vae.encode.remote(context, self.request.picture)
        async with follow_stream(encode, context, "condition") as stream:
            event = await stream.next_value()
            if not isinstance(event, PictureEncoded):
                raise StageFailed("condition", context.attempt, "the stream ended without latents")
            self._clean = await self._held(stream, context, "condition")
            self._seconds["condition"] = event.seconds
            yield event

    async def _held(self, stream: RefStream, context: RequestContext, stage: str) -> _Held:
        ref = await stream.next_ref()
        return _Held(ref, await wait_within(context, stage, ref))

    async def _previews(self, order_previews: Callable[[float], Awaitable[PreviewOrder]]) -> PreviewOrder:
        if not self.request.has_pictures:
            raise PreviewFailed("the request makes no pictures")
        if self.stages.guardrail is not None:
            raise PreviewFailed("the guardrail looks at pictures before anybody sees them, and these it cannot")
        duration_s = self.request.num_frames / self.request.fps
        return await wait_within(self.context, "denoise", order_previews(duration_s))

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
                if not isinstance(translate_error(error, "denoise"), OverloadedError | _NoWord):
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
            async with follow_stream(denoise, context, "denoise") as stream:
                event = await _within(first_word_s, stream.next_value())
                while event is not None:
                    has_arrived = True
                    if isinstance(event, StateSaved):
                        self._saved = _Saved(event.step, await self._held(stream, context, "denoise"))
                        if self.on_saved is not None:
                            self.on_saved(event.step, self._saved.held.envelope)
                    yield event
                    if isinstance(event, LatentsReady):
                        self._seconds["denoise"] = event.seconds
                        latents = {name: await self._held(stream, context, "denoise") for name in event.modalities}
                        self._saved = None
                        yield _Latents(latents)
                        return
                    event = await stream.next_value()
        except Exception as error:
            # The state that this try was to begin with is gone, or is none of this model's: the next starts anew.
            if (is_lost(error) or isinstance(unwrap_error(error), StateError)) and not has_arrived:
                self._saved = None
            raise
        raise StageFailed("denoise", context.attempt, "the stream ended without latents")

    def _actions(self, latents: _Latents) -> GeneratedActions | None:
        """Generated actions are small: they are read here."""
        track = self.request.action
        if track is None or not self.request.has_generated_actions:
            return None
        return track.result(latents.held["action"].envelope.array()[:, : track.width])

    def _finished(self, clip: ClipEncoded | None, pair: TokenizedPair, actions: GeneratedActions | None) -> Finished:
        return Finished(
            request_id=self.context.request_id,
            job_id=self.context.job_id,
            mode=self.request.mode,
            media_id="" if clip is None else clip.media_id,
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
            stage_seconds=self._seconds,
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
