"""Content of a job over HTTP: the file, finished and growing, its variants, its actions."""

from __future__ import annotations

import asyncio
import io
from typing import Any

import numpy as np
import pytest

from cosmos3_core.actions import GeneratedActions
from cosmos3_core.media.writer import ClipFormat, open_writer
from tests.api.fake_service import Api, Follower
from tests.mode_inputs import RED_PNG, data_url


def path_of(video: dict[str, Any], variant: str = "") -> str:
    return f"/v1/videos/{video['id']}/content{'?variant=' + variant if variant else ''}"


def test_a_finished_file_is_the_content(api: Api) -> None:
    video = api.create()
    api.complete(api.claim(), b"0123456789")
    answer = api.get(path_of(video))
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"0123456789", "video/mp4")
    assert answer.headers["content-length"] == "10"
    assert api.get(path_of(video, "video")).content == answer.content
    head = api.send("HEAD", path_of(video))
    assert (head.status_code, head.content, head.headers) == (200, b"", answer.headers)
    part = api.get(path_of(video), headers={"range": "bytes=2-4"})
    assert (part.status_code, part.content, part.headers["content-range"]) == (206, b"234", "bytes 2-4/10")
    assert api.get(path_of(video), headers={"if-none-match": answer.headers["etag"]}).status_code == 304
    assert (
        api.expect_refusal("GET", path_of(video), 416, headers={"range": "bytes=10-"})["code"]
        == "range_not_satisfiable"
    )


@pytest.mark.parametrize("variant", ["video", "thumbnail", "spritesheet", "audio", "action"])
@pytest.mark.parametrize("state", ["queued", "in_progress"])
def test_content_that_is_not_ready_is_a_409(state: str, variant: str, api: Api) -> None:
    video = api.create()
    if state == "in_progress":
        api.claim()
    for method in ("GET", "HEAD"):
        answer = api.send(method, path_of(video, variant))
        assert answer.status_code == 409
        assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["content-length"] != "0"
    assert api.expect_refusal("GET", path_of(video, variant), 409)["code"] == "media_not_ready"


def test_variants_of_a_growing_file_are_a_409(api: Api) -> None:
    video = api.create()
    entry = api.begin_file(api.claim())
    assert entry.live_path is not None
    entry.live_path.write_bytes(b"live")
    assert api.expect_refusal("GET", path_of(video, "thumbnail"), 409)["code"] == "media_not_ready"
    assert api.send("HEAD", path_of(video)).status_code == 200


@pytest.mark.parametrize("how", ["failed", "cancelled"])
@pytest.mark.parametrize("variant", ["video", "thumbnail", "action"])
def test_content_of_a_failed_job_is_a_410(how: str, variant: str, api: Api) -> None:
    video = api.create()
    if how == "failed":
        api.fail(api.claim())
    else:
        api.post(f"/v1/videos/{video['id']}/cancel")
    assert api.expect_refusal("GET", path_of(video, variant), 410)["code"] == "media_failed"


@pytest.mark.parametrize("variant", ["video", "thumbnail"])
def test_an_expired_file_is_a_410(variant: str, api: Api) -> None:
    video = api.create()
    api.media.remove(api.complete(api.claim()).media_id)
    assert api.expect_refusal("GET", path_of(video, variant), 410)["code"] == "media_expired"


def test_a_growing_file_is_sent_as_it_grows(api: Api) -> None:
    video = api.create()
    entry = api.begin_file(api.claim())
    live = entry.live_path
    assert live is not None

    def grow(data: bytes) -> None:
        with live.open("ab") as file:
            file.write(data)

    async def follow() -> None:
        viewer = await Follower(api, path_of(video)).begin()
        assert (viewer.status, viewer.headers.get("content-length")) == (200, None)
        for part in (b"one", b"two"):
            grow(part)
            await viewer.until(part)
        entry.path.write_bytes(b"finished")
        entry.finish()
        assert await viewer.to_its_end() == b"onetwo"
        assert viewer.is_whole

    api.run(follow())


def test_disconnecting_from_a_growing_file_leaves_the_job_running(api: Api) -> None:
    video = api.create()
    entry = api.begin_file(api.claim())
    assert entry.live_path is not None
    entry.live_path.write_bytes(b"live")

    async def leave() -> None:
        viewer = await Follower(api, path_of(video)).begin()
        await viewer.until(b"live")
        await viewer.leave()
        await asyncio.sleep(0)

    api.run(leave())
    assert api.get(f"/v1/videos/{video['id']}").json()["status"] == "in_progress"


def test_a_clip_has_thumbnail_and_spritesheet(api: Api) -> None:
    stream = io.BytesIO()
    with open_writer(stream, ClipFormat("mp4", height=48, width=64, fps=24)) as writer:
        writer.write(np.random.default_rng(1).integers(0, 256, (9, 48, 64, 3), np.uint8))
        writer.close()
    video = api.create()
    api.complete(api.claim(), stream.getvalue())
    for variant, media_type in (("thumbnail", "image/webp"), ("spritesheet", "image/jpeg")):
        answer = api.get(path_of(video, variant))
        assert (answer.status_code, answer.headers["content-type"]) == (200, media_type)
        assert len(answer.content) > 100
    assert api.expect_refusal("GET", path_of(video, "audio"), 404)["code"] == "no_such_variant"
    assert api.expect_refusal("GET", path_of(video, "action"), 404)["code"] == "no_such_variant"


def test_actions_are_a_variant_with_an_etag(api: Api) -> None:
    video = api.create(
        {"mode": "policy", "prompt": "go", "domain_name": "av", "image": data_url(RED_PNG), "output": "actions"}
    )
    actions = GeneratedActions(np.ones((1, 1), np.float32), "av", 1, False).as_json()
    api.complete(api.claim(), None, actions)
    path = path_of(video, "action")
    etag = api.get(path).headers["etag"]
    for known in (etag, "*", f'"other", W/{etag}'):
        answer = api.get(path, headers={"if-none-match": known})
        assert (answer.status_code, answer.content, answer.headers["etag"]) == (304, b"", etag)
    for other in ('"other"', etag[:-1], f'"a{etag[1:]}', f"x{etag}"):
        assert api.get(path, headers={"if-none-match": other}).json()["data"] == [[1.0]]


@pytest.mark.parametrize("variant", ["video", "thumbnail"])
@pytest.mark.parametrize("how", ["failed", "removed"])
def test_a_failed_attempts_file_is_not_the_final_answer(how: str, variant: str, api: Api) -> None:
    """The job goes on, so its next file is announced."""
    video = api.create()
    api.begin_file(api.claim())
    job = api.store.get(video["id"])
    assert job is not None
    if how == "failed":
        api.media.fail(job.media_id, "it broke")
    else:
        api.media.remove(job.media_id)
    error = api.expect_refusal("GET", path_of(video, variant), 409)
    assert error["code"] == "media_not_ready"


@pytest.mark.parametrize("variant", ["poster", "", "../video", "VIDEO"])
def test_a_variant_that_the_job_lacks_is_a_404(variant: str, api: Api) -> None:
    video = api.create()
    error = api.expect_refusal("GET", f"/v1/videos/{video['id']}/content?variant={variant}", 422)
    assert (error["param"], "thumbnail" in error["allowed"]) == ("variant", True)
