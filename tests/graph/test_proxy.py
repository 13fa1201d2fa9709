"""Serve's proxy in front of the HTTP API: request ids and routing. The API itself is tested in tests/app."""

from __future__ import annotations

from typing import Any

import httpx2
import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

GOOD: dict[str, Any] = {"prompt": "a car", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}


def test_every_answer_has_the_callers_or_a_new_request_id(app: Any) -> None:
    with httpx2.Client(base_url=app.url, timeout=100) as http:
        for path in ("/v1/videos/sync", "/v1/videos"):
            assert http.post(path, json=GOOD, headers={"x-request-id": "mine"}).headers["x-request-id"] == "mine"
        refused = http.post("/v1/videos/sync", json={**GOOD, "seed": -1})
        assert refused.status_code == 422
        assert refused.headers["x-request-id"]


def test_health_and_readiness_come_through_the_proxy(app: Any) -> None:
    with httpx2.Client(base_url=app.url, timeout=100) as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/ready").json() == {"status": "ready"}, "the controller knows every stage"
