"""A job's walk behind a look at its prompt.

A prompt is looked at before its request is accepted. The app may have been started anew since then, with a guardrail
that it had none of, or that requests can no longer do without: what waited meanwhile is looked at before it is begun.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass

from deployments.director.guardrail_calls import PromptCheck
from deployments.director.pipeline import Walk
from deployments.messages import Event


@dataclass(frozen=True)
class GuardedWalk:
    """See the module.

    Attributes:
        walk: that is begun when the prompt has passed.
        prompt_check: that it has to pass.
    """

    walk: Walk
    prompt_check: PromptCheck

    async def events(self) -> AsyncIterator[Event]:
        """Those of the walk.

        Raises:
            ContentBlocked, GuardrailUnavailable, StageFailed: its prompt must not be used, or nobody can say so.
            Cosmos3Error: as :meth:`deployments.director.pipeline.Walk.events`.
        """
        walk = self.walk
        async for retry in self.prompt_check.before_a_walk(walk.context, walk.max_attempts, walk.request.prompt):
            yield retry
        async for event in walk.events():
            yield event
