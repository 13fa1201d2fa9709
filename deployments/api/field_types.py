"""Types of request fields: their JSON schema, how the text of a form is read, which values they take.

A field of an image or a clip holds the bytes of a file, however clients send them. No path is ever opened.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic_core import CoreSchema, core_schema

from cosmos3_core import checks
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.field_spec import FieldSpec, ValueKind
from cosmos3_core.media.kinds import CLIP, CLIP_KINDS_TEXT, IMAGE_KINDS_TEXT, STILL, kind_of
from cosmos3_core.presets import LIMITS
from deployments.api.body_reader import FormText, read_json

Schema = dict[str, Any]

MEDIA = ("image", "video", "input_reference", "input_references", "image_reference", "video_reference")
"""Fields that bring an image or a clip."""

_BYTES_PER_BASE64_CHAR = 0.75
_MAX_SCHEME_CHARS = 60
_WITHOUT_SPACE = dict.fromkeys(map(ord, " \t\r\n\f\v"))
_REMOTE = ("http://", "https://")
_ALLOWED = "a file part of a multipart form, a data URL (data:image/png;base64,...), or base64"
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
        """Validate by :meth:`normalize` and ``check``, not by the annotated Python type."""

        def validate(value: Any, info: core_schema.ValidationInfo) -> Any:
            field = info.field_name or ""
            return self.check(field, self.normalize(field, value))

        return core_schema.with_info_plain_validator_function(validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> Schema:
        """Return the schema; null is the same as an absent field."""
        return {"anyOf": [self.schema, {"type": "null"}], "description": self.about}

    def normalize(self, field: str, given: Any) -> Any:
        """Turn a form's text into the value that JSON has; return files, references and unreadable texts unchanged."""
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
        if spec.kind is ValueKind.INTEGER and isinstance(value, float) and value.is_integer():
            value = int(value)  # JSON has one kind of number: some clients write 13.0
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
            return new(
                schema,
                check=lambda field, value: value,
                parse=_parser_of_list(int),
                takes_text=True,
                takes_several=True,
            )
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
_URL: Schema = {"type": "string", "minLength": 1, "description": "a data URL, base64, or a URL where they are fetched"}
_REFERENCE = any_of(_URL, {"type": "object", "minProperties": 1, "maxProperties": 1})


def _parse_flag(text: str) -> bool:
    values = {"true": True, "1": True, "false": False, "0": False}
    if text.lower() not in values:
        raise ValueError(text)
    return values[text.lower()]


def _parser_of_list(number: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [number(part) for part in text.strip().removeprefix("[").removesuffix("]").split(",")]


def _rows(field: str, value: Any) -> Any:
    return value["data"] if isinstance(value, dict) and "data" in value else value  # as answers hold actions


def _check_object(field: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RequestError(field, value, "a JSON object")
    return value


def file_type(about: str, *, takes_several: bool = False) -> FieldType:
    """Return the type of an image or a clip; in multipart forms the file itself."""
    references: Schema = {"type": "array", "items": _REFERENCE, "minItems": 1, "maxItems": 1}
    return FieldType(
        "file",
        about,
        any_of(_REFERENCE, references),
        check=decode_file,
        takes_several=takes_several,
        takes_file=True,
        form_schema={"type": "string", "format": "binary"},
    )


def find_urls(values: dict[str, Any]) -> dict[str, str]:
    """Return the fields that hold a URL of another server, with the URL."""
    references = {name: values[name] for name in MEDIA if name in values and _file_part(values[name]) is None}
    texts = {name: _text_of(name, value) for name, value in references.items()}
    longest = max(map(len, _REMOTE))
    return {name: str(text) for name, text in texts.items() if text[:longest].lower().startswith(_REMOTE)}


def _file_part(value: Any) -> bytes | None:
    """Return the file of a form's part, alone or in a list of one; None for another value."""
    if isinstance(value, list) and len(value) == 1:
        (value,) = value
    return value if isinstance(value, bytes) else None


def find_media(values: Mapping[str, Any]) -> dict[str, tuple[str, bytes]]:
    """Return kind -> (field, file) of image and clip; raise RequestError for two of a kind, or any other file."""
    found: dict[str, tuple[str, bytes]] = {}
    for name in MEDIA:
        if name not in values:
            continue
        data = values[name]
        kind = _detect_kind(name, data) if name.startswith("input") else name.removesuffix("_reference")
        if kind in found:
            raise RequestError(name, "given", f"nothing beside {found[kind][0]}", f"A request has one {kind} at most.")
        found[kind] = name, data
    return found


def decode_file(field: str, value: Any) -> bytes:
    """Return the file that a field holds: a file part, a text, an object of one URL, or a list of one of these."""
    data = _file_part(value)
    if data is None:
        text = _text_of(field, value)
        refuse_too_large(field, int(len(text) * _BYTES_PER_BASE64_CHAR))
        data = _decode(field, text)
    if not data:
        raise RequestError(field, "an empty file", _ALLOWED)
    refuse_too_large(field, len(data))
    return data


def _detect_kind(field: str, data: bytes) -> str:
    kind = kind_of(data)
    if kind.category not in (STILL, CLIP):
        raise RequestError(field, f"a file of kind {kind.name}", f"{IMAGE_KINDS_TEXT}, or {CLIP_KINDS_TEXT}")
    return "image" if kind.category == STILL else "video"


def _text_of(field: str, value: Any) -> str:
    """Return the URL or base64 in a reference."""
    if isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
        try:
            value = read_json(value)
        except ValueError:
            raise _unreadable(field, value) from None
    if isinstance(value, list):
        if len(value) > 1 and field == "input_references":
            raise CapabilityError(field, f"a list of {len(value)}", "a list of one", "Not offered: several references.")
        if len(value) != 1:
            raise RequestError(field, f"a list of {len(value)}", "one reference, or a list of one")
        (value,) = value
    if isinstance(value, dict):
        kind = field.removesuffix("s").removesuffix("_reference")
        keys = ("image_url", "video_url") if kind == "input" else (f"{kind}_url",)
        allowed = f"an object of {' or '.join(keys)}"
        if "file_id" in value:
            raise RequestError(field, value, allowed, "No files can be uploaded here: send it.")
        if len(value) != 1 or next(iter(value)) not in keys:
            raise RequestError(field, sorted(value), f"{allowed} and nothing else")
        (value,) = value.values()
        if isinstance(value, dict) and list(value) == ["url"]:  # as chat completions have it
            value = value["url"]
    if not isinstance(value, str):
        raise RequestError(field, type(value).__name__, _ALLOWED)
    return value


def _decode(field: str, text: str) -> bytes:
    head, comma, encoded = text.partition(",") if text[:5].lower() == "data:" else ("", "", text)
    if head and not (comma and head.lower().endswith(";base64")):
        raise RequestError(field, text, "a data URL with base64: data:image/png;base64,...")
    if "://" in text[:_MAX_SCHEME_CHARS] and not head:
        raise RequestError(field, text, _ALLOWED, "URLs are not fetched: send the file itself.")
    try:
        return base64.b64decode(encoded.translate(_WITHOUT_SPACE), validate=True)
    except ValueError:
        raise _unreadable(field, text) from None


def _unreadable(field: str, text: str) -> RequestError:
    return RequestError(field, text, _ALLOWED, "This is neither; is it cut off?")


def refuse_too_large(field: str, num_bytes: int) -> None:
    """Raise RequestError for a file of more bytes than any may have."""
    if num_bytes > LIMITS.max_media_bytes:
        given, allowed = f"a file of {num_bytes} bytes", f"at most {LIMITS.max_media_bytes} bytes"
        raise RequestError(field, given, allowed, "Send a smaller file.")
