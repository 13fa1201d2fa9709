"""Messages of `cosmos3 check` for apps with keys."""

from __future__ import annotations

from typing import Any

import pytest

from deployments.launch import app_calls


@pytest.mark.parametrize(
    ("api_key", "said"), [(None, "none was given: see --api-key-file"), ("c3_wrong", "it does not know this one")]
)
def test_a_missing_key_is_not_reported_as_wrong(
    api_key: str | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str | None] = []

    def get(url: str, path: str, *, timeout_s: float, api_key: str | None = None) -> tuple[int, str]:
        asked.append(api_key)
        return (200, "") if path == "/ready" else (401, "")

    def save_video(*arguments: Any, **named: Any) -> None:
        raise AssertionError("it was not let in")

    monkeypatch.setattr(app_calls, "get", get)
    monkeypatch.setattr(app_calls, "save_video", save_video)
    lines: list[str] = []
    assert not app_calls.check_app("http://127.0.0.1:8000", timeout_s=60, report=lines.append, api_key=api_key)
    (line,) = lines
    assert "FAIL" in line
    assert said in line
    assert asked == [None, api_key], "whether it is ready is no secret"
