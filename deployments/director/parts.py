"""What a Director is made of: the database and files of jobs, the check of requests, the runner, the pipeline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cluster.clip_stream import start_clip_streams
from cluster.envelope import TensorEnvelope
from cosmos3_core import checks
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import ResolvedRequest
from deployments.director.admission import Admission
from deployments.director.clip_pipeline import ClipCloser
from deployments.director.guardrail_calls import PromptCheck
from deployments.director.pipeline import Pipeline
from deployments.director.previews import Previews
from deployments.director.request_check import RequestCheck
from deployments.director.runner import JobRunner
from deployments.director.runner_spec import RunnerSpec
from deployments.failures import explain_failure, is_explained
from deployments.jobs.cost import CostModel
from deployments.jobs.database import DatabaseSpec
from deployments.jobs.files import JobFiles
from deployments.jobs.job import Job, Lane, new_job_id
from deployments.jobs.maintenance import Maintenance
from deployments.jobs.service import JobService
from deployments.jobs.store import JobStore, QueueLimits
from deployments.jobs.submit_options import SubmitOptions
from deployments.media.store import MediaSpec
from deployments.messages import RequestContext
from deployments.served_model import ServedModel
from deployments.service_config import GuardrailsConfig, JobsConfig
from deployments.stages.handles import Stages


@dataclass(frozen=True)
class DirectorSpec:
    """How a Director works.

    Attributes:
        checkpoint: the checkpoint's directory.
        model: what clients call the model.
        max_attempts: tries of a stage whose process died.
        chunk_window: decoded chunks of a clip that may exist before they are encoded.
        request_timeout_s: of requests whose caller waits, and that name none.
        media: of the store where files go.
        database: of jobs.
        jobs, guardrails: the configuration's sections.
    """

    checkpoint: str
    model: str
    max_attempts: int
    chunk_window: int
    request_timeout_s: float
    media: MediaSpec
    database: DatabaseSpec
    jobs: JobsConfig
    guardrails: GuardrailsConfig


@dataclass(frozen=True)
class DirectorParts:
    """See the module; made in a thread, started in the Director's event loop."""

    spec: DirectorSpec
    layout: CheckpointLayout
    stages: Stages
    jobs: JobService
    admission: Admission
    model: ServedModel
    clips: Any

    @classmethod
    def of(cls, spec: DirectorSpec, stages: Stages) -> DirectorParts:
        """The parts of a Director.

        Raises:
            CheckpointError, JobsError, MediaStoreError: the checkpoint, the database or the files cannot be used.
        """
        layout = CheckpointLayout.open(spec.checkpoint)
        media = spec.media.open()
        store = JobStore.open(spec.database.resolved())
        files = JobFiles(media.directory, spec.media.archive)
        stages = stages.streaming()
        admission = Admission(
            store=store,
            files=files,
            check=RequestCheck(layout, is_sound_offered=stages.audio is not None),
            cost=CostModel.of(layout.geometry, layout.transformer),
            model=spec.model,
            limits=limits_of(spec.jobs),
            prompt_check=_prompt_check(stages, spec.guardrails),
        )
        max_running = spec.jobs.max_running_images + spec.jobs.max_running_videos
        return cls(
            spec=spec,
            layout=layout,
            stages=stages,
            jobs=JobService(store, files, media, spec.jobs.max_followers),
            admission=admission,
            model=ServedModel.of(layout, spec.model, is_sound_offered=stages.audio is not None),
            clips=start_clip_streams(max_clips=4 * max_running),
        )

    def start(self) -> JobRunner:
        """The runner, at work. Inside the event loop."""
        jobs = self.spec.jobs
        runner_spec = RunnerSpec(
            model=self.spec.model,
            max_running={Lane.IMAGE: jobs.max_running_images, Lane.VIDEO: jobs.max_running_videos},
            limits=self.admission.limits,
            run_timeout_s=jobs.run_timeout_s,
            lease_s=jobs.lease_s,
            max_attempts=jobs.max_attempts,
            checkpoint_period_s=jobs.checkpoint_period_s,
            poll_s=jobs.poll_s,
            keep_media_s=self.spec.media.keep_s,
        )
        closer, previews = ClipCloser(self.clips), Previews(self.stages.vae)

        def make_pipeline(
            request: ResolvedRequest,
            context: RequestContext,
            job: Job,
            begin_from: TensorEnvelope | None,
            on_saved: Callable[[int, TensorEnvelope], None],
        ) -> Pipeline:
            # Skipping is allowed by today's configuration, not by that of the job's admission.
            is_skipped = job.skip_guardrails and self.spec.guardrails.clients_may_disable
            stages = self.stages.without_guardrail() if is_skipped else self.stages
            return Pipeline(
                request=request,
                context=context,
                layout=self.layout,
                stages=stages,
                clips=self.clips,
                media=self.jobs.media,
                chunk_window=self.spec.chunk_window,
                max_attempts=self.spec.max_attempts,
                close_later=closer.close_later,
                order_previews=previews.orders(job.previews),
                prompt_check=None if is_skipped else self.admission.prompt_check,
                begin_from=begin_from,
                on_saved=on_saved,
            )

        check = self.admission.check
        return JobRunner(self.jobs, check, make_pipeline, explain_failure, is_explained, runner_spec)

    def context(self, options: SubmitOptions, timeout_s: float | None) -> RequestContext:
        """Of a request that comes now, under a fresh job id.

        Raises:
            RequestError: no number of seconds.
        """
        asked_s = math.inf if timeout_s is None else checks.real("timeout_s", timeout_s, 0, math.inf)
        return RequestContext.new(options.request_id, min(self.spec.request_timeout_s, asked_s), new_job_id())

    @property
    def maintenance(self) -> Maintenance:
        """What is to be done about jobs now and then."""
        jobs = self.spec.jobs
        return Maintenance(self.jobs, self.spec.model, jobs.keep_s, jobs.max_kept)

    async def num_open_clips(self) -> int:
        """How many clips are between decoder and encoder."""
        return int(await self.clips.num_open.remote())


def _prompt_check(stages: Stages, guardrails: GuardrailsConfig) -> PromptCheck | None:
    if stages.guardrail is None:
        return None
    return PromptCheck(stages.guardrail, guardrails.text_timeout_s, guardrails.clients_may_disable)


def limits_of(jobs: JobsConfig) -> QueueLimits:
    """The queue's bounds in a configuration."""
    return QueueLimits(
        max_queued=jobs.max_queued,
        max_queued_per_key=jobs.max_queued_per_key,
        max_running_per_key=jobs.max_running_per_key,
        classes=jobs.classes,
    )
