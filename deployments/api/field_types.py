"""Types of request fields: their JSON schema, how the text of a form is read, which values they take."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from cosmos3_core import checks
from cosmos3_core.errors import RequestError
from cosmos3_core.field_spec import FieldSpec, ValueKind
from cosmos3_core.presets import LIMITS
from deployments.api.body_reader import FormText, read_json

Schema = dict[str, Any]

_MAX_SECONDS = 3600
_SIZE = r"\d{1,6}x\d{1,6}"
_NUMBER = r"\s*[-+.0-9eE]+\s*"


@dataclass(frozen=True)
class FieldType:
    """Type of a request field, as an annotation of pydantic models.

    Attributes:
        name: of the type, for FIELDS.md.
        about: what the field is for.
        schema: of its values in JSON.
        check: field, value -> the value that a request has; raises RequestError.
        parse: a form's text -> the value; raises ValueError where it holds none.
        takes_text: whether JSON bodies may have the form's text instead of the value.
        takes_several: whether a form may repeat the field, one value each.
        takes_file: whether it takes files, and references to them.
        form_schema: of its values in forms; None: the same as in JSON.
    """

    name: str
    about: str
    schema: Schema
    check: Callable[[str, Any], Any]
    parse: Callable[[str], Any] = str
    takes_text: bool = False
    takes_several: bool = False
    takes_file: bool = False
    form_schema: Schema | None = None

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate by :meth:`read` and ``check``, not by the annotated Python type."""

        def validate(value: Any, info: core_schema.ValidationInfo) -> Any:
            field = info.field_name or ""
            return self.check(field, self.read(field, value))

        return core_schema.with_info_plain_validator_function(validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """Return the schema; null is the same as an absent field."""
        return {"anyOf": [self.schema, {"type": "null"}], "description": self.about}

    def read(self, field: str, given: Any) -> Any:
        """Turn a form's text into the value that JSON has; return files, references and unreadable texts unchanged.

        Raises:
            RequestError: the field takes no file, or no text that long.
        """
        if self.takes_file:
            return given
        is_json = self.parse is read_json
        if isinstance(given, bytes):
            if not is_json:
                raise RequestError(field, "a file", "a text")
            given = FormText(given.decode("utf-8", "replace"))
        if self.takes_several and isinstance(given, list) and all(isinstance(it, FormText) for it in given):
            given = FormText(",".join(given))
        if not isinstance(given, str):
            return given
        if not is_json:
            checks.text(field, given, LIMITS.max_prompt_chars, may_be_empty=True)
        if isinstance(given, FormText) or self.takes_text:
            try:
                return self.parse(given)
            except ValueError:
                given = str(given)
        # Bounded, as an error's message may show a text that could not be read.
        return checks.text(field, given, LIMITS.max_prompt_chars, may_be_empty=True)


def text_type(about: str, *choices: str) -> FieldType:
    """Return the type of a text, one of ``choices`` if there are any."""
    return type_of_spec(FieldSpec(ValueKind.TEXT, about, choices=choices))


def integer_type(about: str, low: int, high: int) -> FieldType:
    """Return the type of a whole number within inclusive bounds."""
    return type_of_spec(FieldSpec(ValueKind.INTEGER, about, low=low, high=high))


def flag_type(about: str) -> FieldType:
    """Return the type of true and false."""
    return type_of_spec(FieldSpec(ValueKind.FLAG, about))


def type_of_spec(spec: FieldSpec) -> FieldType:
    """Return the type of a field by its specification."""

    def check(field: str, value: Any) -> Any:
        spec.check(field, value)
        return value

    new = partial(FieldType, spec.kind.value, spec.about, check=check)
    match spec.kind:
        case ValueKind.TEXT:
            bound: Schema = {"enum": list(spec.choices)} if spec.choices else {"maxLength": spec.max_chars}
            return new({"type": "string", **bound})
        case ValueKind.FLAG:
            return new({"type": "boolean"}, parse=_parse_flag)
        case ValueKind.INTEGER if spec.choices:
            texts: Schema = {"type": "string", "enum": [str(it) for it in spec.choices]}
            schema = any_of({"type": "integer", "enum": list(spec.choices)}, texts)
            return new(schema, parse=int, takes_text=True)
        case ValueKind.INTEGER | ValueKind.NUMBER:
            low, high = spec.bounds
            multiple = {"multipleOf": spec.multiple_of} if spec.multiple_of > 1 else {}
            schema = {"type": spec.kind.value, "minimum": low, "maximum": high, **multiple}
            return new(schema, parse=int if spec.kind is ValueKind.INTEGER else float)
        case ValueKind.INTEGERS:
            index: Schema = {"type": "integer", "minimum": spec.low}
            text = text_schema(rf"\s*\[?{_NUMBER}(,{_NUMBER})*\]?\s*")
            schema = any_of(index, {"type": "array", "items": index, "minItems": 1}, text)
            return new(schema, check=_keep, parse=_parser_of_list(int), takes_text=True, takes_several=True)
        case ValueKind.NUMBERS:
            pair = {**_NUMBERS, "minItems": spec.num_items, "maxItems": spec.num_items}
            schema = any_of(pair, text_schema(rf"\s*\[?{_NUMBER},{_NUMBER}\]?\s*"))
            return new(schema, parse=_parser_of_list(float), takes_text=True, takes_several=True)
        case ValueKind.ROWS:
            rows: Schema = {"type": "array", "items": _NUMBERS}
            answer: Schema = {"type": "object", "required": ["data"], "properties": {"data": rows}}
            text = text_schema(r"\s*(\[[\s\S]*\]|\{[\s\S]*\})\s*")
            schema = any_of({**rows, "minItems": 1}, answer, text)
            return new(schema, check=_rows, parse=read_json, takes_text=True, form_schema=text)
    raise AssertionError(f"a {spec.kind} has no JSON schema")


def size_type(about: str, *, is_auto_allowed: bool = False) -> FieldType:
    """Return the type of a size: WIDTHxHEIGHT, in one text."""
    pattern = f"({_SIZE}|auto)" if is_auto_allowed else _SIZE

    def check(field: str, value: Any) -> Any:
        if not isinstance(value, str) or not re.fullmatch(pattern, value, re.ASCII):
            raise RequestError(field, value, "WIDTHxHEIGHT, such as 1280x720")
        return value

    return FieldType("text", about, text_schema(pattern), check)


def seconds_type(about: str) -> FieldType:
    """Return the type of a length in seconds, as a number or a text."""
    number: Schema = {"type": "number", "exclusiveMinimum": 0, "maximum": _MAX_SECONDS}
    schema = any_of(number, text_schema(r"\s*[0-9]{1,4}(\.[0-9]+)?\s*"))
    check = partial(checks.real, low=1 / _MAX_SECONDS, high=_MAX_SECONDS)
    return FieldType("number", about, schema, check, float, takes_text=True)


def object_type(about: str) -> FieldType:
    """Return the type of an object, or of the JSON text of one."""
    text = text_schema(r"\s*\{[\s\S]*\}\s*")
    schema = any_of({"type": "object"}, text)
    return FieldType("object", about, schema, _check_object, read_json, takes_text=True, form_schema=text)


def prompt_type(about: str) -> FieldType:
    """Return the type of a prompt that must not be empty."""
    schema: Schema = {"type": "string", "pattern": r"\S", "maxLength": LIMITS.max_prompt_chars}
    check = partial(checks.text, max_chars=LIMITS.max_prompt_chars, may_be_empty=False)
    return FieldType("text", about, schema, check)


def any_of(*schemas: Schema) -> Schema:
    """Return the union of schemas."""
    return {"anyOf": list(schemas)}


def text_schema(pattern: str) -> Schema:
    """Return the schema of a text that matches a pattern entirely."""
    return {"type": "string", "pattern": f"^{pattern}$"}


_NUMBERS: Schema = {"type": "array", "items": {"type": "number"}}


def _parse_flag(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _parser_of_list(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [number(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _keep(field: str, value: Any) -> Any:
    return value


def _rows(field: str, value: Any) -> Any:
    return value["data"] if isinstance(value, dict) and "data" in value else value  # as answers hold actions


def _check_object(field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(field, value, "a JSON object")
    return value
