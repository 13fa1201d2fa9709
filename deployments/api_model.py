"""ApiModel, base of the JSON answers that the API writes and the Python client reads; the served model as one."""

from __future__ import annotations

import time
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from cosmos3_core.checkpoint.layout import FAMILY, CheckpointLayout
from cosmos3_core.resolve import find_offered_modes

JSON = "application/json"


class ApiModel(BaseModel):
    """Base of the API's answers: frozen, with every field in each answer.

    A client ignores fields that its version does not know. Bounds are in the schema only: the server has checked its
    values before it answers.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.model_dump(mode="json")


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
