"""Readiness, unknown paths, and headers for proxies."""

from __future__ import annotations

import pytest

from tests.api.fake_service import Api, Follower


def test_ready_reports_missing_stages(api: Api) -> None:
    assert api.get("/ready").json() == {"status": "ready"}
    api.readiness.missing = ["denoiser"]
    answer = api.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "not ready", "waiting_for": ["denoiser"]})
    assert int(answer.headers["retry-after"]) > 0


def test_an_app_that_is_stopping_is_not_ready(api: Api) -> None:
    api.service.is_draining = True
    answer = api.get("/ready")
    assert (answer.status_code, answer.json()) == (503, {"status": "shutting down"})
    assert int(answer.headers["retry-after"]) > 0
    assert api.get("/health").status_code == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/videos/"), ("GET", "/v1/models/"), ("GET", "/health/"), ("POST", "/v1/images/generations/")],
)
def test_no_redirect_follows_the_host_header(method: str, path: str, shared_api: Api) -> None:
    answer = shared_api.send(method, path, headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_route")
    assert "location" not in answer.headers


def test_events_forbid_caching_and_buffering_by_proxies(api: Api) -> None:
    video = api.create()

    async def follow() -> None:
        follower = await Follower(api, f"/v1/videos/{video['id']}/events").begin()
        assert follower.headers["x-accel-buffering"] == "no"
        assert follower.headers["cache-control"] == "no-store"
        await follower.leave()

    api.run(follow())
