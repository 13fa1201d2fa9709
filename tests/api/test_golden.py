"""Frozen client-visible output: HTTP answers, events byte for byte, and values of the Python client."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import pytest
from pydantic import BaseModel
from ray.exceptions import RayActorError
from starlette.exceptions import HTTPException

from cluster.errors import (
    DeadlineExceeded,
    GangFailed,
    GangLost,
    OutOfMemory,
    OverloadedError,
    ShuttingDown,
    StageFailed,
    StreamClosed,
)
from cluster.events import Event, PreviewReady, PreviewsOff, QueuePosition, StepDone, public_names
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.errors import CapabilityError, MediaError, RequestError
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.api.call import error_response
from deployments.client import AsyncCosmos3Client, Connecting
from deployments.clients.errors import NotFound, read_failure, read_refusal
from deployments.clients.handle_transport import _translate
from deployments.clients.transport import read_event
from deployments.director import recorder
from deployments.errors import (
    ApiError,
    BodyError,
    ContentBlocked,
    GuardrailUnavailable,
    IdempotencyConflict,
    JobCancelled,
    JobsError,
    LeaseLost,
    MediaStoreError,
)
from deployments.failures import explain_error
from deployments.jobs.estimates import Speed
from deployments.jobs.events import event_as_json
from deployments.jobs.job import Job, JobState, Lane, Outcome, Progress, SubmitOptions
from deployments.media.layout import new_media_id
from tests.api.fake_service import MODEL, UNKNOWN, Api, Follower
from tests.api.golden import Golden, answer_as_json
from tests.clock import Clock
from tests.jobs.making import make_lease
from tests.mode_inputs import RED_PNG, data_url, png

_SMALL = {"prompt": "a cat", "size": "64x32", "seed": 5, "num_inference_steps": 10}
_ACTIONS = GeneratedActions(np.array([[0.25, -1.0], [0.5, 2.0]], np.float32), "av", 1, False)
_EVENTS = [
    messages.Accepted("mine", "a-job", 10, 9, 5, ("a note",), 7),
    messages.Tokenized(12, 34, "built-in", 7),
    QueuePosition(2, 7),
    messages.PictureEncoded(0.5, 3, 7),
    StepDone(1, 10, 0.75, 0.12345678, 7),
    PreviewReady(1, 0.75, "image/webp", b"webp", 7),
    PreviewsOff("the map cannot be read", 7),
    StepDone(2, 10, 0.5, 0.25, 8),
    messages.StateSaved(2, 1000, 7),
    messages.StageRetried("denoise", 2, "a gang died", 2),
    messages.LatentsReady(1.5, ("video",), 7, (8, 9)),
    messages.FileStarted("0123456789abcdef" * 2, "video/mp4", 7),
    messages.ChunkDecoded(0, 1.25, 7),
    messages.SoundDecoded(0, 1.5, 7),
    messages.ChunkEncoded(0, 9, 8, 1.75, 7),
    messages.StageRetried("decode", 3, "it died"),
    messages.ClipEncoded("0123456789abcdef" * 2, "b" * 64, 9, 8, 2.0, 7),
]
_ERRORS: dict[str, BaseException] = {
    "RequestError": RequestError("seed", -1, "0 or more", "Take another one."),
    "CapabilityError": CapabilityError("generate_sound", True, "a checkpoint with sound"),
    "BodyError": BodyError(415, "wrong_content_type", "no"),
    "ApiError": ApiError(401, "wrong_api_key", "not known", {"www-authenticate": "Bearer"}),
    "ApiError 404": ApiError(404, "not_found", "none"),
    "ApiError 409": ApiError(409, "media_not_ready", "not yet", {"retry-after": "7"}),
    "ApiError 410": ApiError(410, "media_expired", "not any more"),
    "ContentBlocked prompt": ContentBlocked("prompt"),
    "ContentBlocked pictures": ContentBlocked("pictures"),
    "GuardrailUnavailable": GuardrailUnavailable("prompt"),
    "OutOfMemory": OutOfMemory("of 1 GiB"),
    "OverloadedError": OverloadedError("jobs that wait", 4, 2.1),
    "ShuttingDown": ShuttingDown(30),
    "DeadlineExceeded": DeadlineExceeded("decode", 60),
    "StageFailed": StageFailed("encode", 3, "a secret address died"),
    "GangFailed": GangFailed("step", "a secret died", 2),
    "GangLost": GangLost("step", "a secret died"),
    "StreamClosed": StreamClosed("a", "why"),
    "MediaError": MediaError("/a/secret/place: No space left on device"),
    "MediaStoreError": MediaStoreError("/a/secret/place cannot be used"),
    "IdempotencyConflict": IdempotencyConflict("once"),
    "JobCancelled": JobCancelled("video_gen_1", "it was cancelled"),
    "JobsError": JobsError("postgresql://user:secret@host is away"),
    "LeaseLost": LeaseLost("a secret job"),
    "HTTPException": HTTPException(404, "Not Found"),
    "RayActorError": RayActorError(),
    "ZeroDivisionError": ZeroDivisionError("a secret"),
}


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """The golden file named after the test."""
    is_written = request.config.getoption("--write-golden", default=False)
    return Golden(request.node.name.removeprefix("test_"), is_written=is_written)


@pytest.fixture
def clock(api: Api, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Clock of the API and its database; the recorder's advances a second per look."""
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    ticks = itertools.count(1000.0)
    monkeypatch.setattr(recorder, "time", SimpleNamespace(monotonic=lambda: next(ticks)))
    api.store._clock = clock
    return clock


# Videos


def test_videos(api: Api, clock: Clock, golden: Golden) -> None:
    answers = {name: answer_as_json(answer) for name, answer in _videos(api, clock)}
    golden.check(answers)


def _videos(api: Api, clock: Clock) -> Iterator[tuple[str, httpx2.Response]]:
    """Collect a job's object in every state, and in each step on the way."""
    first = api.create(_SMALL)
    clock.advance(1.0)
    second = api.create({**_SMALL, "previews": 2})
    yield "queued", _fetch(api, clock, first)
    yield "queued behind another one", _fetch(api, clock, second)
    api.store.note_speed(MODEL, Lane.VIDEO, Speed(100.0))
    yield "queued, pace known", _fetch(api, clock, second)
    clock.advance(1.5)
    job = api.claim()
    yield "starting", _fetch(api, clock, first)
    _record(api, job, stage="tokenized")
    yield "tokenized", _fetch(api, clock, first)
    clock.advance(2.25)
    api.step(job, 4, 0.75)
    yield "denoising", _fetch(api, clock, first)
    clock.advance(3.0)
    api.step(job, 10, 0.0)
    _record(api, job, stage="decoding")
    yield "decoding", _fetch(api, clock, first)
    api.begin_file(job)
    yield "file begun", _fetch(api, clock, first)
    clock.advance(0.5)
    api.complete(job)
    yield "completed", _fetch(api, clock, first)
    api.fail(api.claim())
    yield "failed", _fetch(api, clock, second)

    video = api.create(_SMALL)
    outcome = Outcome(JobState.FAILED)
    api.store.finish(make_lease(api.claim()), outcome, keep_media_s=100.0)
    yield "failed without a reason", _fetch(api, clock, video)
    video = api.create(_SMALL)
    yield "cancelled while it waited", api.post(f"/v1/videos/{video['id']}/cancel")
    yield "cancelled", _fetch(api, clock, video)
    yield "cancelled again", api.post(f"/v1/videos/{video['id']}/cancel")
    video = api.create(_SMALL)
    job = api.claim()
    yield "being cancelled", api.post(f"/v1/videos/{video['id']}/cancel")
    outcome = Outcome(JobState.CANCELLED, error_code="cancelled", error_message="it was cancelled")
    api.store.finish(make_lease(job), outcome, keep_media_s=100.0)
    yield "cancelled while it ran", _fetch(api, clock, video)

    image = {"prompt": "a cat", "mode": "text_to_image", "size": "32x32"}
    video = api.create(image)
    _complete(api, api.claim(Lane.IMAGE), "image/png", ".png")
    yield "image", _fetch(api, clock, video)
    sound = api.post("/v1/videos", json={**_SMALL, "generate_sound": True, "quality": "lossless"})
    yield "with sound, lossless, queued", sound
    clock.advance(1.0)
    _complete(api, api.claim(), "video/mp4", ".mp4")
    yield "with sound, lossless", _fetch(api, clock, sound.json())
    policy = {"mode": "policy", "prompt": "go", "domain_name": "av", "image": data_url(RED_PNG)}
    video = api.create({**policy, "output": "actions"})
    yield "actions, queued", _fetch(api, clock, video)
    api.complete(api.claim(), None, _ACTIONS.as_json())
    yield "actions", _fetch(api, clock, video)
    video = api.create(policy)
    api.complete(api.claim(), b"finished", _ACTIONS.as_json())
    yield "actions and video", _fetch(api, clock, video)

    noted = api.post("/v1/videos", json={**_SMALL, "num_frames": 48, "fps": 12, "user": "me", "service_class": "batch"})
    yield "with notes and warnings", noted
    clock.advance(1.0)
    yield "remixed", api.post(f"/v1/videos/{noted.json()['id']}/remix", json={"prompt": "a dog"})
    clock.advance(1.0)
    yield "remixed of a form", api.post(f"/v1/videos/{noted.json()['id']}/remix", data={"prompt": "a cow"})
    clock.advance(1.0)
    request = GenerationRequest(prompt="a cat", width=64, height=32, seed=5, num_inference_steps=10)
    attached: Job = api.run(api.director._submit(request, SubmitOptions(), "runner"))
    yield "attached", _fetch(api, clock, {"id": attached.job_id})
    video = noted.json()
    yield "deleted", api.send("DELETE", f"/v1/videos/{video['id']}")
    yield "not any more", _fetch(api, clock, video)


def _fetch(api: Api, clock: Clock, video: dict[str, Any]) -> httpx2.Response:
    clock.advance(0.125)
    return api.get(f"/v1/videos/{video['id']}")


def _record(api: Api, job: Job, **changes: Any) -> None:
    api.store.record(make_lease(job), Progress(**changes), [])


def _complete(api: Api, job: Job, media_type: str, suffix: str) -> None:
    """End a job as its runner does."""
    media_id = new_media_id(job.job_id)
    entry = api.media.create(media_id, media_type, suffix, is_live=False)
    _record(api, job, media_id=media_id)
    entry.path.write_bytes(b"finished")
    entry.finish()
    finished = _make_finished(job, media_id, None)
    outcome = Outcome(JobState.COMPLETED, recorder.result_of(finished))
    api.store.finish(make_lease(job), outcome, keep_media_s=100.0)


def _make_finished(job: Job, media_id: str, actions: GeneratedActions | None) -> messages.Finished:
    return messages.Finished(
        request_id="mine",
        job_id=job.job_id,
        mode=job.mode,
        media_id=media_id,
        media_type=job.media_type,
        num_bytes=8,
        num_frames=job.num_frames,
        fps=job.fps,
        height=job.height,
        width=job.width,
        seed=job.seed,
        frames_sha256="c" * 64,
        negative_origin="built-in",
        notes=tuple(job.notes),
        stage_seconds={"denoise": 1.23456, "total": 2.34567},
        actions=actions,
    )


def test_lists(api: Api, clock: Clock, golden: Golden) -> None:
    empty = api.get("/v1/videos")
    ids = []
    for number in range(5):
        clock.advance(1.0)
        ids.append(api.create({**_SMALL, "prompt": str(number)})["id"])
    api.complete(api.claim())
    queries = {
        "all": "",
        "of none": "?limit=0",
        "first two": "?limit=2&order=asc",
        "next two": f"?limit=2&order=asc&after={ids[1]}",
        "the last one": f"?limit=2&order=asc&after={ids[3]}",
        "newest first": f"?limit=2&order=desc&after={ids[3]}",
        "wrong limit": "?limit=101",
        "wrong order": "?order=up",
        "wrong after": "?after=nobody",
        "unknown after": f"?after={UNKNOWN}",
        "unknown name": "?lmit=1",
        "twice": "?limit=1&limit=2",
    }
    pages = {name: answer_as_json(api.get(f"/v1/videos{query}")) for name, query in queries.items()}
    golden.check({"empty": answer_as_json(empty), **pages})


# Events


def test_events(api: Api, clock: Clock, golden: Golden) -> None:
    answers: dict[str, Any] = {}
    first = api.create(_SMALL)
    clock.advance(1.0)
    second = api.create(_SMALL)
    job = api.claim()
    api.run(_record_job(api, job))
    path = f"/v1/videos/{first['id']}/events"
    answers["completed"] = answer_as_json(api.get(path))
    answers["from event 7 on"] = answer_as_json(api.get(path, headers={"Last-Event-ID": "7"}))
    last = api.store.get(first["id"])
    assert last is not None
    answers["nothing to come"] = answer_as_json(api.get(path, headers={"Last-Event-ID": str(last.last_seq)}))
    answers["wrong number"] = answer_as_json(api.get(path, headers={"Last-Event-ID": "x"}))
    answers["unknown"] = answer_as_json(api.get(f"/v1/videos/{UNKNOWN}/events"))

    api.fail(api.claim())
    answers["failed"] = answer_as_json(api.get(f"/v1/videos/{second['id']}/events"))
    third = api.create(_SMALL)
    api.post(f"/v1/videos/{third['id']}/cancel")
    answers["cancelled"] = answer_as_json(api.get(f"/v1/videos/{third['id']}/events"))

    async def follow() -> Any:
        waiting = await api.asend("POST", "/v1/videos", json=_SMALL)
        follower = await Follower(api, f"/v1/videos/{waiting.json()['id']}/events").begin()
        await follower.until(b"event: queued")
        await api.asend("DELETE", f"/v1/videos/{waiting.json()['id']}")
        body = (await follower.to_its_end()).decode().split("\n")
        return {"status": follower.status, "headers": dict(sorted(follower.headers.items())), "body": body}

    answers["deleted under its follower"] = api.run(follow())
    golden.check(answers)


async def _record_job(api: Api, job: Job) -> None:
    """Record a job with every kind of event, as its runner does."""

    def reraise(error: Exception) -> None:
        raise error

    writer = recorder.Recorder(api.store, job, reraise)
    for event in _EVENTS:
        writer.note(event)
    finished = _make_finished(job, "0123456789abcdef" * 2, _ACTIONS)
    await writer.end(Outcome(JobState.COMPLETED, recorder.result_of(finished)), keep_media_s=100.0)


def test_events_over_handles(golden: Golden) -> None:
    """Events of a client at the Director's handle, as sent and as values."""
    seen = [(event.kind, event_as_json(event)) for event in _EVENTS if event.kind]
    golden.check([{"kind": kind, "data": data, "value": _as_json(read_event(kind, data))} for kind, data in seen])


def _as_json(value: Any) -> Any:
    """A value of the client's as JSON: its type's name and its public fields."""
    if isinstance(value, bytes):
        return f"{len(value)} bytes"
    if isinstance(value, BaseException):
        fields = {name: _as_json(held) for name, held in sorted(vars(value).items()) if not name.startswith("_")}
        return {"type": type(value).__name__, "says": str(value), **fields}
    if isinstance(value, dict) or hasattr(value, "items"):
        return {name: _as_json(held) for name, held in value.items()}
    if isinstance(value, tuple | list):
        return [_as_json(held) for held in value]
    if isinstance(value, Event):
        names = sorted({"kind", "seq", "data", *public_names(type(value))})
        return {"type": type(value).__name__, **{name: _as_json(getattr(value, name)) for name in names}}
    if isinstance(value, BaseModel):
        names = sorted(type(value).model_fields)
        return {"type": type(value).__name__, **{name: _as_json(getattr(value, name)) for name in names}}
    return value


# What clients return


def test_client(api: Api, clock: Clock, golden: Golden) -> None:
    connecting = Connecting(transport=httpx2.ASGITransport(api.app))

    def client() -> AsyncCosmos3Client:
        return AsyncCosmos3Client.over_http("http://cosmos3", connecting=connecting)

    async def retrieve(video_id: str) -> Any:
        async with client() as http:
            try:
                return _as_json(await http.retrieve(video_id))
            except NotFound as error:
                return _as_json(error)

    found: dict[str, Any] = {}
    for name, answer in _videos(api, clock):
        if answer.status_code == 200:
            found[name] = api.run(retrieve(answer.json()["id"]))
    clock.advance(1.0)
    done = api.create(_SMALL)
    while (job := api.claim()).job_id != done["id"]:
        api.fail(job)
    api.run(_record_job(api, job))
    clock.advance(1.0)

    async def ask() -> dict[str, Any]:
        async with client() as http:
            return {
                "page": _as_json(await http.list(limit=1)),
                "models": _as_json(await http.models()),
                "events": [_as_json(event) async for event in http.events(done["id"])],
                "made": _as_json(await http.create(GenerationRequest(prompt="a", width=64, height=32))),
            }

    golden.check({**found, **api.run(ask())})


# Errors


def test_error_table(api: Api, golden: Golden) -> None:
    table = {}
    for name, error in _ERRORS.items():
        answer = error_response(error)
        headers = dict(answer.headers.items())
        _, _, code, message, needs_log, _ = explain_error(error)
        text = bytes(answer.body).decode()
        client = _as_json(read_refusal(answer.status_code, "reason", headers, text, "once"))
        is_frameworks = isinstance(error, HTTPException)  # raised and read over HTTP alone
        table[name] = {
            "http": {"status": answer.status_code, "headers": headers, "body": text},
            "is told": not needs_log or is_frameworks,
            "of a job": [code, message],
            "client": client,
            "client over handles": client if is_frameworks else _as_json(_translate(error)),
            "client of a job": _as_json(read_failure("a-job", code, message)),
        }
    golden.check(table)


def test_refusals(make_api: Any, golden: Golden) -> None:
    api: Api = make_api(http={"max_body_bytes": 2000})
    video = api.create(_SMALL)
    done = api.create(_SMALL)
    path = f"/v1/videos/{done['id']}"
    answers = {
        "no route": api.get("/v1/nothing"),
        "no method": api.send("PATCH", "/v1/videos"),
        "no method of one": api.send("PUT", path),
        "no video": api.get(f"/v1/videos/{UNKNOWN}"),
        "no id": api.get("/v1/videos/nobody"),
        "too large": api.post("/v1/videos", json={"prompt": "a" * 3000}),
        "wrong content type": api.post("/v1/videos", content=b"a", headers={"content-type": "text/plain"}),
        "no content type": api.post("/v1/videos", content=b"a"),
        "no json": api.post("/v1/videos", content=b"{", headers={"content-type": "application/json"}),
        "no object": api.post("/v1/videos", json=[1]),
        "key twice": api.post(
            "/v1/videos", content=b'{"prompt": "a", "prompt": "b"}', headers={"content-type": "application/json"}
        ),
        "too deep": api.post(
            "/v1/videos", content=b"[" * 500 + b"]" * 500, headers={"content-type": "application/json"}
        ),
        "no prompt": api.post("/v1/videos", json={}),
        "wrong value": api.post("/v1/videos", json={**_SMALL, "num_inference_steps": 0}),
        "wrong type": api.post("/v1/videos", json={**_SMALL, "seed": "x"}),
        "wrong size": api.post("/v1/videos", json={"prompt": "a", "size": "a"}),
        "unknown field": api.post("/v1/videos", json={"prompt": "a", "sede": 1}),
        "another model": api.post("/v1/videos", json={"prompt": "a", "model": "other"}),
        "not offered": api.post("/v1/videos", json={"prompt": "a", "loras": ["x"]}),
        "wrong class": api.post("/v1/videos", json={"prompt": "a", "service_class": "first"}),
        "wrong form": api.post("/v1/videos", data={"prompt": "a", "seed": "x"}),
        "wrong key": api.post("/v1/videos", json=_SMALL, headers={"Idempotency-Key": "two words"}),
        "url": api.post("/v1/images/generations", json={"prompt": "a", "response_format": "url"}),
        "remix of more": api.post(f"{path}/remix", json={"prompt": "a", "seed": 1}),
        "not ready": api.get(f"{path}/content"),
        "wrong variant": api.get(f"{path}/content?variant=nothing"),
    }
    headers = {"Idempotency-Key": "once"}
    api.create(_SMALL, headers=headers)
    answers["conflict"] = api.post("/v1/videos", json={"prompt": "b"}, headers=headers)
    api.complete(api.claim())
    path = f"/v1/videos/{video['id']}/content"
    answers["no range"] = api.get(path, headers={"range": "bytes=10-"})
    answers["no actions"] = api.get(f"{path}?variant=action")
    record = api.store.get(video["id"])
    assert record is not None
    api.media.remove(record.media_id)
    answers["expired"] = api.get(path)
    api.fail(api.claim())
    answers["failed"] = api.get(f"/v1/videos/{done['id']}/content")
    for _ in range(19):
        api.create({"prompt": "a"})
    answers["full"] = api.post("/v1/videos", json={"prompt": "a"})
    golden.check({name: answer_as_json(answer) for name, answer in answers.items()})


def test_refusals_with_keys(make_api: Any, golden: Golden) -> None:
    api: Api = make_api(needs_keys=True)
    answers = {
        "no key": api.get("/v1/videos"),
        "wrong key": api.get("/v1/videos", headers={"authorization": "Bearer wrong"}),
        "open": api.get("/health"),
        "cross origin": api.post("/v1/videos", headers={"sec-fetch-site": "cross-site"}),
    }
    golden.check({name: answer_as_json(answer) for name, answer in answers.items()})


# The service, and endpoints that wait


def test_service(api: Api, golden: Golden) -> None:
    answers = {path: api.get(path) for path in ("/v1/models", "/health", "/ready", "/metrics")}
    api.readiness.missing = ["denoiser", "decoder"]
    answers["not ready"] = api.get("/ready")
    api.service.is_draining = True
    answers["shutting down"] = api.get("/ready")
    golden.check({name: answer_as_json(answer) for name, answer in answers.items()})


def test_openapi(api: Api, golden: Golden) -> None:
    """Paths, parameters and status codes of each operation of the document."""
    document = api.get("/openapi.json").json()
    operations: dict[str, Any] = {}
    for path, item in sorted(document["paths"].items()):
        for method, operation in sorted(item.items()):
            parameters = (_resolve(document, it) for it in operation.get("parameters", []))
            shown = sorted([it["name"], it["in"], it.get("required", False)] for it in parameters)
            operations[f"{method} {path}"] = {"parameters": shown, "statuses": sorted(operation["responses"])}
    golden.check(operations)


def _resolve(document: Any, value: Any) -> Any:
    while "$ref" in value:
        target = document
        for name in value["$ref"].removeprefix("#/").split("/"):
            target = target[name]
        value = target
    return value


def test_files(api: Api, clock: Clock, golden: Golden) -> None:
    """Answers with files: of endpoints that wait, and contents of jobs."""
    sync, images = "/v1/videos/sync", "/v1/images/generations"
    image = {"prompt": "a", "size": "32x32"}
    answers = {
        "sync": api.post(sync, json={**_SMALL, "user": "me", "num_frames": 48}, headers={"Idempotency-Key": "once"}),
        "live": api.post(sync, json={**_SMALL, "stream": True}),
        "images": api.post(images, json={**image, "n": 2, "layers": 4}),
        "image file": api.post(images, data={**image, "response_format": "file"}),
        "image files": api.post(images, json={**image, "n": 2, "response_format": "file"}),
    }
    zipped = answers["image files"].headers
    assert int(zipped.pop("content-length")) > 16  # it contains times
    api.director.actions = _ACTIONS
    policy = {"mode": "policy", "prompt": "go", "domain_name": "av", "image": data_url(RED_PNG)}
    answers["actions"] = api.post(sync, json={**policy, "output": "actions"})
    answers["actions and video"] = api.post(sync, json=policy)
    answers["sync of a form"] = api.post(sync, files={"prompt": (None, "a"), "image": ("a.png", png(), "image/png")})
    video = api.create(_SMALL)
    job = api.claim()
    path = f"/v1/videos/{video['id']}/content"
    entry = api.begin_file(job)
    assert entry.live_path is not None
    entry.live_path.write_bytes(b"live")
    answers["growing, a part"] = api.get(path, headers={"range": "bytes=0-1"})
    answers["growing, head"] = api.send("HEAD", path)
    api.complete(job, b"0123456789")
    etag = api.get(path).headers["etag"]
    answers["whole"] = api.get(path)
    answers["head"] = api.send("HEAD", path)
    answers["a part"] = api.get(path, headers={"range": "bytes=2-4"})
    answers["known"] = api.get(path, headers={"if-none-match": etag})
    video = api.create({**policy, "output": "actions"})
    api.complete(api.claim(), None, _ACTIONS.as_json())
    answers["action"] = api.get(f"/v1/videos/{video['id']}/content?variant=action")
    golden.check({name: answer_as_json(answer) for name, answer in answers.items()})
