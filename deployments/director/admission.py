"""Admission: a request that comes -> a job that is kept, or why not. What can be refused is refused here."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace

from cosmos3_core import checks
from cosmos3_core.errors import Cosmos3Error, RequestError
from cosmos3_core.media.source import Packed
from cosmos3_core.preview import MAX_PREVIEWS
from cosmos3_core.request import GenerationRequest
from deployments.director.guardrail_calls import PromptCheck
from deployments.director.request_check import RequestCheck
from deployments.errors import JobsError
from deployments.jobs.cost import CostModel
from deployments.jobs.files import JobFiles
from deployments.jobs.job import Job, Lane, NewJob
from deployments.jobs.request_codec import decoded, encoded, fingerprint_of
from deployments.jobs.store import JobStore, QueueLimits
from deployments.jobs.submit_options import SubmitOptions
from deployments.jobs.waiting import RetryEstimator
from deployments.messages import RequestContext
from deployments.threads import run_in_thread


@dataclass(frozen=True)
class Admission:
    """See the module.

    Attributes:
        store: of jobs.
        files: of jobs.
        check: of requests.
        cost: of requests.
        model: name of the served model.
        limits: of the queue.
        prompt_check: the guardrail's; None where nothing is looked at.
        promises: to callers who were refused.
    """

    store: JobStore
    files: JobFiles
    check: RequestCheck
    cost: CostModel
    model: str
    limits: QueueLimits
    prompt_check: PromptCheck | None = None
    retry_estimator: RetryEstimator = field(default_factory=RetryEstimator)

    async def accept(
        self,
        request: GenerationRequest,
        options: SubmitOptions,
        context: RequestContext,
        attached_to: str | None = None,
    ) -> Job:
        """Make a job of a request; nothing that is accepted is refused later.

        Args:
            request: with its media packed.
            asked: how it came.
            context: of the request; its job id is the job's.
            attached_to: the runner whose caller waits for it; None for a job that stays.

        Returns:
            The job; for an idempotency key that was used for the same request the earlier one.

        Raises:
            RequestError: the request is wrong.
            ContentBlocked, GuardrailUnavailable: its prompt must not be used; nobody can say whether it may.
            OverloadedError: a bound of the queue is reached.
            IdempotencyConflict: the key was used for another request.
            DeadlineExceeded: the time is up.
            JobsError, MediaError: it cannot be kept.
        """
        previews = checks.integer("previews", options.previews, 0, MAX_PREVIEWS)
        checks.choice("service_class", options.service_class, tuple(self.limits.classes))
        resolved = await self.check.resolve(context, request)
        if self.prompt_check is not None:
            await self.prompt_check.check(context, resolved.prompt, is_skipped=options.skip_guardrails)
        values, media = encoded(request)
        del request
        new = NewJob(
            job_id=context.job_id,
            owner=options.owner,
            model=self.model,
            request=values,
            inputs=tuple(sorted(media)),
            fingerprint=await asyncio.to_thread(
                fingerprint_of,
                values,
                media,
                service_class=options.service_class,
                previews=previews,
                skip_guardrails=options.skip_guardrails,
            ),
            mode=resolved.mode,
            prompt=resolved.prompt,
            width=resolved.width,
            height=resolved.height,
            num_frames=resolved.num_frames,
            fps=resolved.fps,
            seed=resolved.seed,
            num_steps=resolved.num_inference_steps,
            media_type=resolved.clip_format().media_type if resolved.has_file else "",
            lane=Lane.IMAGE if resolved.num_frames == 1 else Lane.VIDEO,
            service_class=options.service_class,
            work=self.cost.work_of(resolved),
            request_id=context.request_id,
            idempotency_key=options.idempotency_key,
            attached_to=attached_to,
            previews=previews,
            remixed_from=options.remixed_from,
            skip_guardrails=options.skip_guardrails,
            warnings=options.warnings,
            notes=resolved.notes,
        )
        return await self._kept(new, options, media)

    async def load_remix(
        self, job: Job, prompt: str, options: SubmitOptions
    ) -> tuple[GenerationRequest, SubmitOptions]:
        """Return an earlier job's request with another prompt, and the options that it comes with.

        Raises:
            RequestError: its image or clip is not kept any more.
            MediaError: its image or clip cannot be read.
        """
        for name in job.inputs:
            if not await run_in_thread(self.files.exists, job.job_id, name):
                hint = "A job that was not completed keeps none; send the request itself again."
                raise RequestError("video_id", job.job_id, f"the id of a video whose {name} is still there", hint)
        media = {name: await run_in_thread(self.files.get, job.job_id, name) for name in job.inputs}
        may_skip = self.prompt_check is None or self.prompt_check.may_be_skipped
        request = replace(decoded(job.request, media), prompt=prompt)
        return request, remix_options(job, options, tuple(self.limits.classes), may_skip_guardrails=may_skip)

    async def _kept(self, new: NewJob, options: SubmitOptions, media: dict[str, Packed]) -> Job:
        """The job, once it and its files are on the disk: files first, or there were a job without."""
        # Nobody is cancelled in between: what was accepted has its files, what was not has none.
        keeping = asyncio.ensure_future(run_in_thread(self._keep, new, options, media))
        return await asyncio.shield(keeping)

    def _keep(self, new: NewJob, options: SubmitOptions, media: dict[str, Packed]) -> Job:
        try:
            for name, data in media.items():
                self.files.put(new.job_id, name, data)
            job = self.store.create(new, self.limits, options.limits, self.retry_estimator)
        except Cosmos3Error as error:
            found = self._created_after_all(new.job_id, error)
            if found is None:
                self.files.remove(new.job_id)
                raise
            return found
        if job.job_id != new.job_id:  # it was accepted before
            self.files.remove(new.job_id)
        return job

    def _created_after_all(self, job_id: str, error: Cosmos3Error) -> Job | None:
        """The job of a creation that seemed to fail, of which only the answer was lost; None where it is not there.

        Raises:
            Cosmos3Error: the given one, where nobody can say: then its files stay. Those of no job are swept later.
        """
        if not isinstance(error, JobsError):
            return None
        try:
            return self.store.get(job_id)
        except JobsError:
            raise error from None


def remix_options(
    job: Job, options: SubmitOptions, classes: tuple[str, ...], *, may_skip_guardrails: bool
) -> SubmitOptions:
    """Return the options of a remix: those of the earlier job, as far as its caller may still have them.

    Args:
        job: the earlier one.
        options: the caller's; their class is for an earlier one that the caller may not name, or that is gone.
        classes: of the configuration.
        may_skip_guardrails: whether the operator lets requests do without.
    """
    is_open = job.service_class in classes and (options.classes is None or job.service_class in options.classes)
    return replace(
        options,
        service_class=job.service_class if is_open else options.service_class,
        previews=job.previews,
        skip_guardrails=job.skip_guardrails and may_skip_guardrails,
        warnings=job.warnings,
        remixed_from=job.job_id,
    )
