"""The stages' handles."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from deployments.stages.handles import StageHandles


class Handle:
    """A Serve handle that records its options."""

    def __init__(self, options: dict[str, Any] | None = None) -> None:
        self.set = options or {}

    def options(self, **options: Any) -> Handle:
        return Handle(options)


def test_all_stages_but_the_tokenizer_stream() -> None:
    names = [each.name for each in fields(StageHandles)]
    streaming = StageHandles(**{name: Handle() for name in names}).streaming()
    assert {name: getattr(streaming, name).set for name in names} == {
        name: {} if name == "tokenizer" else {"stream": True} for name in names
    }


def test_a_missing_stage_has_no_handle() -> None:
    streaming = StageHandles(Handle(), Handle(), Handle(), Handle()).streaming()
    assert (streaming.unguided, streaming.audio, streaming.guardrail) == (None, None, None)
