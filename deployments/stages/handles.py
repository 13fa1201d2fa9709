"""Handles of the stages that the Director calls, and which of them a request needs."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from cosmos3_core.denoise_request import DenoiseRequest
from cosmos3_core.request import ResolvedRequest


@dataclass(frozen=True)
class StageHandles:
    """Handles of one app's deployments; None for stages that the app lacks.

    ``unguided`` serves requests without guidance, ``audio`` decodes sound, ``guardrail`` checks prompts and frames.
    """

    tokenizer: Any
    transformer: Any
    vae: Any
    encoder: Any
    unguided: Any = None
    audio: Any = None
    guardrail: Any = None

    def streaming(self) -> StageHandles:
        """Return handles whose calls stream; the tokenizer's stays unary.

        Call it once a process: each differently configured handle has a router of its own.
        """
        handles = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "tokenizer"}
        return replace(self, **{name: it and it.options(stream=True) for name, it in handles.items()})

    def gangs_for(self, request: DenoiseRequest) -> list[Any]:
        """Return the transformers that can take a request, the preferred one first."""
        if self.unguided is None:
            return [self.transformer]
        if len(request.prompts) == 1:
            return [self.unguided, self.transformer]
        return [self.transformer, self.unguided]

    def decoders_for(self, request: ResolvedRequest) -> dict[str, Any]:
        """Return the decoder of each modality that the request generates."""
        video = {"video": self.vae} if request.has_pictures else {}
        return video | ({"sound": self.audio} if request.num_sound_latents else {})
