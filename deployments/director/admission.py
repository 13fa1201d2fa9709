"""Admission: check a request and make it a job, or reject it; an accepted one is never rejected later."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from functools import partial

from cosmos3_core import checks
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.media.child_reader import probe_clip_in_child
from cosmos3_core.media.source import Packed
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import GenerationRequest, ResolvedRequest
from cosmos3_core.resolve import resolve
from deployments.config import DEFAULT_CLASS, JobsConfig
from deployments.director.guardrail_calls import PromptCheck
from deployments.errors import JobsError
from deployments.jobs.estimates import CostModel, RetryEstimator
from deployments.jobs.job import Job, Lane, NewJob, SubmitOptions, compute_fingerprint, decode_request, encode_request
from deployments.jobs.keys import KeyLimits
from deployments.jobs.store import JobStore
from deployments.media.job_files import JobFiles
from deployments.messages import RequestContext
from deployments.stages.streams import wait_within
from deployments.threads import run_in_thread

# Clips probed at once; each takes a process and a waiting thread.
_MAX_PROBES = 2


class RequestCheck:
    """Resolves requests against a checkpoint."""

    def __init__(self, layout: CheckpointLayout, *, is_sound_offered: bool) -> None:
        self._resolve = partial(resolve, layout=layout, is_sound_offered=is_sound_offered, probe=probe_clip_in_child)
        self._probes = asyncio.Semaphore(_MAX_PROBES)

    async def resolve(self, context: RequestContext, request: GenerationRequest) -> ResolvedRequest:
        """Resolve every field of a request.

        Raise RequestError for a wrong value, DeadlineExceeded if the time is up, MediaError if the process that probes
        the clip was killed.
        """
        if not isinstance(request.video, bytes):
            return self._resolve(request)  # quick: of an image only the header is read
        await wait_within(context, "director", self._probes.acquire())
        probing = asyncio.get_running_loop().run_in_executor(None, self._resolve, request)
        # The slot is free when the thread ends, even if the caller has left.
        probing.add_done_callback(lambda _: self._probes.release())
        return await wait_within(context, "director", asyncio.shield(probing))


@dataclass(frozen=True)
class Admission:
    """Admits requests to the queue of a Director's app; ``prompt_check`` is None without a guardrail."""

    store: JobStore
    files: JobFiles
    check: RequestCheck
    cost: CostModel
    model: str
    config: JobsConfig
    prompt_check: PromptCheck | None = None
    retry_estimator: RetryEstimator = field(default_factory=RetryEstimator)

    async def accept(
        self,
        request: GenerationRequest,
        options: SubmitOptions,
        context: RequestContext,
        attached_to: str | None = None,
    ) -> Job:
        """Make a job of a request and return it, or the earlier job of its idempotency key.

        Args:
            request: with its media packed.
            context: its job id becomes the job's.
            attached_to: the runner whose caller waits for it; None for a job that stays.

        Raises:
            RequestError: the request is wrong.
            ContentBlocked, GuardrailUnavailable: its prompt must not be used, or could not be checked.
            OverloadedError: a bound of the queue is reached.
            IdempotencyConflict: its key came with another request before.
            DeadlineExceeded: the time is up.
            JobsError, MediaError: it cannot be stored.
        """
        previews = checks.integer("previews", options.previews, 0, MAX_PREVIEWS)
        classes = tuple(self.config.classes)
        service_class = checks.choice("service_class", options.service_class or DEFAULT_CLASS, classes)
        resolved = await self.check.resolve(context, request)
        if self.prompt_check is not None:
            await self.prompt_check.check_at_admission(context, resolved.prompt, is_skipped=options.skip_guardrails)
        values, media = encode_request(request)
        del request
        fingerprint = await asyncio.to_thread(
            compute_fingerprint,
            values,
            media,
            service_class=service_class,
            previews=previews,
            skip_guardrails=options.skip_guardrails,
        )
        new = NewJob(
            job_id=context.job_id,
            owner=options.owner,
            model=self.model,
            request=values,
            inputs=tuple(sorted(media)),
            fingerprint=fingerprint,
            mode=resolved.mode,
            prompt=resolved.prompt,
            width=resolved.width,
            height=resolved.height,
            num_frames=resolved.num_frames,
            fps=resolved.fps,
            seed=resolved.seed,
            num_steps=resolved.num_inference_steps,
            media_type="" if resolved.file is None else resolved.file.media_type,
            lane=Lane.IMAGE if resolved.num_frames == 1 else Lane.VIDEO,
            service_class=service_class,
            work=self.cost.compute_work(resolved),
            request_id=context.request_id,
            idempotency_key=options.idempotency_key,
            attached_to=attached_to,
            previews=previews,
            remixed_from=options.remixed_from,
            skip_guardrails=options.skip_guardrails,
            warnings=options.warnings,
            notes=resolved.notes,
        )
        # Shielded from a caller who leaves: an accepted job has its files, a rejected one leaves none.
        return await asyncio.shield(run_in_thread(self._write, new, options.limits, media))

    async def load_remix(
        self, job: Job, prompt: str, options: SubmitOptions
    ) -> tuple[GenerationRequest, SubmitOptions]:
        """Return an earlier job's request with another prompt, and those of its options that the caller may use.

        The class in ``options`` replaces one that the caller may not name, or that is gone. Raise RequestError if the
        job's image or clip is not kept any more, MediaError if it cannot be read.
        """
        for name in job.inputs:
            if not await run_in_thread(self.files.exists, job.job_id, name):
                hint = "A job that was not completed keeps none; send the request itself again."
                raise RequestError("video_id", job.job_id, f"the id of a video whose {name} is still there", hint)
        media = {name: await run_in_thread(self.files.get, job.job_id, name) for name in job.inputs}
        request = replace(decode_request(job.request, media), prompt=prompt)
        is_class_open = job.service_class in self.config.classes and (
            options.classes is None or job.service_class in options.classes
        )
        may_skip = self.prompt_check is None or self.prompt_check.may_be_skipped
        inherited = replace(
            options,
            service_class=job.service_class if is_class_open else options.service_class,
            previews=job.previews,
            skip_guardrails=job.skip_guardrails and may_skip,
            warnings=job.warnings,
            remixed_from=job.job_id,
        )
        return request, inherited

    def _write(self, new: NewJob, limits: KeyLimits | None, media: dict[str, Packed]) -> Job:
        """Write files first, so that no job exists without them."""
        try:
            for name, data in media.items():
                self.files.put(new.job_id, name, data)
            job = self.store.create(new, self.config, limits, self.retry_estimator)
        except Cosmos3Error as error:
            found = self._find_created(new.job_id, error)
            if found is None:
                self.files.remove(new.job_id)
                raise
            return found
        if job.job_id != new.job_id:  # it was accepted before
            self.files.remove(new.job_id)
        return job

    def _find_created(self, job_id: str, error: Cosmos3Error) -> Job | None:
        """Return the job if it was created and only the answer was lost; None if it was not created.

        Raise the given error if the database does not answer: a sweep removes files without a job.
        """
        if not isinstance(error, JobsError):
            return None
        try:
            return self.store.get(job_id)
        except JobsError:
            raise error from None
