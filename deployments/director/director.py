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

from cluster.errors import ShuttingDown
from cluster.events import Event
from cosmos3_core import checks
from cosmos3_core.request import GenerationRequest
from deployments.config import AppConfig
from deployments.director.job_calls import JobCalls
from deployments.director.leases import RESTART_S
from deployments.director.parts import DirectorParts
from deployments.jobs.job import Job, SubmitOptions, new_job_id
from deployments.messages import Accepted, Finished, Generated, RequestContext
from deployments.stages.handles import Stages

_NUM_THREADS = 32
_MAX_REMIXES = 4
_DEFAULTS = SubmitOptions()


class Director(JobCalls):
    """Serve deployment that admits requests and runs claimed jobs."""

    async def __init__(self, config: AppConfig, stages: Stages) -> None:  # type: ignore[misc] # Serve awaits it
        # For the database and for files; asyncio's own default is by the number of cores.
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix="director"))
        self._parts = await asyncio.to_thread(DirectorParts.open, config, stages)
        self._runner = self._parts.start_runner()
        self._maintenance = self._parts.make_maintenance().start()
        self._remixes = asyncio.Semaphore(_MAX_REMIXES)
        self._is_draining = False

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
        self._runner.expect(context.job_id, context)
        try:
            job = await self._parts.admission.accept(request, options, context, self._runner.runner_id)
        except BaseException:
            self._runner.unexpect(context.job_id)
            raise
        try:
            del request  # and its media with it
            yield Accepted(job.request_id, job.job_id, job.num_steps, job.num_frames, job.seed, job.notes, os.getpid())
            async with aclosing(self._runner.follow(job)) as events:
                async for event in events:
                    yield event
        finally:
            self._runner.forget(job.job_id)

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
        media = self._parts.jobs.media
        return Generated(await asyncio.to_thread(lambda: media.read(media.expect(info.media_id))), info)

    async def submit(self, request: GenerationRequest, options: SubmitOptions = _DEFAULTS) -> Job:
        """Accept a request as a job that keeps running when the caller leaves, and resumes after a restart.

        Raises:
            RequestError, ContentBlocked, OverloadedError, ShuttingDown, IdempotencyConflict: it is not accepted.
        """
        job = await self._parts.admission.accept(request, options, self._context(options, None))
        self._runner.nudge()
        return job

    async def remix(self, job_id: str, prompt: str, options: SubmitOptions = _DEFAULTS) -> Job:
        """Accept an earlier job's request again, with the same seed and fields and another prompt.

        Its class, previews and warnings are the earlier one's, as far as the caller may use them.

        Raises:
            ApiError: there is no such job.
            RequestError: its image or clip is not kept any more; or as :meth:`submit`.
        """
        earlier = await self._parts.jobs.get(job_id, options.owner)
        async with self._remixes:  # each has the earlier one's media in memory
            return await self.submit(*await self._parts.admission.load_remix(earlier, prompt, options))

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
        """Return the number of clips between decoder and encoder; 0 when idle."""
        return int(await self._parts.clips.num_open.remote())

    def _context(self, options: SubmitOptions, timeout_s: float | None) -> RequestContext:
        """Return the context of a new request, under a fresh job id.

        Raises:
            RequestError: ``timeout_s`` is no number of seconds.
            ShuttingDown: the app is being stopped.
        """
        if self._is_draining:
            raise ShuttingDown(RESTART_S)
        limit_s = math.inf if timeout_s is None else checks.real("timeout_s", timeout_s, 0, math.inf)
        limit_s = min(self._parts.config.http.request_timeout_s, limit_s)
        return RequestContext.new(options.request_id, limit_s, new_job_id())
