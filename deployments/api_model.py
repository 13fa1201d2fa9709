"""ApiModel: base of what the API answers as JSON, and of what the Python client reads of it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict


class ApiModel(BaseModel):
    """Frozen, with all of its fields in each answer.

    A client ignores fields that its version does not know. Bounds are in the schema and not checked: an answer is made
    of values that were checked, and a client has no better ones.
    """

    model_config = ConfigDict(frozen=True, json_schema_extra={"additionalProperties": False})

    def as_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return self.model_dump(mode="json")
