"""Names of form fields, ``a``, ``a[]`` and ``a[b]``, as the objects and lists that they stand for.

So clients of OpenAI's API send what JSON would have as an object in an object.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from deployments.api.field_types import FormText
from deployments.api.fields import BODIES
from deployments.errors import BodyError

# Fields that forms may have several times, once a value.
_LISTS = {name for model in BODIES.values() for name in model.model_fields if model.type_of(name).is_list}
_MAX_SHOWN_CHARS = 60
_BRACKETED = re.compile(r"([^\[\]]{1,200})((?:\[[^\[\]]{0,200}\]){1,4})")


def nested_fields(items: Iterable[tuple[str, FormText | bytes]]) -> dict[str, Any]:
    """Return the fields of a form.

    Args:
        items: their names as they are written, and values.

    Raises:
        BodyError: a field is given twice.
    """
    fields: dict[str, Any] = {}
    for written, value in items:
        match = _BRACKETED.fullmatch(written)
        path = [match[1], *match[2][1:-1].split("][")] if match else [written]
        if path == [written] and written in _LISTS:
            path.append("")
        _put(fields, path, value, written)
    return fields


def _put(fields: dict[str, Any], path: list[str], value: Any, written: str) -> None:
    *outer, last = path
    if last == "" and outer:
        *outer, name = outer
        there = _inside(fields, outer, written).setdefault(name, [])
        if not isinstance(there, list):
            raise _twice(written)
        there.append(value)
        return
    target = _inside(fields, outer, written)
    if last in target:
        raise _twice(written)
    target[last] = value


def _inside(fields: dict[str, Any], path: list[str], written: str) -> dict[str, Any]:
    for name in path:
        there = fields.setdefault(name, {})
        if not isinstance(there, dict):
            raise _twice(written)
        fields = there
    return fields


def _twice(written: str) -> BodyError:
    return BodyError(400, "broken_form", f"the field {written[:_MAX_SHOWN_CHARS]!r} is given twice")
