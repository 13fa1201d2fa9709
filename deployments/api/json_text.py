"""JSON from clients: with a bound on the memory that it becomes, and without keys that hide each other."""

from __future__ import annotations

import json
from typing import Any

# Python's object for a value of two characters takes fifty bytes: a body has few of them, and long texts.
_MAX_VALUES = 1_000_000
_MAX_SHOWN_CHARS = 60


def read_json(text: str | bytes | bytearray) -> Any:
    """The value that a text holds.

    Raises:
        ValueError: it holds none, too many, an object with a key twice, or lists in lists beyond all measure.
    """
    separators: Any = ",[{:" if isinstance(text, str) else (b",", b"[", b"{", b":")
    if sum(text.count(separator) for separator in separators) > _MAX_VALUES:
        raise ValueError(f"it has more than the {_MAX_VALUES} values that are allowed")
    try:
        return json.loads(text, object_pairs_hook=_without_twins)
    except RecursionError:
        raise ValueError("its lists lie too deep in each other") from None


def _without_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in pairs:
        if name in values:
            raise ValueError(f"the key {name[:_MAX_SHOWN_CHARS]!r} is given twice")
        values[name] = value
    return values
