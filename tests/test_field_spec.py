"""The bounds beside the fields: every field has them, and each value just inside passes, each just outside does not."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from cosmos3_core.errors import RequestError
from cosmos3_core.field_spec import ValueKind
from cosmos3_core.request import FIELDS, GenerationRequest

NUMBERS = [
    name for name, spec in FIELDS.items() if spec.kind in (ValueKind.INTEGER, ValueKind.NUMBER) and not spec.choices
]
CHOICES = [name for name, spec in FIELDS.items() if spec.choices]


def test_every_field_has_a_spec_in_the_order_of_the_request() -> None:
    assert list(FIELDS) == [it.name for it in dataclasses.fields(GenerationRequest)]
    assert all(spec.about and spec.modes for spec in FIELDS.values())


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_bounded_on_both_sides(name: str) -> None:
    spec = FIELDS[name]
    low, high = spec.bounds
    for value in (low, high):
        assert spec.check(name, value) == value
    for value in (low - 1, high + 1, True, "1", None):
        with pytest.raises(RequestError) as caught:
            spec.check(name, value)
        assert caught.value.field == name
        assert f"{low:g}" in caught.value.allowed or str(low) in caught.value.allowed


@pytest.mark.parametrize("name", CHOICES)
def test_a_choice_is_one_of_the_list(name: str) -> None:
    spec = FIELDS[name]
    for value in spec.choices:
        assert spec.check(name, value) == value
    for value in (f"{spec.choices[0]}x", True, 1.5, [], None):
        with pytest.raises(RequestError) as caught:
            spec.check(name, value)
        assert str(list(spec.choices)) in caught.value.allowed


@pytest.mark.parametrize("value", [(0, 1000), [400, 400.5]])
def test_numbers_become_a_tuple_of_floats(value: Any) -> None:
    checked = FIELDS["guidance_interval"].check("guidance_interval", value)
    assert checked == tuple(value)
    assert all(isinstance(number, float) for number in checked)


@pytest.mark.parametrize("value", [(0,), (0, 1, 2), (-1, 0), (0, 1001), "01", {0, 1}, None, (0, None)])
def test_numbers_have_a_number_and_bounds(value: Any) -> None:
    with pytest.raises(RequestError, match="guidance_interval"):
        FIELDS["guidance_interval"].check("guidance_interval", value)


@pytest.mark.parametrize("name", [name for name, spec in FIELDS.items() if spec.kind is ValueKind.FLAG])
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_a_flag_is_true_or_false(name: str, value: Any) -> None:
    assert FIELDS[name].check(name, True) is True
    with pytest.raises(RequestError, match=name):
        FIELDS[name].check(name, value)


def test_a_text_has_a_longest_one() -> None:
    spec = FIELDS["negative_prompt"]
    longest = "a" * spec.max_chars
    assert spec.check("negative_prompt", longest) == longest
    with pytest.raises(RequestError, match=str(spec.max_chars)):
        spec.check("negative_prompt", longest + "a")
