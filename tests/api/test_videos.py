"""Jobs over HTTP: create, list, get, cancel, delete, remix; and the endpoints that wait."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.errors import OverloadedError, ShuttingDown, StageFailed
from cosmos3_core.actions import GeneratedActions
from deployments.errors import JobsError
from deployments.jobs.job import JobState
from deployments.jobs.video import poll_after_ms, retry_after_s
from tests.api.fake_service import UNKNOWN, Api, UnlookedPrompts
from tests.jobs.making import make_lease
from tests.mode_inputs import RED_PNG, data_url, png


@pytest.mark.parametrize(
    ("eta_s", "poll_ms", "retry_s"),
    [(None, 1000, 1), (0.2, 200, 1), (12.0, 1200, 12), (12.1, 1210, 13), (1e5, 5000, 3600)],
)
def test_clients_come_back_neither_too_often_nor_too_late(eta_s: float | None, poll_ms: int, retry_s: int) -> None:
    assert (poll_after_ms(eta_s), retry_after_s(eta_s)) == (poll_ms, retry_s)


def test_a_request_becomes_a_job(api: Api) -> None:
    answer = api.post("/v1/videos", json={"prompt": "a cat", "seed": 5}, headers={"x-request-id": "mine"})
    video = answer.json()
    assert (answer.status_code, video["object"], video["status"], video["progress"]) == (200, "video", "queued", 0)
    assert (video["model"], video["prompt"], video["seed"], video["mode"]) == ("nano", "a cat", 5, "text_to_video")
    assert (video["queue_position"], video["service_class"], video["warnings"]) == (0, "standard", [])
    assert int(answer.headers["openai-poll-after-ms"]) > 0
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cache-control"] == "no-store"
    job = api.store.get(video["id"])
    assert job is not None
    assert (job.attached_to, job.owner, job.request_id) == (None, "", "mine")
    again = api.get(f"/v1/videos/{video['id']}")
    assert (again.json(), again.headers["cache-control"]) == (video, "no-store")


@pytest.mark.parametrize("how", ["json", "multipart", "urlencoded"])
def test_json_multipart_and_urlencoded_bodies_create_the_same_job(how: str, api: Api) -> None:
    fields = {"prompt": "a cat", "seconds": "4", "size": "64x32", "fps": "12", "model": "nano"}
    asked: dict[str, Any] = {
        "json": {"json": {**fields, "fps": 12}},
        "multipart": {"files": {name: (None, value) for name, value in fields.items()}},
        "urlencoded": {"data": fields},
    }
    video = api.post("/v1/videos", **asked[how]).json()
    assert (video["size"], video["num_frames"], video["fps"], video["seconds"]) == ("64x32", 49, 12, "4.083")
    assert video["notes"] == ["num_frames=48 was rounded up to 49: clips have 1 + k * 4 frames"]


def test_a_job_reports_its_progress(api: Api) -> None:
    video = api.create({"prompt": "a", "num_inference_steps": 10})
    job = api.claim()
    assert api.get(f"/v1/videos/{video['id']}").json()["status"] == "in_progress"
    api.step(job, 4, 0.75)
    now = api.get(f"/v1/videos/{video['id']}").json()
    assert (now["progress"], now["step"], now["num_steps"], now["sigma"], now["stage"]) == (
        38,
        4,
        10,
        0.75,
        "denoising",
    )
    assert 0 <= now["eta_s"] < 60
    assert now["queue_position"] is None
    api.step(job, 10, 0.0)
    assert api.get(f"/v1/videos/{video['id']}").json()["progress"] == 95
    api.complete(job)
    answer = api.get(f"/v1/videos/{video['id']}")
    now = answer.json()
    assert (now["status"], now["progress"], now["error"]) == ("completed", 100, None)
    assert (now["file_name"], now["media_type"]) == (f"{video['id']}.mp4", "video/mp4")
    assert now["completed_at"] >= now["created_at"] > 1_600_000_000
    assert now["expires_at"] == pytest.approx(now["completed_at"] + 100, abs=2)
    assert (now["inference_time_s"], now["stage_durations"]["denoise"], now["frames_sha256"]) == (2.0, 1.0, "b" * 64)
    assert "openai-poll-after-ms" not in answer.headers


def test_a_failed_job_is_a_200_with_its_error(api: Api) -> None:
    video = api.create()
    api.fail(api.claim())
    answer = api.get(f"/v1/videos/{video['id']}")
    assert (answer.status_code, answer.json()["status"]) == (200, "failed")
    assert answer.json()["error"] == {"code": "stage_failed", "message": "it broke"}


def test_generated_actions_are_at_the_top_of_the_object(api: Api) -> None:
    body = {"mode": "policy", "prompt": "go", "domain_name": "av", "image": data_url(RED_PNG), "output": "actions"}
    video = api.create(body)
    assert (video["mode"], video["media_type"], video["file_name"], video["action"]) == ("policy", None, None, None)
    actions = GeneratedActions(np.ones((1, 1), np.float32), "av", 1, False).as_json()
    api.complete(api.claim(), None, actions)
    assert api.get(f"/v1/videos/{video['id']}").json()["action"] == {**actions, "action_mode": "policy"}
    assert api.get(f"/v1/videos/{video['id']}/content?variant=action").json()["data"] == [[1.0]]
    assert api.expect_refusal("GET", f"/v1/videos/{video['id']}/content", 404)["code"] == "no_such_variant"


def test_jobs_are_listed_in_pages(api: Api) -> None:
    ids = [api.create({"prompt": str(index)})["id"] for index in range(5)]
    page = api.get("/v1/videos").json()
    assert [video["id"] for video in page["data"]] == ids[::-1]
    assert (page["object"], page["first_id"], page["last_id"], page["has_more"]) == ("list", ids[-1], ids[0], False)
    page = api.get("/v1/videos", params={"limit": 2, "order": "asc"}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == (ids[:2], True)
    page = api.get("/v1/videos", params={"limit": 3, "order": "asc", "after": page["last_id"]}).json()
    assert ([video["id"] for video in page["data"]], page["has_more"]) == (ids[2:], False)
    page = api.get("/v1/videos", params={"limit": 0}).json()
    assert (page["data"], page["first_id"], page["last_id"], page["has_more"]) == ([], None, None, True)


def test_a_list_without_jobs_is_empty(shared_api: Api) -> None:
    page = shared_api.get("/v1/videos").json()
    assert page == {"object": "list", "data": [], "first_id": None, "last_id": None, "has_more": False}


@pytest.mark.parametrize(
    ("query", "param", "said"),
    [
        ("limit=101", "limit", "0 to 100"),
        ("limit=-1", "limit", "0 to 100"),
        ("limit=five", "limit", "0 to 100"),
        ("limit=%C2%B2", "limit", "0 to 100"),
        ("limit=", "limit", "0 to 100"),
        ("order=up", "order", "asc"),
        ("after=nobody", "after", "the id of a job"),
        ("limit=1&limit=2", "limit", "given once"),
        ("lmit=1", "lmit", "Did you mean limit?"),
        ("x" * 5000, "x" * 100, "Query parameters are after, limit, order"),
    ],
    ids=lambda value: value[:20],
)
def test_a_wrong_query_is_named(query: str, param: str, said: str, shared_api: Api) -> None:
    error = shared_api.expect_refusal("GET", f"/v1/videos?{query}", 422)
    assert error["param"].startswith(param)
    assert said in error["message"]
    assert len(json.dumps(error)) < 2000


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/v1/videos"),
        ("POST", "/v1/videos/sync"),
        ("POST", "/v1/images/generations"),
        ("GET", f"/v1/videos/{UNKNOWN}"),
        ("DELETE", f"/v1/videos/{UNKNOWN}"),
        ("POST", f"/v1/videos/{UNKNOWN}/cancel"),
        ("POST", f"/v1/videos/{UNKNOWN}/remix"),
        ("GET", f"/v1/videos/{UNKNOWN}/content"),
        ("HEAD", f"/v1/videos/{UNKNOWN}/content"),
        ("GET", f"/v1/videos/{UNKNOWN}/events"),
        ("GET", "/v1/models"),
    ],
)
def test_no_endpoint_takes_an_unknown_query_parameter(method: str, path: str, shared_api: Api) -> None:
    answer = shared_api.send(method, f"{path}?zzz=1", **({"json": {"prompt": "a"}} if method == "POST" else {}))
    assert answer.status_code == 422
    assert method == "HEAD" or answer.json()["error"]["param"] == "zzz"
    assert shared_api.director.submitted == []


@pytest.mark.parametrize("video_id", [UNKNOWN, "video_gen_1", "sync2", "..", "%2e%2e%2fetc%2fpasswd", "é"])
@pytest.mark.parametrize(
    ("method", "rest"),
    [("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("POST", "/remix"), ("GET", "/content"), ("GET", "/events")],
)
def test_an_unknown_video_is_a_404(video_id: str, method: str, rest: str, shared_api: Api) -> None:
    more = {"json": {"prompt": "a"}} if rest == "/remix" else {}
    error = shared_api.expect_refusal(method, f"/v1/videos/{video_id}{rest}", 404, **more)
    assert error["code"] in ("not_found", "no_such_route")


def test_a_queued_job_is_cancelled_at_once(api: Api) -> None:
    video = api.create()
    now = api.post(f"/v1/videos/{video['id']}/cancel").json()
    assert (now["status"], now["error"]["code"]) == ("failed", "cancelled")
    assert api.post(f"/v1/videos/{video['id']}/cancel").json() == now, "it stays as it is"


def test_a_cancelled_jobs_inputs_are_removed_at_once(api: Api) -> None:
    video = api.post(
        "/v1/videos", files={"prompt": (None, "a"), "input_reference": ("a.png", png(), "image/png")}
    ).json()
    assert api.service.jobs.files.exists(video["id"], "image")
    api.post(f"/v1/videos/{video['id']}/cancel")
    assert not api.service.jobs.files.exists(video["id"], "image")


def test_cancelling_a_running_job_stops_its_runner(api: Api) -> None:
    video = api.create()
    job = api.claim()
    assert api.post(f"/v1/videos/{video['id']}/cancel").json()["status"] == "in_progress"
    assert api.store.renew("runner", [make_lease(job)], 100.0) == (set(), {job.job_id})


@pytest.mark.parametrize("state", ["queued", "in_progress", "completed"])
def test_deleting_a_job_removes_its_files(state: str, api: Api) -> None:
    video = api.create({"prompt": "a", "image": data_url(RED_PNG)})
    job = api.store.get(video["id"])
    media_id = ""
    if state != "queued":
        job = api.claim()
    if state == "completed":
        media_id = api.complete(job).media_id
        assert api.media.find(media_id) is not None
    assert api.files.exists(video["id"], "image")
    answer = api.send("DELETE", f"/v1/videos/{video['id']}")
    assert answer.json() == {"id": video["id"], "object": "video.deleted", "deleted": True}
    assert api.expect_refusal("GET", f"/v1/videos/{video['id']}", 404)["code"] == "not_found"
    assert api.expect_refusal("DELETE", f"/v1/videos/{video['id']}", 404)["code"] == "not_found"
    assert not api.files.exists(video["id"], "image")
    assert not media_id or api.media.find(media_id) is None
    if state == "in_progress":
        assert api.store.renew("runner", [make_lease(job)], 100.0) == ({video["id"]}, set())


@pytest.mark.parametrize("state", ["queued", "failed", "completed"])
@pytest.mark.parametrize("as_form", [False, True])
def test_a_remix_changes_only_the_prompt(state: str, as_form: bool, api: Api) -> None:
    body = {"prompt": "a cat", "image": data_url(RED_PNG), "seed": 9, "num_frames": 5, "size": "32x32", "user": "me"}
    video = api.create({**body, "service_class": "batch", "previews": 3})
    if state != "queued":
        job = api.claim()
        api.fail(job) if state == "failed" else api.complete(job)
    asked: dict[str, Any] = {"data" if as_form else "json": {"prompt": "a dog"}}
    answer = api.post(f"/v1/videos/{video['id']}/remix", **asked)
    remix = answer.json()
    assert (answer.status_code, remix["status"], remix["prompt"]) == (200, "queued", "a dog")
    assert (remix["remixed_from_video_id"], remix["seed"], remix["mode"]) == (video["id"], 9, "image_to_video")
    assert (remix["size"], remix["num_frames"], remix["service_class"]) == ("32x32", 5, "batch")
    assert remix["warnings"] == video["warnings"] != []
    (first, _), (second, how) = api.director.submitted
    assert second.image == first.image
    assert how.previews == 3


@pytest.mark.parametrize("body", [{}, {"prompt": ""}, {"prompt": " "}, {"prompt": 5}, {"prompt": "a", "seed": 1}])
def test_a_remix_takes_only_a_prompt(body: dict[str, Any], api: Api) -> None:
    video = api.create()
    error = api.expect_refusal("POST", f"/v1/videos/{video['id']}/remix", 422, json=body)
    assert error["param"] == ("seed" if "seed" in body else "prompt")


def test_a_remix_is_checked_like_a_new_request(make_api: Any) -> None:
    api = make_api(may_disable_guardrails=True)
    video = api.create({"prompt": "a", "guardrails": False, "service_class": "batch"})
    api.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "b"})
    admission = api.director.admission
    config = admission.config.model_copy(update={"classes": {"standard": 1.0}})
    api.director.admission = replace(admission, config=config, prompt_check=UnlookedPrompts(None, 1.0, False))
    api.post(f"/v1/videos/{video['id']}/remix", json={"prompt": "b"})
    asked = [(asked.skip_guardrails, asked.service_class) for _, asked in api.director.submitted]
    assert asked == [(True, "batch"), (True, "batch"), (False, "standard")]


def test_an_idempotency_key_returns_the_same_job(api: Api) -> None:
    headers = {"Idempotency-Key": "once"}
    video = api.create({"prompt": "a"}, headers=headers)
    assert api.create({"prompt": "a"}, headers=headers)["id"] == video["id"]
    assert api.create({"prompt": "a"})["id"] != video["id"]
    error = api.expect_refusal("POST", "/v1/videos", 409, json={"prompt": "b"}, headers=headers)
    assert error["code"] == "idempotency_conflict"
    for bad in ("", "two words", "x" * 129, "a\tb"):
        error = api.expect_refusal("POST", "/v1/videos", 400, json={"prompt": "a"}, headers={"Idempotency-Key": bad})
        assert error["code"] == "invalid_header"
    assert len(api.get("/v1/videos").json()["data"]) == 2


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (OverloadedError("jobs that wait", 4, 41.2), 429, "overloaded", "42"),
        (ShuttingDown(30), 503, "shutting_down", "30"),
        (StageFailed("director", 1, "died"), 503, "stage_failed", "5"),
        (JobsError("postgresql://user:secret@host/ is away"), 503, "jobs_unavailable", "5"),
        (ZeroDivisionError("a secret"), 500, "internal_error", None),
    ],
    ids=lambda value: type(value).__name__,
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/videos/sync", "/v1/images/generations"])
def test_refusals_of_the_director_become_answers(
    error: Exception, status: int, code: str, retry_after: str | None, path: str, api: Api
) -> None:
    api.director.error = error
    answer = api.post(path, json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers.get("retry-after") == retry_after
    assert "secret" not in answer.text
    assert api.service.body_memory.taken_bytes == 0


def test_a_full_queue_is_a_429(api: Api) -> None:
    for index in range(20):
        api.create({"prompt": str(index)})
    answer = api.post("/v1/videos", json={"prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded")
    assert int(answer.headers["retry-after"]) >= 1


def test_a_database_outage_is_a_503(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    video = api.create()

    def away(*arguments: Any, **more: Any) -> Any:
        raise JobsError("/a/secret/place is away")

    for name in ("get", "list", "delete", "cancel"):
        monkeypatch.setattr(api.store, name, away)
    for method, rest in (("GET", ""), ("DELETE", ""), ("POST", "/cancel"), ("GET", "/content"), ("GET", "/events")):
        answer = api.send(method, f"/v1/videos/{video['id']}{rest}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "jobs_unavailable")
        assert "secret" not in answer.text


# Endpoints that wait


def test_sync_answers_with_the_file(api: Api) -> None:
    answer = api.post("/v1/videos/sync", json={"prompt": "a", "user": "me"}, headers={"x-request-id": "mine"})
    assert (answer.status_code, answer.content, answer.headers["content-type"]) == (200, b"finished", "video/mp4")
    job = api.store.get(answer.headers["x-video-id"])
    assert job is not None
    assert (job.attached_to, job.request_id) == ("this-one", "mine")
    assert (answer.headers["x-model"], answer.headers["x-seed"], answer.headers["x-mode"]) == (
        "nano",
        "42",
        "text_to_video",
    )
    assert json.loads(answer.headers["x-warnings"]) == ["user is without effect: the caller's own note"]
    assert json.loads(answer.headers["x-stage-durations"]) == {"denoise": 1.0, "total": 2.0}
    assert api.director.stream.responses[0].is_cancelled, "the Director's stream is cancelled at the end"


def test_sync_with_stream_sends_the_growing_file(api: Api) -> None:
    answer = api.post("/v1/videos/sync", json={"prompt": "a", "stream": True})
    assert (answer.status_code, answer.content) == (200, b"live")
    assert api.store.get(answer.headers["x-video-id"]) is not None
    assert answer.headers["x-model"] == "nano"


@pytest.mark.parametrize("path", ["/v1/videos/sync", "/v1/images/generations"])
def test_sync_ignores_an_idempotency_key_with_a_warning(path: str, api: Api) -> None:
    answer = api.post(path, json={"prompt": "a", "user": "me"}, headers={"Idempotency-Key": "once"})
    lines = json.loads(answer.headers["x-warnings"])
    assert [line.split()[0] for line in lines] == ["Idempotency-Key", "user"]
    assert api.director.submitted[0][1].idempotency_key is None
    assert api.director.submitted[0][1].warnings == tuple(lines)
    for bad in ("", "two words", "x" * 129):
        error = api.expect_refusal("POST", path, 400, json={"prompt": "a"}, headers={"Idempotency-Key": bad})
        assert error["code"] == "invalid_header"


def test_disconnecting_from_sync_stops_the_request(api: Api) -> None:
    async def leave() -> None:
        came = asyncio.Event()

        async def wait() -> None:
            came.set()
            await asyncio.sleep(60)

        api.director.gate = wait
        asking = asyncio.create_task(api.asend("POST", "/v1/videos/sync", json={"prompt": "a"}))
        await came.wait()
        assert not api.director.stream.responses[0].is_cancelled
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

    api.run(leave())
    assert api.director.stream.responses[0].is_cancelled
    assert api.service.body_memory.taken_bytes == 0


def test_images_are_generated(api: Api) -> None:
    answer = api.post("/v1/images/generations", json={"prompt": "a", "n": 2, "size": "32x32", "layers": 4})
    body = answer.json()
    assert (answer.status_code, len(body["data"]), body["size"]) == (200, 2, "32x32")
    assert [item["seed"] for item in body["data"]] == [42, 43]
    for item in body["data"]:
        job = api.store.get(item["id"])
        assert job is not None
        assert (job.mode, job.attached_to) == ("text_to_image", "this-one")
    assert json.loads(answer.headers["x-warnings"]) == ["layers is without effect: a field of other models"]
    answer = api.post("/v1/images/generations", data={"prompt": "a", "response_format": "file", "size": "32x32"})
    assert (answer.headers["content-type"], answer.content) == ("image/png", b"finished")
    assert answer.headers["x-video-id"].startswith("video_gen_")


def test_a_model_of_any_name_fits_into_a_header(api: Api) -> None:
    api.service.model = api.service.model.model_copy(update={"id": "né\r\nx: y"})
    answer = api.post("/v1/videos/sync", json={"prompt": "a"})
    assert answer.headers["x-model"] == "n%C3%A9%0D%0Ax: y"
    assert "x" not in answer.headers


def test_states_of_jobs_are_those_of_openai(api: Api) -> None:
    from deployments.jobs.video import Video

    job = api.store.get(api.create()["id"])
    assert job is not None
    for state in JobState:
        video = Video.of(type(job)(**{**vars(job), "state": state}), None).as_json()
        assert video["status"] in ("queued", "in_progress", "completed", "failed")
        assert (video["error"] is not None) == (video["status"] == "failed")
        assert (video["progress"] == 100) == (video["status"] == "completed")
