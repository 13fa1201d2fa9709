"""Director: admits requests as jobs and runs them through the stages. Sees neither tensors nor frames.

Its handle offers any process of the cluster what the HTTP API offers clients.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any

from cluster.clip_stream import start_clip_streams
from cluster.errors import ShuttingDown
from cluster.events import Event
from cosmos3_core import checks
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import GenerationRequest
from deployments.api_model import Model
from deployments.config import AppConfig
from deployments.director.admission import Admission, RequestCheck
from deployments.director.guardrail_calls import PromptCheck
from deployments.director.leases import RESTART_S
from deployments.director.pipeline import Pipeline
from deployments.director.progress import StageDeadlines
from deployments.director.resources import ClipActors, ClipCloser, PipelineResources, Previews
from deployments.director.runner import JobRunner
from deployments.jobs.estimates import CostModel
from deployments.jobs.job import Job, JobEvent, SubmitOptions, new_job_id
from deployments.jobs.service import JobService, Maintenance
from deployments.media.variants import VIDEO
from deployments.messages import Accepted, Finished, Generated, RequestContext
from deployments.stages.handles import StageHandles

_NUM_THREADS = 32
_MAX_REMIXES = 4
_MAX_FOLLOW_S = 86_400.0
_DEFAULTS = SubmitOptions()


class Director:
    """Serve deployment that admits requests and runs claimed jobs.

    Methods for existing jobs answer as the HTTP API does. An ``owner`` is the id of an API key, "" for jobs without a
    key. A job that does not exist, or is not the owner's, raises ``ApiError`` with status 404.
    """

    async def __init__(self, config: AppConfig, stages: StageHandles) -> None:  # type: ignore[misc] # Serve awaits it
        # For the database and for files; asyncio's own default is by the number of cores.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="director"))
        self._config = config
        await asyncio.to_thread(self._open, stages.streaming())
        check = self._admission.check
        deadlines = StageDeadlines.of(config)
        self._runner = JobRunner(self._jobs, self._model.id, config.jobs, check, deadlines, self._make_pipeline)
        self._maintenance = Maintenance(self._jobs, self._model.id, config.jobs).start()
        self._remixes = asyncio.Semaphore(_MAX_REMIXES)
        self._is_draining = False

    def _open(self, stages: StageHandles) -> None:
        """Open the checkpoint, the database, the files and the clips' streams, and wire the parts that use them."""
        config, guardrails = self._config, self._config.guardrails
        layout = CheckpointLayout.open(config.checkpoint)
        has_sound = stages.audio is not None
        self._jobs = JobService.open(config)
        self._model = Model.of(layout, config.model_name, is_sound_offered=has_sound)
        prompt_check = None
        if stages.guardrail is not None:
            prompt_check = PromptCheck(stages.guardrail, guardrails.text_timeout_s, guardrails.clients_may_disable)
        self._admission = Admission(
            store=self._jobs.store,
            files=self._jobs.files,
            check=RequestCheck(layout, is_sound_offered=has_sound),
            cost=CostModel.of(layout.geometry, layout.transformer),
            model=self._model.id,
            config=config.jobs,
            prompt_check=prompt_check,
        )
        max_clips = 4 * (config.jobs.max_running_images + config.jobs.max_running_videos)
        self._clip_actors = ClipActors(partial(start_clip_streams, max_clips))
        self._resources = PipelineResources(
            layout=layout,
            stages=stages,
            clips=None,
            media=self._jobs.media,
            config=config.director,
            close_later=ClipCloser().close_later,
            previews=Previews(stages.vae),
            prompt_check=prompt_check,
        )

    def _make_pipeline(self, *arguments: Any) -> Pipeline:
        return Pipeline.of_job(replace(self._resources, clips=self._clip_actors.pick()), *arguments)

    async def stream(
        self, request: GenerationRequest, options: SubmitOptions = _DEFAULTS, timeout_s: float | None = None
    ) -> AsyncIterator[Event]:
        """Serve a request while its caller waits; call with ``stream=True``. Cancelling the response stops every stage.

        Args:
            request: with its media packed.
            timeout_s: seconds until the file must be done; bounded by the app's own limit, the default.

        Yields:
            Events, :class:`Accepted` the first and :class:`Finished` the last; :meth:`read` has the file.

        Raises:
            RequestError, ContentBlocked: the request is wrong, or its prompt must not be used.
            OverloadedError, ShuttingDown: a bound of the queue is reached; the app is being stopped.
            DeadlineExceeded, StageFailed: it could not be done.
            JobCancelled: its owner has cancelled it.
        """
        options = replace(options, idempotency_key=None)  # an earlier job's events are not this caller's
        context = self._context(options, timeout_s)
        self._runner.announce(context.job_id, context)
        try:
            job = await self._admission.accept(request, options, context, self._runner.runner_id)
        except BaseException:
            self._runner.withdraw(context.job_id)
            raise
        try:
            del request  # and its media with it
            yield Accepted(job.request_id, job.job_id, job.num_steps, job.num_frames, job.seed, job.notes, os.getpid())
            async with aclosing(self._runner.follow(job)) as events:
                async for event in events:
                    yield event
        finally:
            self._runner.leave(job.job_id)

    async def generate(
        self, request: GenerationRequest, options: SubmitOptions = _DEFAULTS, timeout_s: float | None = None
    ) -> Generated:
        """Serve a request and return its file in one piece; raise as :meth:`stream`."""
        info: Finished | None = None
        async for event in self.stream(request, options, timeout_s):
            if isinstance(event, Finished):
                info = event
        assert info is not None, "a stream that raises nothing finishes"
        if not info.num_bytes:
            return Generated(b"", info)
        media = self._jobs.media
        return Generated(await asyncio.to_thread(lambda: media.read(media.require(info.media_id))), info)

    async def submit(self, request: GenerationRequest, options: SubmitOptions = _DEFAULTS) -> Job:
        """Accept a request as a job that keeps running when the caller leaves, and resumes after a restart.

        Raise RequestError, ContentBlocked, OverloadedError, ShuttingDown or IdempotencyConflict if it is not accepted.
        """
        job = await self._admission.accept(request, options, self._context(options, None))
        self._runner.wake()
        return job

    async def remix(self, job_id: str, prompt: str, options: SubmitOptions = _DEFAULTS) -> Job:
        """Accept an earlier job's request again, with the same seed and fields and another prompt.

        Its class, previews and warnings are the earlier one's, as far as the caller may use them. Raise RequestError if
        its image or clip is not kept any more, and as :meth:`submit`.
        """
        earlier = await self._jobs.get(job_id, options.owner)
        async with self._remixes:  # each has the earlier one's media in memory
            return await self.submit(*await self._admission.load_remix(earlier, prompt, options))

    async def models(self) -> list[dict[str, Any]]:
        """Return the one model that is served, as ``GET /v1/models`` shows it."""
        return [self._model.as_json()]

    async def job(self, job_id: str, owner: str = "") -> dict[str, Any]:
        """Return a job, as ``GET /v1/videos/{id}`` shows it."""
        return (await self._jobs.describe(await self._jobs.get(job_id, owner))).as_json()

    async def jobs(
        self, owner: str = "", after: str | None = None, limit: int = 20, order: str = "desc"
    ) -> dict[str, Any]:
        """Return a page of an owner's jobs, as ``GET /v1/videos`` shows it; raise RequestError for a wrong value."""
        return (await self._jobs.list(owner, after, limit, order)).as_json()

    async def cancel(self, job_id: str, owner: str = "") -> dict[str, Any]:
        """Stop a job and return it; one that has ended stays as it is."""
        return (await self._jobs.describe(await self._jobs.cancel(job_id, owner))).as_json()

    async def delete(self, job_id: str, owner: str = "") -> dict[str, Any]:
        """Stop and delete a job with its files."""
        return (await self._jobs.delete(job_id, owner)).as_json()

    async def events(
        self, job_id: str, after: int = 0, timeout_s: float | None = None, owner: str = ""
    ) -> AsyncIterator[JobEvent]:
        """Yield a job's events after number ``after``, as they come, to its end; call with ``stream=True``.

        Raise OverloadedError if too many callers follow jobs here, DeadlineExceeded if the job has not ended in time.
        """
        limit_s = checks.real("timeout_s", _MAX_FOLLOW_S if timeout_s is None else timeout_s, 0, math.inf)
        async with aclosing(self._jobs.follow(await self._jobs.get(job_id, owner), after, limit_s)) as events:
            async for event in events:
                yield event

    async def read(self, job_id: str, start: int, num_bytes: int, owner: str = "", variant: str = VIDEO) -> bytes:
        """Return a part of a finished job's content, as :meth:`deployments.jobs.service.JobService.read_content`.

        Any Director of the app answers. Readers fetch part after part, so a slow one delays no other.
        """
        return await self._jobs.read_content(await self._jobs.get(job_id, owner), start, num_bytes, variant)

    async def list_faults(self) -> list[str]:
        """Return what keeps jobs from being begun or from going on, in a few words each; empty if nothing does."""
        return self._runner.list_faults()

    async def drain(self) -> int:
        """Reject new requests from now on; return the number of jobs in hand."""
        self._is_draining = True
        return self._runner.drain()

    async def __del__(self) -> None:
        """Release jobs before Serve ends the replica: it counts requests, not jobs."""
        await self.release()

    async def release(self) -> None:
        """Give jobs back to the next Director; waiting callers get an error that says when to retry."""
        self._is_draining = True
        await self._runner.release()

    async def num_open_clips(self) -> int:
        """Return the number of clips between decoder and encoder in the newest actor of their streams; 0 when idle."""
        return int(await self._clip_actors.current.num_open.remote())

    def _context(self, options: SubmitOptions, timeout_s: float | None) -> RequestContext:
        """Return the context of a new request, under a fresh job id.

        Raise ShuttingDown while the app is stopped, ApiError 503 while a fault keeps jobs from being begun.
        """
        if self._is_draining:
            raise ShuttingDown(RESTART_S)
        self._runner.breaker.check()
        limit_s = math.inf if timeout_s is None else checks.real("timeout_s", timeout_s, 0, math.inf)
        limit_s = min(self._config.http.request_timeout_s, limit_s)
        return RequestContext.new(options.request_id, limit_s, new_job_id())
