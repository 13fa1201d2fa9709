"""Bounds and description of a request's field, as data beside the field.

Every field of :class:`~cosmos3_core.request.GenerationRequest` carries a :class:`FieldSpec`, and
:data:`cosmos3_core.request.FIELDS` lists them by name: ``resolve``, the command line and the HTTP models read a field's
bounds, choices and description there. Nothing heavy is imported here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import Field, dataclass, field
from enum import StrEnum
from typing import Any

from cosmos3_core import checks
from cosmos3_core.conditioning.modes import MODES, Mode
from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS

_METADATA_KEY = "spec"


class ValueKind(StrEnum):
    """The type of a field's value."""

    TEXT = "text"
    INTEGER = "integer"
    NUMBER = "number"
    FLAG = "boolean"
    INTEGERS = "integers"
    NUMBERS = "numbers"
    ROWS = "rows of numbers"
    IMAGE = "image"
    VIDEO = "video"
    TENSORS = "tensors"


def _is_for_all(mode: Mode) -> bool:
    return True


@dataclass(frozen=True)
class FieldSpec:
    """The bounds and the description of one field.

    Attributes:
        kind: the type of its value.
        about: one line for the user.
        low, high: inclusive bounds of each number; None if the checkpoint decides.
        multiple_of: divisor of a whole number.
        choices: the values to choose from; empty for any.
        max_chars: length of the longest text.
        num_items: required number of values; None for any.
        unit: unit of the number: pixels, frames, actions.
        is_for: whether a mode reads the field.
        otherwise: hint for requests of the other modes; empty names the modes that read the field.
    """

    kind: ValueKind
    about: str
    low: float | None = None
    high: float | None = None
    multiple_of: int = 1
    choices: tuple[Any, ...] = ()
    max_chars: int = LIMITS.max_prompt_chars
    num_items: int | None = None
    unit: str = ""
    is_for: Callable[[Mode], bool] = _is_for_all
    otherwise: str = ""

    @property
    def modes(self) -> tuple[str, ...]:
        """Names of the modes that read the field."""
        return tuple(name for name, mode in MODES.items() if self.is_for(mode))

    @property
    def bounds(self) -> tuple[Any, Any]:
        """The inclusive bounds of a number, of its type."""
        assert None not in (self.low, self.high), "a field that the checkpoint bounds"
        return self.low, self.high

    def check(self, name: str, value: Any) -> Any:
        """Check a value that is not None against the bounds.

        Returns:
            The value; a float for a number, a tuple for several.

        Raises:
            RequestError: the value is of another type, or out of bounds.
        """
        match self.kind:
            case ValueKind.INTEGER | ValueKind.TEXT if self.choices:
                return checks.choice(name, value, self.choices)
            case ValueKind.TEXT:
                return checks.text(name, value, self.max_chars, may_be_empty=True)
            case ValueKind.FLAG:
                return checks.flag(name, value)
            case ValueKind.INTEGER if self.multiple_of > 1:
                return checks.pixels(name, value, self.multiple_of, self.bounds[1])
            case ValueKind.INTEGER:
                return checks.integer(name, value, *self.bounds)
            case ValueKind.NUMBER:
                return checks.real(name, value, *self.bounds)
            case ValueKind.NUMBERS:
                if not isinstance(value, list | tuple) or len(value) != self.num_items:
                    low, high = self.bounds
                    raise RequestError(name, value, f"{self.num_items} numbers from {low:g} to {high:g}")
                return tuple(checks.real(name, number, *self.bounds) for number in value)
        raise AssertionError(f"{name}: a {self.kind} is checked where it is read")


def spec_field(kind: ValueKind, about: str, *, default: Any = None, is_compared: bool = True, **bounds: Any) -> Any:
    """Return a dataclass field that carries its :class:`FieldSpec`.

    Args:
        is_compared: False for media and tensors, which do not compare or print well.
        bounds: the other attributes of :class:`FieldSpec`.
    """
    spec = FieldSpec(kind, about, **bounds)
    return field(default=default, compare=is_compared, repr=is_compared, metadata={_METADATA_KEY: spec})


def spec_of(dataclass_field: Field[Any]) -> FieldSpec:
    """Return the :class:`FieldSpec` of a dataclass field."""
    spec = dataclass_field.metadata[_METADATA_KEY]
    assert isinstance(spec, FieldSpec)
    return spec
