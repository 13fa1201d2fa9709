"""What a body gives: every field under its own name and read, and what was accepted without effect."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cosmos3_core import checks
from cosmos3_core.errors import CapabilityError, RequestError
from cosmos3_core.presets import LIMITS
from deployments.api.body_limit import MAX_FIELDS
from deployments.api.field_kinds import FILE, INDEXES, NUMBERS, OBJECT, ROWS, FormText, Kind
from deployments.api.fields import Endpoint, Use, find_field
from deployments.api.written import FieldOrigin, FieldOrigins

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
        origins: of fields that were given by another name.
    """

    endpoint: Endpoint
    values: dict[str, Any]
    warnings: tuple[str, ...]
    origins: FieldOrigins


def read_given(fields: Mapping[str, Any], endpoint: Endpoint) -> Given:
    """The fields of a body.

    Args:
        fields: of a JSON body as they are; of a form :class:`FormText`, and the bytes of files.
        endpoint: whose body it is.

    Raises:
        RequestError: an unknown field (names the nearest known one), one given twice, or too many.
        CapabilityError: one that asks for what is not offered.
    """
    found = _Found(endpoint)
    found.add(fields, "")
    extra = found.values.pop("extra_params", {})
    if not isinstance(extra, dict) or "extra_params" in extra:
        raise RequestError("extra_params", start_of(extra), "a JSON object, without extra_params in it")
    if len(extra) > MAX_FIELDS:
        raise RequestError("extra_params", f"an object of {len(extra)} fields", f"at most {MAX_FIELDS} of them")
    found.add(extra, "extra_params.")
    origins = {name: FieldOrigin(written) for name, written in found.names.items() if written != name}
    return Given(endpoint, found.values, tuple(found.warnings), origins)


def start_of(value: Any) -> Any:
    """A value for a message: of a long text or file its beginning."""
    return value[:_MAX_SHOWN_CHARS] if isinstance(value, str | bytes) else value


@dataclass
class _Found:
    """What was read so far.

    Attributes:
        endpoint, values, warnings: as of :class:`Given`.
        names: by the fields' own names, what the body calls them; where it has several names for one, its own.
    """

    endpoint: Endpoint
    values: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    def add(self, fields: Mapping[str, Any], where: str) -> None:
        """Read more; ``where`` stands before their names in warnings."""
        for written, value in fields.items():
            name, known = find_field(written, start_of(value), self.endpoint)
            if value is None:
                continue
            use = known.uses[self.endpoint]
            if use is Use.NOT_OFFERED:
                raise CapabilityError(written, start_of(value), "nothing", f"Not offered: {known.about}.")
            if use is Use.IGNORED:
                _check_small(written, value)
                self.warnings.append(f"{where}{written} is {known.without_effect_at(self.endpoint)}")
                continue
            value = _read(written, value, known.kind)
            if name in self.values and self.values[name] != value:
                raise RequestError(written, start_of(value), f"one value; {name} is given with another one as well")
            self.values[name] = value
            self.names[name] = written if self.names.get(name, written) == written else name


def _read(name: str, value: Any, kind: Kind) -> Any:
    """What a field holds; what cannot be read stays text, for the library to refuse."""
    if isinstance(value, bytes) and kind in (ROWS, OBJECT):
        value = FormText(value.decode("utf-8", "replace"))  # a JSON file
    if kind is FILE and isinstance(value, list) and len(value) == 1 and isinstance(value[0], bytes):
        value = value[0]  # a form's list of one file part
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
