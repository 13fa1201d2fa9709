"""Handles of the stages that the Director calls."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.request import ResolvedRequest


@dataclass(frozen=True)
class Stages:
    """Of one app.

    ``unguided`` are gangs for requests that need one branch of guidance only, ``audio`` decodes sound, ``guardrail``
    looks at every frame before it is in a file; where the app has such.
    """

    tokenizer: Any
    transformer: Any
    vae: Any
    encoder: Any
    unguided: Any = None
    audio: Any = None
    guardrail: Any = None

    def streaming(self) -> Stages:
        """As they are called: all but the tokenizer answer with streams.

        Once a process: every differently configured handle has a router of its own.
        """
        handles = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "tokenizer"}
        return replace(self, **{name: it and it.options(stream=True) for name, it in handles.items()})

    def without_guardrail(self) -> Stages:
        """For a request that does without, which the operator has to allow."""
        return replace(self, guardrail=None)

    def gangs_for(self, job: DenoiseRequest) -> list[Any]:
        """The transformers that can take a request, the best one first."""
        if self.unguided is None:
            return [self.transformer]
        if len(job.prompts) == 1:
            return [self.unguided, self.transformer]
        return [self.transformer, self.unguided]

    def decoders_for(self, request: ResolvedRequest) -> dict[str, Any]:
        """Who decodes which of a request's latents."""
        video = {"video": self.vae} if request.has_pictures else {}
        return video | ({"sound": self.audio} if request.sound is not None else {})
