"""Types of request fields: their JSON schema, how a form's text is read, which values they take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from cosmos3_core.field_spec import FieldSpec, ValueKind
from cosmos3_core.presets import LIMITS
from cosmos3_core.request import FIELDS
from deployments.api.json_text import read_json
from deployments.api.media_fields import file_bytes

Schema = dict[str, Any]


class FormText(str):
    """Text of a form; its field decides how it is read."""

    __slots__ = ()


@dataclass(frozen=True)
class FieldType:
    """Type of a request field, as an annotation of pydantic models.

    Attributes:
        name: of the type, for FIELDS.md.
        about: what the field is for.
        schema: of its values in JSON.
        check: takes the field's name and a value; returns the value, or raises RequestError.
        read: a form's text -> value; raises ValueError where it is none.
        is_text_too: whether JSON bodies may have the form's text instead of the value.
        is_list: whether a form may have the field several times, once a value.
        form_schema: of its values in forms; None: the same as in JSON.
    """

    name: str
    about: str
    schema: Schema
    check: Callable[[str, Any], Any]
    read: Callable[[str], Any] = str
    is_text_too: bool = False
    is_list: bool = False
    form_schema: Schema | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by :meth:`value_of`, whatever the annotated Python type is."""
        return core_schema.with_info_plain_validator_function(
            lambda value, info: self.value_of(info.field_name or "", value)
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """Return the schema; null is the same as an absent field."""
        return {"anyOf": [self.schema, {"type": "null"}], "description": self.about}

    def value_of(self, field: str, given: Any) -> Any:
        """Read a value and check it.

        Raises:
            RequestError: the field does not take it.
        """
        return self.check(field, self.read_value(field, given))

    def read_value(self, field: str, given: Any) -> Any:
        """Return a value as JSON has it; a text that cannot be read, and a file or reference to one, as it is.

        Args:
            field: name of the field.
            given: its value in JSON, :class:`FormText`, or the bytes of a file.

        Raises:
            RequestError: it is a file or a long text that the field does not take.
        """
        if self.check is file_bytes:
            return given
        if isinstance(given, bytes):
            if self.read is not read_json:
                raise RequestError(field, "a file", "a text")
            given = FormText(given.decode("utf-8", "replace"))  # a JSON file
        if self.is_list and isinstance(given, list) and all(isinstance(it, FormText) for it in given):
            given = FormText(",".join(given))
        if not isinstance(given, str):
            return given
        if self.read is not read_json:
            checks.text(field, given, LIMITS.max_prompt_chars, may_be_empty=True)
        if isinstance(given, FormText) or self.is_text_too:
            try:
                return self.read(given)
            except ValueError:
                given = str(given)
        # What could not be read goes into an error's message at most.
        return checks.text(field, given, LIMITS.max_prompt_chars, may_be_empty=True)


def like_request(name: str) -> FieldType:
    """Return the type of a field that :class:`GenerationRequest` has as well, with its bounds and description."""
    return specified(FIELDS[name])


def specified(spec: FieldSpec) -> FieldType:
    """Return the type of a field by its specification."""
    kind = spec.kind

    def check(field: str, value: Any) -> Any:
        spec.check(field, value)
        return value

    checks_by_kind = {ValueKind.INTEGERS: _anything, ValueKind.ROWS: _rows}
    return FieldType(
        name=kind.value,
        about=spec.about,
        schema=_schema_of(spec),
        check=checks_by_kind.get(kind, check),
        read=_READERS[kind],
        is_text_too=kind in (*_LISTS, ValueKind.ROWS) or (kind is ValueKind.INTEGER and bool(spec.choices)),
        is_list=kind in _LISTS,
        form_schema=_JSON_ROWS if kind is ValueKind.ROWS else None,
    )


def text_type(about: str, *choices: str) -> FieldType:
    """Return the type of a text; of one of these where there are any."""
    return specified(FieldSpec(ValueKind.TEXT, about, choices=choices))


def integer_type(about: str, low: int, high: int) -> FieldType:
    """Return the type of a whole number within bounds, which count as within."""
    return specified(FieldSpec(ValueKind.INTEGER, about, low=low, high=high))


def flag_type(about: str) -> FieldType:
    """Return the type of true and false."""
    return specified(FieldSpec(ValueKind.FLAG, about))


def file_type(about: str, *, is_list: bool = False) -> FieldType:
    """Return the type of an image or a clip; in multipart forms the file itself."""
    references: Schema = {"type": "array", "items": _REFERENCE, "minItems": 1, "maxItems": 1}
    binary: Schema = {"type": "string", "format": "binary"}
    return FieldType("file", about, _any_of(_REFERENCE, references), file_bytes, form_schema=binary, is_list=is_list)


def size_type(about: str, *, is_auto_allowed: bool = False) -> FieldType:
    """Return the type of a width and a height in one text."""
    allowed = f"({_SIZE}|auto)" if is_auto_allowed else _SIZE

    def check(field: str, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(allowed, value, re.ASCII):
            raise RequestError(field, value, "WIDTHxHEIGHT, such as 1280x720")
        return value

    return FieldType("text", about, _string(allowed), check)


def parse_size(size: str) -> tuple[int, int]:
    """Return the width and the height of a checked size."""
    width, height = map(int, size.split("x"))
    return width, height


def seconds_type(about: str) -> FieldType:
    """Return the type of a length in seconds, as a number or a text."""
    number: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_SECONDS}
    schema = _any_of(number, _string(r"\s*[0-9]{1,4}(\.[0-9]+)?\s*"))
    return FieldType("number", about, schema, _check_seconds, float, is_text_too=True)


def object_type(about: str) -> FieldType:
    """Return the type of an object, or of the JSON text of one."""
    schema = _any_of({"type": "object"}, _JSON_OBJECT)
    return FieldType("object", about, schema, _object, read_json, is_text_too=True, form_schema=_JSON_OBJECT)


def prompt_type(about: str) -> FieldType:
    """Return the type of a prompt that must not be empty."""
    schema: Schema = {"type": "string", "pattern": r"\S", "maxLength": LIMITS.max_prompt_chars}
    return FieldType("text", about, schema, _check_prompt)


def _flag(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _list_of(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [number(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _anything(field: str, value: Any) -> Any:
    return value


def _rows(field: str, value: Any) -> Any:
    return value["data"] if isinstance(value, dict) and "data" in value else value  # as answers have them


def _object(field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(field, value, "a JSON object")
    return value


def _check_seconds(field: str, value: Any) -> float:
    return checks.real(field, value, 1 / _MAX_SECONDS, _MAX_SECONDS)


def _check_prompt(field: str, value: Any) -> str:
    return checks.text(field, value, LIMITS.max_prompt_chars, may_be_empty=False)


def _any_of(*schemas: Schema) -> Schema:
    return {"anyOf": list(schemas)}


def _string(pattern: str) -> Schema:
    return {"type": "string", "pattern": f"^{pattern}$"}


def _schema_of(spec: FieldSpec) -> Schema:
    match spec.kind:
        case ValueKind.TEXT if spec.choices:
            return {"type": "string", "enum": list(spec.choices)}
        case ValueKind.TEXT:
            return {"type": "string", "maxLength": spec.max_chars}
        case ValueKind.FLAG:
            return {"type": "boolean"}
        case ValueKind.INTEGER if spec.choices:
            texts: Schema = {"type": "string", "enum": [str(it) for it in spec.choices]}
            return _any_of({"type": "integer", "enum": list(spec.choices)}, texts)
        case ValueKind.INTEGER | ValueKind.NUMBER:
            low, high = spec.bounds
            multiple = {"multipleOf": spec.multiple_of} if spec.multiple_of > 1 else {}
            return {"type": spec.kind.value, "minimum": low, "maximum": high, **multiple}
        case ValueKind.INTEGERS:
            index: Schema = {"type": "integer", "minimum": spec.low}
            indexes: Schema = {"type": "array", "items": index, "minItems": 1}
            return _any_of(index, indexes, _string(rf"\s*\[?{_NUMBER}(,{_NUMBER})*\]?\s*"))
        case ValueKind.NUMBERS:
            pair = {**_NUMBERS, "minItems": spec.num_items, "maxItems": spec.num_items}
            return _any_of(pair, _string(rf"\s*\[?{_NUMBER},{_NUMBER}\]?\s*"))
        case ValueKind.ROWS:
            rows: Schema = {"type": "array", "items": _NUMBERS}
            answer: Schema = {"type": "object", "required": ["data"], "properties": {"data": rows}}
            return _any_of({**rows, "minItems": 1}, answer, _JSON_ROWS)
    raise AssertionError(f"a {spec.kind} has no JSON schema")


_LISTS = (ValueKind.INTEGERS, ValueKind.NUMBERS)
_READERS: dict[ValueKind, Callable[[str], Any]] = {
    ValueKind.TEXT: str,
    ValueKind.INTEGER: int,
    ValueKind.NUMBER: float,
    ValueKind.FLAG: _flag,
    ValueKind.INTEGERS: _list_of(int),
    ValueKind.NUMBERS: _list_of(float),
    ValueKind.ROWS: read_json,
}
_MAX_SECONDS = 3600
_SIZE = r"\d{1,6}x\d{1,6}"
_NUMBER = r"\s*[-+.0-9eE]+\s*"
_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}
_JSON_OBJECT = _string(r"\s*\{[\s\S]*\}\s*")
_JSON_ROWS = _string(r"\s*(\[[\s\S]*\]|\{[\s\S]*\})\s*")
_URL: Schema = {"type": "string", "minLength": 1, "description": "a data URL, base64, or a URL where they are fetched"}
_REFERENCE = _any_of(_URL, {"type": "object", "minProperties": 1, "maxProperties": 1})
