"""URLs of other servers in bodies: fetched where the operator allows it, and counted like uploads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from cosmos3_core.errors import RequestError
from cosmos3_core.presets import LIMITS
from tests.api.fake_service import Api
from tests.mode_inputs import RED_PNG

URL = "https://pictures.example/a.png"


class Remote:
    """Remote files by URL; records the fetches."""

    def __init__(self, **files: Any) -> None:
        self.files: dict[str, Any] = {URL: RED_PNG, **files}
        self.asked: list[tuple[str, str]] = []
        self.gate: asyncio.Event | None = None

    async def fetch(self, url: str, field: str) -> bytes:
        self.asked.append((url, field))
        if self.gate is not None:
            await self.gate.wait()
        if url not in self.files:
            raise RequestError(field, url, "a host that is listed")
        data: bytes = self.files[url]
        return data


@pytest.fixture
def remote() -> Remote:
    return Remote()


@pytest.fixture
def fetching(make_api: Callable[..., Api], remote: Remote) -> Api:
    return make_api(fetch_file=remote.fetch)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"image": URL}, "image"),
        ({"input_reference": URL}, "input_reference"),
        ({"input_reference": {"image_url": URL}}, "input_reference"),
        ({"input_references": [URL]}, "input_references"),
        ({"image_reference": {"image_url": {"url": URL}}}, "image_reference"),
        ({"image_reference": f'{{"image_url": "{URL}"}}'}, "image_reference"),
        ({"extra_params": {"image": URL}}, "image"),
    ],
)
def test_a_url_is_fetched_in_every_notation(body: dict[str, Any], field: str, fetching: Api, remote: Remote) -> None:
    video = fetching.create({"prompt": "a", **body})
    assert video["mode"] == "image_to_video"
    assert remote.asked == [(URL, field)]
    assert fetching.director.submitted[0][0].image == RED_PNG
    assert fetching.service.body_memory.taken_bytes == 0


def test_urls_in_forms_are_fetched(fetching: Api, remote: Remote) -> None:
    answer = fetching.post("/v1/videos/sync", data={"prompt": "a", "image_reference[image_url]": URL})
    assert (answer.status_code, answer.headers["x-mode"]) == (200, "image_to_video")
    assert remote.asked == [(URL, "image_reference")]


@pytest.mark.parametrize("url", [URL, "http://169.254.169.254/latest/meta-data", "HTTPS://localhost/a"])
def test_nothing_is_fetched_where_remote_media_are_off(url: str, api: Api) -> None:
    for body in ({"image": url}, {"image_reference": {"image_url": url}}, {"extra_params": {"image": url}}):
        error = api.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", **body})
        assert "URLs are not fetched: send the file itself." in error["message"]


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://pictures.example/a", "gopher://x", "/etc/passwd"])
def test_other_schemes_are_never_fetched(url: str, fetching: Api, remote: Remote) -> None:
    assert fetching.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "image": url})["param"] == "image"
    assert remote.asked == []


def test_a_refused_url_names_its_field(fetching: Api, remote: Remote) -> None:
    body = {"prompt": "a", "image": "https://evil.example/a"}
    error = fetching.expect_refusal("POST", "/v1/videos", 422, json=body)
    assert (error["param"], error["allowed"]) == ("image", "a host that is listed")
    remote.files[URL] = bytes(LIMITS.max_media_bytes + 1)
    error = fetching.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "image": URL})
    assert "at most 67108864 bytes" in error["message"]
    assert fetching.service.body_memory.taken_bytes == 0


def test_a_field_that_is_wrong_is_refused_before_anything_is_fetched(fetching: Api, remote: Remote) -> None:
    fetching.expect_refusal("POST", "/v1/videos", 422, json={"prompt": "a", "image": URL, "zzz": 1})
    assert remote.asked == []


def test_a_fetch_reserves_room_for_the_largest_file(make_api: Callable[..., Api], remote: Remote) -> None:
    """The size is unknown before the answer, so a third fetch is refused with a 429."""
    room_bytes = int(LIMITS.max_media_bytes * 2.5)
    api = make_api(fetch_file=remote.fetch, http={"max_bodies_bytes": room_bytes, "max_body_bytes": 1 << 20})
    body = {"prompt": "a", "image": URL}

    async def ask() -> None:
        remote.gate = asyncio.Event()
        first = [asyncio.create_task(api.asend("POST", "/v1/videos", json=body)) for _ in range(2)]
        while len(remote.asked) < 2:
            await asyncio.sleep(0.01)
        assert api.service.body_memory.taken_bytes > 2 * LIMITS.max_media_bytes
        answer = await api.asend("POST", "/v1/videos", json=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
        assert len(remote.asked) == 2
        remote.gate.set()
        assert [(await task).status_code for task in first] == [200, 200]

    api.run(ask())
    assert api.service.body_memory.taken_bytes == 0
