"""Checks of single values that users give: each returns the value or raises RequestError. No torch here."""

from __future__ import annotations

import difflib
from typing import Any, TypeVar

from cosmos3_core.errors import RequestError

# Bound of a word for the search of similar ones, whose time grows with its length.
_MAX_COMPARED_CHARS = 100

_Choice = TypeVar("_Choice", str, int)


def integer(field: str, value: Any, low: int, high: int) -> int:
    """Check for a whole number from ``low`` to ``high``; True and 3.0 are refused."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(field, value, f"a whole number from {low} to {high}")
    return value


def real(field: str, value: Any, low: float, high: float) -> float:
    """Check for a finite number from ``low`` to ``high``, as a float."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high:  # NaN fails the comparison
        raise RequestError(field, value, f"a number from {low:g} to {high:g}")
    return float(value)


def choice(field: str, value: Any, allowed: tuple[_Choice, ...]) -> _Choice:
    """Check for one of ``allowed``; True is not 1."""
    if isinstance(value, bool) or not isinstance(value, str | int) or value not in allowed:
        near = difflib.get_close_matches(str(value)[:_MAX_COMPARED_CHARS], [str(name) for name in allowed], n=1)
        raise RequestError(field, value, f"one of {list(allowed)}", f"did you mean {near[0]}?" if near else "")
    return value


def flag(field: str, value: Any) -> bool:
    """Check for True or False."""
    if not isinstance(value, bool):
        raise RequestError(field, value, "true or false")
    return value


def text(field: str, value: Any, max_chars: int, *, may_be_empty: bool) -> str:
    """Check for a string of at most ``max_chars`` characters, one of them visible unless it may be empty."""
    if not isinstance(value, str):
        raise RequestError(field, value, "a string")
    if not may_be_empty and not value.strip():
        raise RequestError(field, value, "a text with at least one visible character")
    if len(value) > max_chars:
        raise RequestError(field, value, f"at most {max_chars} characters", "shorten the text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RequestError(field, value, "valid Unicode, without half a surrogate pair") from None
    return value


def pixels(field: str, value: Any, multiple: int, high: int) -> int:
    """Check for a number of pixels, at most ``high``, that is a multiple of ``multiple``; errors name the nearest."""
    if isinstance(value, bool) or not isinstance(value, int) or not multiple <= value <= high:
        raise RequestError(field, value, f"a multiple of {multiple}, at least {multiple}, at most {high}")
    if value % multiple:
        below = value - value % multiple
        raise RequestError(field, value, f"a multiple of {multiple}", f"use {below} or {below + multiple}")
    return value
