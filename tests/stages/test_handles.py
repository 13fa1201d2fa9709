"""The stages' handles."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from deployments.stages.handles import Stages


class Handle:
    """Of Serve, as far as it matters: how it is called."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.set = options or {}

    def options(self, **options: Any) -> Handle:
        return Handle(options)


def test_all_but_the_tokenizer_answer_with_streams() -> None:
    names = [each.name for each in fields(Stages)]
    streaming = Stages(**{name: Handle() for name in names}).streaming()
    assert {name: getattr(streaming, name).set for name in names} == {
        name: {} if name == "tokenizer" else {"stream": True} for name in names
    }


def test_a_stage_that_an_app_does_not_have_stays_away() -> None:
    streaming = Stages(Handle(), Handle(), Handle(), Handle()).streaming()
    assert (streaming.unguided, streaming.audio, streaming.guardrail) == (None, None, None)
