"""ApiModel: base of the JSON answers that the API writes and the Python client reads."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """Base of the API's answers: frozen, with every field in each answer.

    A client ignores fields that its version does not know. Bounds are in the schema only: the server has checked its
    values before it answers.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.model_dump(mode="json")
