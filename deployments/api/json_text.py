"""JSON from clients: bounded in memory and depth, without duplicate keys."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

# Python's object for a value of two characters takes fifty bytes: a body has few of them, and long texts.
_MAX_VALUES = 1_000_000
# How deep Python can go depends on where it is: what one thread can read, another cannot print.
_MAX_DEPTH = 100
_TOO_DEEP = f"its lists and objects lie deeper in each other than the {_MAX_DEPTH} levels that are allowed"
_MAX_SHOWN_CHARS = 60


def read_json(text: str | bytes | bytearray) -> Any:
    """Return the value that a text holds.

    Raises:
        ValueError: it holds none, too many, an object with a key twice, or lists in lists deeper than allowed.
    """
    separators: Any = ",[{:" if isinstance(text, str) else (b",", b"[", b"{", b":")
    if sum(text.count(separator) for separator in separators) > _MAX_VALUES:
        raise ValueError(f"it has more than the {_MAX_VALUES} values that are allowed")
    try:
        value = json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    _check_depth(value)
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, list | dict) else []
    for _ in range(_MAX_DEPTH):
        level = [it for outer in level for it in _items(outer) if isinstance(it, list | dict)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _items(value: list[Any] | dict[str, Any]) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:_MAX_SHOWN_CHARS]!r} is given twice")
        values[name] = value
    return values
