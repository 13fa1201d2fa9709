"""The four clients - for threads or an event loop, over HTTP or handles - in front of one real app."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded
from cluster.events import PreviewReady, StepDone
from cosmos3_core.errors import RequestError
from cosmos3_core.request import GenerationRequest
from deployments.client import AsyncCosmos3Client, Cosmos3Client
from deployments.clients.errors import NotFound, NotReady
from deployments.clients.handle_transport import HandleTransport
from deployments.jobs.events import JobStarted, VideoEnded, VideoEvent
from deployments.messages import ChunkEncoded, FileStarted
from tests.app.in_process import InProcessApp
from tests.clients.conftest import InLoop
from tests.core_reference import Reference
from tests.settling import eventually

pytestmark = pytest.mark.timeout(600)

REQUEST = GenerationRequest(prompt="A red car.", num_frames=9, height=64, width=96, num_inference_steps=4, seed=7)
ENDLESS = GenerationRequest(prompt="A car.", num_frames=5, height=32, width=32, num_inference_steps=1000)
CALL_S = 100.0


def connect(app: InProcessApp, way: str) -> AsyncCosmos3Client:
    if way == "http":
        return AsyncCosmos3Client.over_http(app.url, timeout_s=CALL_S)
    return AsyncCosmos3Client(HandleTransport(app.director, CALL_S))


@pytest.fixture(params=["blocking", "async"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["http", "handle"])
def client(request: pytest.FixtureRequest, kind: str, app: InProcessApp) -> Iterator[Any]:
    """Each of the four."""
    made = connect(app, request.param)
    asked: Any = Cosmos3Client(made) if kind == "blocking" else InLoop(made)
    yield asked
    asked.close()


def kinds_of(events: list[VideoEvent]) -> list[type]:
    """The kinds in their order, each once."""
    return list(dict.fromkeys(type(event) for event in events))


def test_a_video_from_its_request_to_its_end(client: Any, reference: Reference, tmp_path: Path) -> None:
    expected = reference(REQUEST)
    assert expected.path is not None
    video = client.create(REQUEST, service_class="batch", request_id="mine")
    assert (video.size, video.num_frames, video.service_class) == ("96x64", 9, "batch")
    events = list(client.events(video.id))
    assert [event.seq for event in events if event.seq] == list(range(1, len([it for it in events if it.seq]) + 1))
    assert [event.step for event in events if isinstance(event, StepDone)][-1] == 4
    done = client.wait(video.id)
    assert (done.status, done.progress, done.frames_sha256) == ("completed", 100, expected.frames_sha256)
    assert isinstance(events[-1], VideoEnded)
    assert events[-1].video == done == client.retrieve(video.id)
    assert b"".join(client.content(video.id)) == expected.path.read_bytes()
    client.save(video.id, tmp_path / "a.mp4")
    assert (tmp_path / "a.mp4").read_bytes() == expected.path.read_bytes()
    assert b"".join(client.content(video.id, "thumbnail"))[8:12] == b"WEBP"
    again = client.wait(client.remix(video.id, "A blue car.").id)
    assert (again.status, again.seed, again.remixed_from_video_id) == ("completed", 7, video.id)
    assert [it.id for it in client.list(limit=2).videos] == [again.id, video.id]
    client.delete(video.id)
    for call in (client.retrieve, client.cancel, client.delete):
        with pytest.raises(NotFound):
            call(video.id)


def test_a_request_is_generated_and_streamed(client: Any, reference: Reference) -> None:
    expected = reference(REQUEST)
    assert expected.path is not None
    assert client.generate(REQUEST).media == expected.path.read_bytes()
    with client.stream(REQUEST, previews=2) as stream:
        events = list(stream)
    kinds = [kind for kind in kinds_of(events) if kind not in (PreviewReady, JobStarted)]
    assert kinds[-4:] == [StepDone, FileStarted, ChunkEncoded, VideoEnded]
    assert events[-1].video.id == stream.video_id
    assert events[-1].video.frames_sha256 == expected.frames_sha256


def test_refused_cancelled_and_expired_requests_raise_typed_errors(client: Any, app: InProcessApp) -> None:
    for call in (client.create, client.generate):
        with pytest.raises(RequestError, match="num_frames"):
            call(GenerationRequest(prompt="a", num_frames=-1))
    video = client.create(ENDLESS)
    with pytest.raises(NotReady):
        next(client.content(video.id))
    with pytest.raises(DeadlineExceeded):
        client.wait(video.id, timeout_s=0.2)
    client.cancel(video.id)
    stopped = client.wait(video.id)
    assert (stopped.status, stopped.error.code) == ("failed", "cancelled")
    with client.stream(ENDLESS) as stream:
        assert any(isinstance(event, StepDone) for event in stream)
    with pytest.raises(DeadlineExceeded):
        client.generate(ENDLESS, timeout_s=0.5)
    (leader,) = app.replicas("Transformer")
    assert eventually(lambda: leader._loop.num_jobs == 0), "nobody waits for any of them"
