"""The parts of a Director, wired from the configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cluster.clip_stream import start_clip_streams
from cluster.envelope import TensorEnvelope
from cosmos3_core.checkpoint.layout import CheckpointLayout
from cosmos3_core.request import ResolvedRequest
from deployments.config import AppConfig, GuardrailsConfig
from deployments.director.admission import Admission, RequestCheck
from deployments.director.clip_pipeline import ClipCloser
from deployments.director.guardrail_calls import PromptCheck
from deployments.director.pipeline import Pipeline
from deployments.director.previews import Previews
from deployments.director.runner import JobRunner
from deployments.jobs.cost import CostModel
from deployments.jobs.job import Job
from deployments.jobs.maintenance import Maintenance
from deployments.jobs.service import JobService
from deployments.messages import RequestContext
from deployments.served_model import Model
from deployments.stages.handles import Stages


@dataclass(frozen=True)
class DirectorParts:
    """The parts of one Director. Made in a thread, used in the Director's event loop.

    Attributes:
        stages: handles whose calls stream.
        clips: the :class:`cluster.clip_stream.ClipStreams` actor, whose streams ``closer`` closes.
    """

    config: AppConfig
    layout: CheckpointLayout
    stages: Stages
    jobs: JobService
    admission: Admission
    model: Model
    clips: Any
    closer: ClipCloser
    previews: Previews

    @classmethod
    def open(cls, config: AppConfig, stages: Stages) -> DirectorParts:
        """Open the parts of a Director.

        Raises:
            CheckpointError, JobsError, MediaStoreError: the checkpoint, the database or the files cannot be used.
        """
        layout = CheckpointLayout.open(config.checkpoint)
        stages = stages.streaming()
        has_sound = stages.audio is not None
        jobs = JobService.open(config)
        model = Model.of(layout, config.model_name, is_sound_offered=has_sound)
        admission = Admission(
            store=jobs.store,
            files=jobs.files,
            check=RequestCheck(layout, is_sound_offered=has_sound),
            cost=CostModel.of(layout.geometry, layout.transformer),
            model=model.id,
            config=config.jobs,
            prompt_check=make_prompt_check(stages, config.guardrails),
        )
        clips = start_clip_streams(max_clips=4 * (config.jobs.max_running_images + config.jobs.max_running_videos))
        return cls(
            config=config,
            layout=layout,
            stages=stages,
            jobs=jobs,
            admission=admission,
            model=model,
            clips=clips,
            closer=ClipCloser(clips),
            previews=Previews(stages.vae),
        )

    def start_runner(self) -> JobRunner:
        """Start the runner of this Director's jobs; call it inside the event loop."""
        return JobRunner(self.jobs, self.model.id, self.config.jobs, self.admission.check, self._make_pipeline)

    def make_maintenance(self) -> Maintenance:
        """Make the periodic work on jobs."""
        return Maintenance(self.jobs, self.model.id, self.config.jobs)

    def _make_pipeline(
        self,
        request: ResolvedRequest,
        context: RequestContext,
        job: Job,
        begin_from: TensorEnvelope | None,
        on_saved: Callable[[int, TensorEnvelope], None],
    ) -> Pipeline:
        # Skipping is allowed by today's configuration, not by that of the job's admission.
        is_skipped = job.skip_guardrails and self.config.guardrails.clients_may_disable
        return Pipeline(
            request=request,
            context=context,
            layout=self.layout,
            stages=self.stages.without_guardrail() if is_skipped else self.stages,
            clips=self.clips,
            media=self.jobs.media,
            config=self.config.director,
            close_later=self.closer.close_later,
            order_previews=partial(self.previews.order, job.previews) if job.previews else None,
            prompt_check=None if is_skipped else self.admission.prompt_check,
            begin_from=begin_from,
            on_saved=on_saved,
        )


def make_prompt_check(stages: Stages, guardrails: GuardrailsConfig) -> PromptCheck | None:
    """Return the check of prompts; None without a guardrail."""
    if stages.guardrail is None:
        return None
    return PromptCheck(stages.guardrail, guardrails.text_timeout_s, guardrails.clients_may_disable)
