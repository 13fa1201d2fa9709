"""Readiness, unknown paths, and headers for proxies."""

from __future__ import annotations

import pytest
from starlette.datastructures import Headers

from deployments.api.app import _find_refusal
from deployments.api.service_info import OPEN_PATHS
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


@pytest.mark.parametrize("name", ["nano", "Cosmos3-Nano", "nvidia/Cosmos3-Nano"])
def test_the_model_is_shown_and_asked_for_by_each_of_its_names(name: str, api: Api) -> None:
    (listed,) = api.get("/v1/models").json()["data"]
    assert api.get(f"/v1/models/{name}").json() == listed
    assert api.create({"prompt": "a cat", "model": name})["model"] == "nano"


@pytest.mark.parametrize("name", ["nano2", "owner/nano", "nvidia/Cosmos3-Super"])
def test_another_model_is_not_found(name: str, shared_api: Api) -> None:
    answer = shared_api.get(f"/v1/models/{name}")
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "model_not_found")
    assert "nano, nvidia/Cosmos3-Nano" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v1/videos/"), ("GET", "/v1/models/"), ("GET", "/health/"), ("POST", "/v1/images/generations/")],
)
def test_no_redirect_follows_the_host_header(method: str, path: str, shared_api: Api) -> None:
    answer = shared_api.send(method, path, headers={"host": "evil.example"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "no_such_route")
    assert "location" not in answer.headers


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/v1/models", "/v1/models/nano", "/v1/models/x", "/v1/videos", "/openapi.json", "/v1/x"],
)
def test_head_has_the_headers_of_get(path: str, shared_api: Api) -> None:
    get, head = shared_api.get(path), shared_api.send("HEAD", path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    assert dict(head.headers) == dict(get.headers)


def test_head_of_a_stream_ends_with_its_headers(api: Api) -> None:
    video = api.create()
    head = api.send("HEAD", f"/v1/videos/{video['id']}/events")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"].startswith("text/event-stream")
    assert api.send("HEAD", "/v1/images/generations").status_code == 405


def test_a_probe_without_a_host_is_answered(api: Api) -> None:
    api.service.hosts = frozenset({"localhost"})
    for path, status in (("/health", None), ("/v1/models", 403)):
        refusal = _find_refusal("GET", Headers(), api.service, is_open=path in OPEN_PATHS)
        assert (None if refusal is None else refusal.status) == status
    assert _find_refusal("GET", Headers({"host": "evil.example"}), api.service, is_open=True) is not None


def test_events_forbid_caching_and_buffering_by_proxies(api: Api) -> None:
    video = api.create()

    async def follow() -> None:
        follower = await Follower(api, f"/v1/videos/{video['id']}/events").begin()
        assert follower.headers["x-accel-buffering"] == "no"
        assert follower.headers["cache-control"] == "no-store"
        await follower.leave()

    api.run(follow())
