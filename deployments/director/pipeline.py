"""Pipeline of one request: check its prompt, tokenize, condition, denoise, then decode and encode side by side."""

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
from cluster.events import Event, PreviewsOff
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.errors import StateError
from cosmos3_core.media.writer import ClipFormat
from cosmos3_core.preview import PreviewOrder
from cosmos3_core.request import ResolvedRequest
from deployments.director.clip_pipeline import ClipPipeline, LatentsDecoder
from deployments.director.resources import PipelineResources
from deployments.director.retries import retry_stage
from deployments.failures import is_lost, translate_error, unwrap_error
from deployments.jobs.job import Job
from deployments.messages import (
    ClipEncoded,
    Finished,
    LatentsReady,
    PictureEncoded,
    RequestContext,
    StateSaved,
    Tokenized,
    TokenizedPair,
)
from deployments.stages.streams import RefStream, follow_stream, wait_within

# A leader that is up reports a request's queue position at once.
_FIRST_ANSWER_S = 5.0


@dataclass
class Pipeline:
    """Runs a request through the stages; :meth:`events` does it all.

    Attributes:
        num_previews: to order; 0 for none.
        resume_from: saved state of this request; None to start from the beginning.
        on_saved: receives every saved state and the number of its steps.
    """

    resources: PipelineResources
    request: ResolvedRequest
    context: RequestContext
    num_previews: int = 0
    resume_from: TensorEnvelope | None = None
    on_saved: Callable[[int, TensorEnvelope], None] | None = None
    _seconds: dict[str, float] = field(default_factory=dict)
    _saved: _SavedState | None = None
    _condition_latents: _HeldTensor | None = None

    @classmethod
    def of_job(
        cls,
        resources: PipelineResources,
        request: ResolvedRequest,
        context: RequestContext,
        job: Job,
        resume_from: TensorEnvelope | None,
        on_saved: Callable[[int, TensorEnvelope], None],
    ) -> Pipeline:
        """Return the pipeline of a claimed job."""
        # Skipping is allowed by today's configuration, not by that of the job's admission.
        if job.skip_guardrails and resources.prompt_check is not None and resources.prompt_check.may_be_skipped:
            resources = resources.without_guardrail()
        return cls(resources, request, context, job.previews, resume_from, on_saved)

    async def events(self) -> AsyncIterator[Event]:
        """Run the request; yield its events, :class:`Finished` at the end.

        Raises:
            RequestError: a stage found a fault of the request.
            OverloadedError: a stage's queue is full.
            DeadlineExceeded: the time is up.
            GangFailed, StageFailed: a stage's attempts are used up.
            ContentBlocked: the guardrail blocked the prompt or the frames.
            GuardrailUnavailable: the guardrail cannot check them.
        """
        if (prompt_check := self.resources.prompt_check) is not None:
            # Admission has checked the prompt, but maybe under another configuration, before the app was restarted.
            checking = prompt_check.check_job(self.context, self.resources.config.max_attempts, self.request.prompt)
            async for retry in checking:
                yield retry
        start_s = time.monotonic()
        if self.resume_from is not None:
            self._saved = _SavedState(0, _HeldTensor(ray.put(self.resume_from), self.resume_from))
        async for item in self._retry("tokenize", self._tokenize):
            if isinstance(item, TokenizedPair):
                pair = item
            else:
                yield item
        self._seconds["tokenize"] = time.monotonic() - start_s
        yield Tokenized(len(pair.text_ids), len(pair.negative_text_ids), pair.negative_origin, pair.pid)
        if self.request.picture is not None:
            async for event in self._retry("condition", self._condition):
                yield event
            # Drop the media: they are as large as the caller's file, and no later stage needs them.
            self.request = replace(self.request, picture=replace(self.request.picture, media=b""))
        previews: PreviewOrder | None = None
        if self.num_previews:
            try:
                previews = await self._order_previews()
            except PreviewFailed as error:
                yield PreviewsOff(error.reason, os.getpid())
        async for item in self._retry("denoise", lambda context: self._denoise(context, pair, previews)):
            if isinstance(item, _Latents):
                latents = item
            else:
                yield item
        actions = self._read_actions(latents)
        clip: ClipEncoded | None = None
        if self.request.file is not None:
            clip_pipeline = self._make_clip_pipeline(latents, self.request.file)
            async for event in clip_pipeline.events():
                yield event
                if isinstance(event, ClipEncoded):
                    clip = event
                    self._seconds |= {"decode_encode": clip_pipeline.seconds, "encode": clip.seconds}
        self._seconds["total"] = time.monotonic() - start_s
        yield self._make_finished(clip, pair, actions)

    def _retry(self, stage: str, attempt: Callable[[RequestContext], AsyncIterator[Any]]) -> AsyncIterator[Any]:
        def num_saved_steps() -> int:
            return 0 if self._saved is None else self._saved.step

        return retry_stage(stage, self.context, self.resources.config.max_attempts, attempt, num_saved_steps)

    async def _tokenize(self, context: RequestContext) -> AsyncIterator[TokenizedPair]:
        response = self.resources.stages.tokenizer.tokenize.remote(context, replace(self.request, picture=None))
        try:
            yield await wait_within(context, "tokenize", response)
        finally:
            response.cancel()

    async def _condition(self, context: RequestContext) -> AsyncIterator[Event]:
        """Encode the image or clip that the request gives, and hold its latents."""
        encode = self.resources.stages.vae.encode.remote(context, self.request.picture)
        async with follow_stream(encode, context, "condition") as stream:
            event = await stream.next_value()
            if not isinstance(event, PictureEncoded):
                raise StageFailed("condition", context.attempt, "the stream ended without latents")
            self._condition_latents = await self._hold_next(stream, context, "condition")
            self._seconds["condition"] = event.seconds
            yield event

    async def _hold_next(self, stream: RefStream, context: RequestContext, stage: str) -> _HeldTensor:
        ref = await stream.next_ref()
        return _HeldTensor(ref, await wait_within(context, stage, ref))

    async def _order_previews(self) -> PreviewOrder:
        if not self.request.has_pictures:
            raise PreviewFailed("the request makes no pictures")
        if self.resources.stages.guardrail is not None:
            raise PreviewFailed("the guardrail must check pictures before they are shown, and cannot check previews")
        duration_s = self.request.num_frames / self.request.fps
        ordering = self.resources.previews.order(self.num_previews, duration_s)
        return await wait_within(self.context, "denoise", ordering)

    async def _denoise(
        self, context: RequestContext, pair: TokenizedPair, previews: PreviewOrder | None
    ) -> AsyncIterator[Event | _Latents]:
        geometry = self.resources.layout.geometry
        denoise_request = DenoiseRequest.of(self.request, pair.text_ids, pair.negative_text_ids, geometry)
        *others, last = self.resources.stages.gangs_for(denoise_request)
        for gang in others:
            try:
                async for item in self._denoise_on(gang, context, denoise_request, previews, _FIRST_ANSWER_S):
                    yield item
                return
            except Exception as error:
                # The gang is full or cannot be reached, and has not begun the request; the next one may have room.
                if not isinstance(translate_error(error, "denoise"), OverloadedError | _GangSilent):
                    raise
        async for item in self._denoise_on(last, context, denoise_request, previews):
            yield item

    async def _denoise_on(
        self,
        gang: Any,
        context: RequestContext,
        denoise_request: DenoiseRequest,
        previews: PreviewOrder | None,
        answer_timeout_s: float | None = None,
    ) -> AsyncIterator[Event | _Latents]:
        saved_ref = None if self._saved is None else self._saved.held.ref
        condition_ref = None if self._condition_latents is None else self._condition_latents.ref
        has_arrived = False
        try:
            denoise = gang.denoise.remote(context, denoise_request, saved_ref, condition_ref, previews)
            async with follow_stream(denoise, context, "denoise") as stream:
                event = await _await_answer(answer_timeout_s, stream.next_value())
                while event is not None:
                    has_arrived = True
                    if isinstance(event, StateSaved):
                        self._saved = _SavedState(event.step, await self._hold_next(stream, context, "denoise"))
                        if self.on_saved is not None:
                            self.on_saved(event.step, self._saved.held.envelope)
                    yield event
                    if isinstance(event, LatentsReady):
                        self._seconds["denoise"] = event.seconds
                        latents = {name: await self._hold_next(stream, context, "denoise") for name in event.modalities}
                        self._saved = None
                        yield _Latents(latents)
                        return
                    event = await stream.next_value()
        except Exception as error:
            # The saved state is lost or does not fit this model: the next attempt starts from the beginning.
            if (is_lost(error) or isinstance(unwrap_error(error), StateError)) and not has_arrived:
                self._saved = None
            raise
        raise StageFailed("denoise", context.attempt, "the stream ended without latents")

    def _read_actions(self, latents: _Latents) -> GeneratedActions | None:
        """Read the generated actions, which are small; None if there are none."""
        track = self.request.action
        if track is None or not self.request.has_generated_actions:
            return None
        return track.restore(latents.held["action"].envelope.array()[:, : track.width])

    def _make_clip_pipeline(self, latents: _Latents, file: ClipFormat) -> ClipPipeline:
        handles = self.resources.stages.decoders_for(self.request)
        decoders = tuple(LatentsDecoder(name, handle, latents.held[name].ref) for name, handle in handles.items())
        return ClipPipeline(self.resources, self.context, file, decoders)

    def _make_finished(
        self, clip: ClipEncoded | None, pair: TokenizedPair, actions: GeneratedActions | None
    ) -> Finished:
        return Finished(
            request_id=self.context.request_id,
            job_id=self.context.job_id,
            mode=self.request.mode,
            media_id="" if clip is None else clip.media_id,
            media_type="" if self.request.file is None else self.request.file.media_type,
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


class _GangSilent(Exception):
    """A gang did not report the request's queue position in time: no replica of it is up."""


async def _await_answer(limit_s: float | None, awaitable: Awaitable[Any]) -> Any:
    limit = asyncio.timeout(limit_s)
    try:
        async with limit:
            return await awaitable
    except TimeoutError:
        if limit.expired():
            raise _GangSilent from None
        raise


@dataclass(frozen=True)
class _HeldTensor:
    """A stage's tensor for later stages.

    Holding its envelope keeps the bytes on this node: later stages can be retried after the stage's node is gone.
    """

    ref: Any
    envelope: TensorEnvelope


@dataclass(frozen=True)
class _Latents:
    """Denoised latents by modality."""

    held: dict[str, _HeldTensor]


@dataclass(frozen=True)
class _SavedState:
    """A saved denoising state after ``step`` steps."""

    step: int
    held: _HeldTensor
