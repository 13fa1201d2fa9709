"""The served model, as ``/v1/models`` shows it."""

from __future__ import annotations

import time
from typing import Literal

from cosmos3_core.checkpoint.layout import FAMILY, CheckpointLayout
from cosmos3_core.errors import CapabilityError
from cosmos3_core.resolve import find_offered_modes
from deployments.api_model import ApiModel
from deployments.config import AudioVAEStage


class Model(ApiModel):
    """A model that the app serves, and the modes that it offers: OpenAI's model object with our fields."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    family: str
    variant: str
    modes: tuple[str, ...]

    @classmethod
    def of(cls, layout: CheckpointLayout, name: str | None, *, is_sound_offered: bool) -> Model:
        """Return a checkpoint's model; ``name`` defaults to the checkpoint's."""
        return cls(
            id=name or layout.name,
            object="model",
            created=int(time.time()),
            owned_by="nvidia",
            family=FAMILY,
            variant=layout.variant,
            modes=find_offered_modes(layout, is_sound_offered=is_sound_offered),
        )


class ModelList(ApiModel):
    """All models that the app serves."""

    object: Literal["list"]
    data: tuple[Model, ...]

    @classmethod
    def of(cls, model: Model) -> ModelList:
        """Return the list of one model."""
        return cls(object="list", data=(model,))


def offers_sound(audio: AudioVAEStage, layout: CheckpointLayout) -> bool:
    """Return whether an app decodes sound; raise CapabilityError if it is enabled and the checkpoint makes none."""
    if audio.enabled and not layout.has_sound:
        raise CapabilityError("audio.enabled", True, "null or false", f"{layout.name} makes no sound.")
    return layout.has_sound if audio.enabled is None else audio.enabled
