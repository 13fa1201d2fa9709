"""What a body gives: every field under its own name and read, and what was accepted without effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cosmos3_core import checks
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.presets import LIMITS
from deployments.api.field_kinds import FILE, INDEXES, NUMBERS, OBJECT, ROWS, FormText, Kind
from deployments.api.fields import Endpoint, Use, find_field

_MAX_SHOWN_CHARS = 200
# A value's own cost beside its characters.
_CHARS_PER_VALUE = 8


@dataclass(frozen=True)
class Given:
    """See the module.

    Attributes:
        endpoint: whose body it is.
        values: by the fields' own names; those of ``extra_params`` are among them, those that are null are not.
        warnings: one for each field that was accepted without effect.
    """

    endpoint: Endpoint
    values: dict[str, Any]
    warnings: tuple[str, ...]


def read_given(fields: Mapping[str, Any], endpoint: Endpoint) -> Given:
    """The fields of a body.

    Args:
        fields: of a JSON body as they are; of a form :class:`FormText`, and the bytes of files.
        endpoint: whose body it is.

    Raises:
        RequestError: an unknown field (names the nearest known one), or one given twice.
        CapabilityError: one that asks for what is not offered.
    """
    values: dict[str, Any] = {}
    warnings: list[str] = []
    _merge(values, warnings, fields, endpoint, "")
    extra = values.pop("extra_params", {})
    if not isinstance(extra, dict) or "extra_params" in extra:
        raise RequestError("extra_params", start_of(extra), "a JSON object, without extra_params in it")
    _merge(values, warnings, extra, endpoint, "extra_params.")
    return Given(endpoint, values, tuple(warnings))


def start_of(value: Any) -> Any:
    """A value for a message: of a long text or file its beginning."""
    return value[:_MAX_SHOWN_CHARS] if isinstance(value, str | bytes) else value


def _merge(
    values: dict[str, Any], warnings: list[str], fields: Mapping[str, Any], endpoint: Endpoint, where: str
) -> None:
    for written, value in fields.items():
        name, field = find_field(written, start_of(value), endpoint)
        if value is None:
            continue
        use = field.uses[endpoint]
        if use is Use.NOT_OFFERED:
            raise CapabilityError(written, start_of(value), "nothing", f"Not offered: {field.about}.")
        if use is Use.IGNORED:
            _check_small(written, value)
            warnings.append(f"{where}{written} is without effect: {field.about}")
            continue
        value = _read(written, value, field.kind)
        if name in values and values[name] != value:
            raise RequestError(written, start_of(value), f"one value; {name} is given with another one as well")
        values[name] = value


def _read(name: str, value: Any, kind: Kind) -> Any:
    """What a field holds; what cannot be read stays text, for the library to refuse."""
    if isinstance(value, bytes) and kind in (ROWS, OBJECT):
        value = FormText(value.decode("utf-8", "replace"))  # a JSON file
    if isinstance(value, bytes) and kind is not FILE:
        raise RequestError(name, "a file", "a text")
    if kind in (INDEXES, NUMBERS) and isinstance(value, list) and all(isinstance(it, FormText) for it in value):
        value = FormText(",".join(value))  # a form's list
    if isinstance(value, str) and kind not in (FILE, ROWS, OBJECT):
        checks.text(name, value, LIMITS.max_prompt_chars, may_be_empty=True)
    if isinstance(value, FormText) or (isinstance(value, str) and kind.is_text_too):
        try:
            value = kind.read(value)
        except ValueError:
            value = str(value)
    if isinstance(value, str) and kind in (ROWS, OBJECT):
        checks.text(name, value, LIMITS.max_prompt_chars, may_be_empty=True)  # what could not be read goes no further
    return value


def _check_small(name: str, value: Any) -> None:
    """What is not used must not be large either.

    Raises:
        RequestError: it is.
    """
    if isinstance(value, bytes):
        raise RequestError(name, "a file", "a text", "It has no effect anyway.")
    left, waiting = LIMITS.max_prompt_chars, [value]
    while waiting:
        it = waiting.pop()
        left -= _CHARS_PER_VALUE + (len(it) if isinstance(it, str | list | dict) else 0)
        if left < 0:
            given = start_of(value) if isinstance(value, str) else f"a large {type(value).__name__}"
            raise RequestError(name, given, f"at most {LIMITS.max_prompt_chars} characters", "It has no effect anyway.")
        if isinstance(it, dict):
            waiting += [*it, *it.values()]
        elif isinstance(it, list):
            waiting += it
