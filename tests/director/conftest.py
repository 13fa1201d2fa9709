"""Retries without pauses: no replica has to restart here."""

from __future__ import annotations

import pytest

from deployments.director import retries


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retries, "_RETRY_PAUSE_S", 0.01)
    monkeypatch.setattr(retries, "_LONGEST_RETRY_PAUSE_S", 0.05)
    monkeypatch.setattr(retries, "_LONGEST_WAIT_S", 0.05)
