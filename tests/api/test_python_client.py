"""The Python client against the real API over a socket, and against a Director's real job methods."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from cluster.events import QueuePosition, StepDone
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments.client import AsyncCosmos3Client, Cosmos3Client
from deployments.clients.errors import AuthError, NotFound, NotReady, UnreachableError
from deployments.clients.handle_transport import HandleTransport
from deployments.director.director import Director
from deployments.errors import IdempotencyConflict
from deployments.jobs.events import JobStarted, VideoEnded
from deployments.jobs.job import Job
from deployments.jobs.keys import NewKey
from deployments.launch.app_calls import save_video
from tests.api.fake_service import DEADLINE_S, Api
from tests.serve_fakes import Handle

REQUEST = GenerationRequest(prompt="A red car.", num_frames=9, height=80, width=96, num_inference_steps=4)


class Desk:
    """The Director's methods for jobs, without a runner."""

    job, jobs, cancel, delete, events, read = (
        *(Director.job, Director.jobs, Director.cancel, Director.delete),
        *(Director.events, Director.read),
    )

    def __init__(self, api: Api) -> None:
        self._jobs = api.service.jobs
        self.submit = api.director._submit
        self.remix = api.director._remix


@pytest.fixture
def served() -> Iterator[Callable[[Api], str]]:
    """Serve an API on a port; return its URL."""
    servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def serve(api: Api) -> str:
        server = uvicorn.Server(uvicorn.Config(api.app, port=0, log_level="error", ws="none"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread))
        deadline_s = time.monotonic() + DEADLINE_S
        while not server.started and time.monotonic() < deadline_s:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

    yield serve
    for server, thread in servers:
        server.should_exit = True
        thread.join(DEADLINE_S)


@pytest.fixture(params=["http", "handle"])
def client(request: pytest.FixtureRequest, api: Api, served: Callable[[Api], str]) -> Iterator[Cosmos3Client]:
    if request.param == "http":
        made = AsyncCosmos3Client.over_http(served(api), timeout_s=DEADLINE_S)
    else:
        made = AsyncCosmos3Client(HandleTransport(Handle(Desk(api)), DEADLINE_S))
    with Cosmos3Client(made) as client:
        yield client


def test_a_video_is_created_followed_saved_and_deleted(api: Api, client: Cosmos3Client) -> None:
    options: dict[str, Any] = {"idempotency_key": "once", "service_class": "batch", "previews": 2, "request_id": "mine"}
    video = client.create(REQUEST, **options)
    assert (video.status, video.progress, video.size, video.num_frames) == ("queued", 0, "96x80", 9)
    assert (video.service_class, video.num_steps, video.queue_position) == ("batch", 4, 0)
    job = api.store.get(video.id)
    assert job is not None
    assert (job.previews, job.request_id, job.idempotency_key) == (2, "mine", "once")
    assert client.create(REQUEST, **options).id == video.id
    with pytest.raises(IdempotencyConflict, match="'once' was used for another request"):
        client.create(GenerationRequest(prompt="Another one."), idempotency_key="once")
    with pytest.raises(RequestError, match="height must be a multiple of 16 .got 100.; use 96 or 112"):
        client.create(GenerationRequest(prompt="a", height=100))
    with pytest.raises(NotReady):
        list(client.content(video.id))

    events = client.events(video.id)
    assert isinstance(next(events), QueuePosition)
    claimed: Job = api.claim()
    api.step(claimed, 1, sigma=0.75)
    rest = [next(events), next(events)]
    assert [type(event) for event in rest] == [JobStarted, StepDone]
    assert isinstance(rest[1], StepDone)
    assert (rest[1].step, rest[1].num_steps, rest[1].sigma, rest[1].pid) == (1, 4, 0.75, 7)
    running = client.retrieve(video.id)
    assert (running.status, running.step, running.sigma, running.stage) == ("in_progress", 1, 0.75, "denoising")
    assert 0 < running.progress < 100
    api.complete(claimed, b"finished" * 1000)
    ended = list(events)[-1]
    assert isinstance(ended, VideoEnded)
    assert (ended.video.status, ended.video.progress, ended.video.media_type) == ("completed", 100, "video/mp4")
    assert ended.video == client.wait(video.id) == client.retrieve(video.id)
    assert ended.seq is not None
    assert list(client.events(video.id, ended.seq)) == [], "there is none after the last one"
    assert b"".join(client.content(video.id)) == b"finished" * 1000

    again = client.remix(video.id, "A blue car.", request_id="mine")
    assert (again.prompt, again.seed, again.remixed_from_video_id) == ("A blue car.", video.seed, video.id)
    stopped = client.cancel(again.id)
    assert stopped.error is not None
    assert (stopped.status, stopped.error.code) == ("failed", "cancelled")
    assert [found.id for found in client.list_all(order="asc")] == [video.id, again.id]
    page = client.list(limit=1)
    assert ([found.id for found in page.videos], page.has_more) == ([again.id], True)
    with pytest.raises(RequestError, match="after must be "):
        client.list("video_gen_" + "0" * 32)
    client.delete(video.id)
    for call in (client.retrieve, client.cancel, client.delete, client.wait):
        with pytest.raises(NotFound):
            call(video.id)
    with pytest.raises(NotFound):
        client.remix(video.id, "a")


def test_following_a_deleted_video_raises(api: Api, client: Cosmos3Client) -> None:
    video = client.create(REQUEST)
    events = client.events(video.id)
    next(events)
    client.delete(video.id)
    with pytest.raises(NotFound):
        list(events)


def test_the_client_sends_its_key(make_api: Callable[..., Api], served: Callable[[Api], str], tmp_path: Path) -> None:
    api = make_api(needs_keys=True)
    _, key = api.store.keys.create(NewKey(name="mine"))
    url = served(api)
    with Cosmos3Client.over_http(url, "sk-wrong") as client, pytest.raises(AuthError):
        client.create(REQUEST)
    with pytest.raises(AuthError):
        save_video(url, REQUEST, tmp_path / "a", timeout_s=DEADLINE_S)
    with Cosmos3Client.over_http(url, key) as client:
        assert client.create(REQUEST).status == "queued"
    assert save_video(url, REQUEST, tmp_path / "a", timeout_s=DEADLINE_S, api_key=key).num_bytes == 8


def test_the_command_line_saves_what_the_answer_is(api: Api, served: Callable[[Api], str], tmp_path: Path) -> None:
    saved = save_video(served(api), REQUEST, tmp_path / "a", timeout_s=DEADLINE_S)
    assert saved.path == tmp_path / "a.mp4"
    assert saved.path.read_bytes() == b"finished"
    assert api.store.get(saved.video_id) is not None
    assert (saved.seed, saved.negative_origin, saved.warnings) == (42, "built-in", ())
    assert saved.stage_seconds == {"denoise": 1.0, "total": 2.0}


def test_an_unreachable_app_is_a_typed_error() -> None:
    with Cosmos3Client.over_http("http://127.0.0.1:9") as client, pytest.raises(UnreachableError, match="listens"):
        client.models()
