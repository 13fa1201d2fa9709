"""How a field of a request body is written: its JSON schema, and how a form's text is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cosmos3_core.field_spec import FieldSpec
from cosmos3_core.presets import LIMITS
from deployments.api.json_text import read_json

Schema = dict[str, Any]


class FormText(str):
    """A form's text: what it means depends on the field."""

    __slots__ = ()


@dataclass(frozen=True)
class Kind:
    """How a field is written.

    Attributes:
        name: for tables.
        schema: in JSON, as OpenAPI says it.
        read: a form's text -> value; ValueError where it is none.
        is_text_too: JSON bodies may have the form's text in it as well.
    """

    name: str
    schema: Schema
    read: Callable[[str], Any]
    is_text_too: bool = False

    def within(self, low: float, high: float) -> Kind:
        """The same, of numbers from ``low`` to ``high``."""
        return replace(self, schema={**self.schema, "minimum": low, "maximum": high})

    def bounded_by(self, spec: FieldSpec) -> Kind:
        """The same, of numbers within the bounds of a request's field."""
        return self.within(*spec.bounds)

    def pixels(self) -> Kind:
        """The same, of a number of pixels."""
        return replace(self, schema={**self.within(16, LIMITS.max_side_pixels).schema, "multipleOf": 16})

    def of(self, *values: str | int) -> Kind:
        """The same, one of these values."""
        return replace(self, schema={**self.schema, "enum": list(values)})

    def or_text(self) -> Kind:
        """The same, of listed values, which JSON bodies may have as text too."""
        text = {"type": "string", "enum": [str(value) for value in self.schema["enum"]]}
        return replace(self, schema={"anyOf": [self.schema, text]}, is_text_too=True)


def _flag(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _list_of(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [number(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


_TEXT: Schema = {"type": "string", "maxLength": LIMITS.max_prompt_chars}
_JSON_OBJECT: Schema = {"type": "string", "pattern": r"^\s*\{[\s\S]*\}\s*$"}
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_INTEGERS: Schema = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_WRITTEN_LIST = r"^\s*\[?\s*[-+.0-9eE]+\s*(,\s*[-+.0-9eE]+\s*)*\]?\s*$"
_WRITTEN_PAIR = r"^\s*\[?\s*[-+.0-9eE]+\s*,\s*[-+.0-9eE]+\s*\]?\s*$"
_URL: Schema = {"type": "string", "minLength": 1, "description": "a data URL, base64, or a URL where they are fetched"}
_NAMED_URL: Schema = {"anyOf": [_URL, {"type": "object", "minProperties": 1, "maxProperties": 1}]}

TEXT = Kind("text", _TEXT, str)
INTEGER = Kind("integer", {"type": "integer"}, int)
NUMBER = Kind("number", {"type": "number"}, float)
SECONDS = Kind(
    "number",
    {
        "anyOf": [
            {"type": "number", "exclusiveMinimum": 0, "maximum": 3600},
            {"type": "string", "pattern": r"^\s*[0-9]{1,4}(\.[0-9]+)?\s*$"},
        ]
    },
    float,
    is_text_too=True,
)
FLAG = Kind("boolean", {"type": "boolean"}, _flag)
INDEXES = Kind(
    "integers",
    {"anyOf": [{"type": "integer", "minimum": 0}, _INTEGERS, {"type": "string", "pattern": _WRITTEN_LIST}]},
    _list_of(int),
    is_text_too=True,
)
NUMBERS = Kind(
    "numbers",
    {
        "anyOf": [
            {**_NUMBERS, "minItems": 2, "maxItems": 2},
            {"type": "string", "pattern": _WRITTEN_PAIR},
        ]
    },
    _list_of(float),
    is_text_too=True,
)
ROWS = Kind(
    "rows of numbers",
    {
        "anyOf": [
            {"type": "array", "items": _NUMBERS, "minItems": 1},
            {"type": "object", "required": ["data"], "properties": {"data": {"type": "array", "items": _NUMBERS}}},
            {"type": "string", "pattern": r"^\s*(\[[\s\S]*\]|\{[\s\S]*\})\s*$"},
        ]
    },
    read_json,
    is_text_too=True,
)
OBJECT = Kind("object", {"anyOf": [{"type": "object"}, _JSON_OBJECT]}, read_json, is_text_too=True)
FILE = Kind("file", {"anyOf": [_NAMED_URL, {"type": "array", "items": _NAMED_URL, "minItems": 1, "maxItems": 1}]}, str)
"""An image or a clip; in multipart forms the file itself."""
ANYTHING = Kind("anything", {}, str)
"""Of fields that are not read."""
