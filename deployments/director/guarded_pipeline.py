"""A pipeline that begins once the guardrail has passed the prompt.

A prompt is looked at before its request is accepted. The app may have been started anew since then, with a guardrail
that it had none of, or that requests can no longer do without: what waited meanwhile is looked at before it is begun.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from deployments.director.guardrail_calls import PromptCheck
from deployments.director.pipeline import Pipeline
from deployments.messages import Event


@dataclass(frozen=True)
class GuardedPipeline:
    """See the module.

    Attributes:
        pipeline: that is begun when the prompt has passed.
        prompt_check: that it has to pass.
    """

    pipeline: Pipeline
    prompt_check: PromptCheck

    async def events(self) -> AsyncIterator[Event]:
        """Those of the pipeline.

        Raises:
            ContentBlocked, GuardrailUnavailable, StageFailed: its prompt must not be used, or nobody can say so.
            Cosmos3Error: as :meth:`deployments.director.pipeline.Pipeline.events`.
        """
        pipeline, prompt = self.pipeline, self.pipeline.request.prompt
        async for retry in self.prompt_check.check_before(pipeline.context, pipeline.max_attempts, prompt):
            yield retry
        async for event in pipeline.events():
            yield event
