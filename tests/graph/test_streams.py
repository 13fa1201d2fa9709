"""Clips in flight: each reaches one encoder whole, the Director never holds their bytes, and leaving stops the work."""

from __future__ import annotations

import io
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import PIL.Image
import pytest

from cluster.errors import DeadlineExceeded, OverloadedError
from cosmos3_core.errors import RequestError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.jobs.submit_options import SubmitOptions
from tests.app.director_client import EventStream

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SMALL = GenerationRequest(prompt="A red car.", num_frames=17, height=80, width=96, num_inference_steps=6, seed=5)
# Four times IDLE_S of work and more in the stage in question: one that is idle within it was stopped, and did not end.
LONG_DENOISE = replace(SMALL, num_inference_steps=1000, num_frames=241, height=192, width=320)
# Unguided, since the one step before it, of attention over the whole clip, is not what is tested.
LONG_DECODE = replace(LONG_DENOISE, num_inference_steps=1, num_frames=801, guidance_scale=1.0)
IDLE_S = 20.0


def test_clips_do_not_mix_and_each_stays_with_one_encoder(
    start_app: Callable[..., Any], reference: Callable[[GenerationRequest], GenerationResult]
) -> None:
    """Two encoders, two decoders, two Directors, six clips at once."""
    app = start_app("pair", encoder__num_replicas=2, vae__num_replicas=2, director__num_replicas=2)
    requests = [replace(SMALL, seed=seed) for seed in range(6)]
    expected = [reference(request).frames_sha256 for request in requests]
    assert len(set(expected)) == len(expected)

    def run(request: GenerationRequest) -> tuple[str, set[int]]:
        events = list(app.client.stream(request, timeout_s=200))
        encoders = {event.pid for event in events if isinstance(event, messages.ChunkEncoded)}
        (finished,) = (event for event in events if isinstance(event, messages.Finished))
        return finished.frames_sha256, encoders

    with ThreadPoolExecutor(6) as pool:
        results = list(pool.map(run, requests))
    assert [digest for digest, _ in results] == expected
    assert all(len(encoders) == 1 for _, encoders in results)
    # More clips than places, and Directors that know nothing of each other: a clip that held an encoder's place and
    # waited for a decoder's, which another one held and waited for an encoder, would wait for ever.
    with ThreadPoolExecutor(12) as pool:
        many = list(pool.map(run, requests * 2))
    assert [digest for digest, _ in many] == expected * 2
    assert len(set.union(*(encoders for _, encoders in results))) == 2, "both encoders had work"


def rss_bytes(pid: int, kind: str = "RssAnon") -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))


def test_latents_pass_the_director_by_reference(ray_cluster: int) -> None:
    """A stage streams a 100 MB envelope; the Director's kind of forwarding leaves its own memory where it was."""
    import ray
    from ray import serve

    from cluster.envelope import TensorEnvelope
    from deployments.messages import LatentsReady, RequestContext
    from deployments.stages.streams import follow_stream

    class Producer:
        async def denoise(self) -> Any:
            yield LatentsReady(0.0, ("video",), os.getpid(), ())
            yield TensorEnvelope.of_array(np.ones(100 * 2**20, np.uint8))

    class Consumer:
        async def decode(self, latents: TensorEnvelope) -> Any:
            yield int(latents.array().sum()), os.getpid()

    class Middle:
        def __init__(self, producer: Any, consumer: Any) -> None:
            self._producer, self._consumer = producer.options(stream=True), consumer.options(stream=True)

        async def walk(self) -> dict[str, int]:
            context = RequestContext.new("r", 100)
            before = rss_bytes(os.getpid())
            async with follow_stream(self._producer.denoise.remote(), context, "denoise") as stream:
                assert isinstance(await stream.next_value(), LatentsReady)
                latents = await stream.next_ref()
                held = await latents  # so that its bytes stay on this node
            async with follow_stream(self._consumer.decode.remote(latents), context, "decode") as stream:
                total, consumer_pid = await stream.next_value()
            grown = rss_bytes(os.getpid()) - before
            assert held.num_bytes == 100 * 2**20
            return {"total": total, "grown": grown, "pid": os.getpid(), "consumer": consumer_pid}

    options = {"ray_actor_options": {"num_cpus": 0.1}, "graceful_shutdown_wait_loop_s": 0.05}
    producer, consumer = (serve.deployment(body).options(**options).bind() for body in (Producer, Consumer))
    handle = serve.run(
        serve.deployment(Middle).options(**options).bind(producer, consumer), name="middle", route_prefix="/middle"
    )
    try:
        handle.walk.remote().result(timeout_s=60)  # imports and first-use buffers
        result = handle.walk.remote().result(timeout_s=60)
    finally:
        serve.delete("middle")
    assert ray.is_initialized()
    assert result["total"] == 100 * 2**20
    assert result["pid"] != result["consumer"]
    assert result["grown"] < 10 * 2**20


class Watched:
    """What the stages of an app are doing, told by their processes' CPU time."""

    def __init__(self, app: Any) -> None:
        request = replace(SMALL, num_frames=5, num_inference_steps=2)
        known = {type(event): event for event in app.client.stream(request)}
        chunk = known[messages.ChunkEncoded]
        self.pids = {"rank": known[messages.StepDone].pid, "vae": chunk.decoded_by, "encoder": chunk.pid}
        self.director = known[messages.Accepted].pid

    def is_idle(self) -> bool:
        before = [self._cpu_ticks(pid) for pid in self.pids.values()]
        time.sleep(0.5)
        return all(self._cpu_ticks(pid) - ticks <= 5 for pid, ticks in zip(self.pids.values(), before, strict=True))

    @staticmethod
    def _cpu_ticks(pid: int) -> int:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            fields = file.read().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])


def open_clips(app: Any) -> int:
    return int(app.client._handle.num_open_clips.remote().result(timeout_s=30))


@pytest.mark.parametrize("at", [messages.StepDone, messages.ChunkEncoded], ids=["denoising", "decoding"])
@pytest.mark.parametrize("how", ["close", pytest.param("drop", marks=pytest.mark.slow)])
def test_leaving_a_stream_stops_every_stage(how: str, at: type, app: Any, eventually: Callable[..., bool]) -> None:
    watched = Watched(app)
    stream = app.client.stream(LONG_DENOISE if at is messages.StepDone else LONG_DECODE)
    for event in stream:
        if isinstance(event, at):
            break
    if how == "close":
        stream.close()
    del stream
    assert eventually(watched.is_idle, IDLE_S), "a stage went on working"
    assert eventually(lambda: open_clips(app) == 0)
    assert app.client.generate(SMALL).info.num_frames == 17


def test_a_client_that_hangs_up_stops_every_stage(app: Any, eventually: Callable[..., bool]) -> None:
    watched = Watched(app)
    host, port = app.url.split("/")[2].split(":")
    body = json.dumps({"prompt": "a car", "num_frames": 241, "height": 192, "width": 320, "num_inference_steps": 1000})
    head = f"POST /{app.name}/v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        assert eventually(lambda: not watched.is_idle()), "the request never started"
    assert eventually(watched.is_idle, IDLE_S), "a stage went on working for nobody"
    assert eventually(lambda: open_clips(app) == 0)


def webp_of(event: messages.PreviewReady) -> PIL.Image.Image:
    assert event.media_type == "image/webp"
    assert len(event.data) < 50_000
    return PIL.Image.open(io.BytesIO(event.data), formats=["WEBP"])


def test_previews_come_while_steps_are_made_and_change_with_them(app: Any) -> None:
    """Steps of a tenth of a second or more, so that a quantum is one or two; the clip itself is not waited for."""
    request = replace(SMALL, num_frames=121, height=192, width=320, num_inference_steps=12)
    told: list[messages.StepDone | messages.PreviewReady] = []
    with app.client.stream(request, previews=6) as stream:
        for event in stream:
            assert not isinstance(event, messages.PreviewsOff), event.reason
            if isinstance(event, messages.StepDone | messages.PreviewReady):
                told.append(event)
            if isinstance(event, messages.LatentsReady):
                break
    previews = [event for event in told if isinstance(event, messages.PreviewReady)]
    assert 2 <= len(previews) <= 6
    sigmas = {event.step: event.sigma for event in told if isinstance(event, messages.StepDone)}
    assert list(sigmas) == list(range(1, 13))
    for preview in previews:
        before = [event.step for event in told[: told.index(preview)] if isinstance(event, messages.StepDone)]
        assert preview.step in before
        assert preview.sigma == sigmas[preview.step]
        with webp_of(preview) as image:
            assert (image.size, image.n_frames) == ((256, 154), 12)
    assert isinstance(told[-1], messages.StepDone), "a preview after the last step"
    assert [preview.step for preview in previews] == sorted({preview.step for preview in previews})
    assert len({preview.data for preview in previews}) == len(previews), "a preview did not change"


def test_previews_leave_the_clip_as_it_is_and_are_stills_of_images(app: Any, reference: Callable[..., Any]) -> None:
    request = replace(SMALL, num_frames=1, num_inference_steps=200)  # several quanta
    events = list(app.client.stream(request, previews=5))
    (finished,) = (event for event in events if isinstance(event, messages.Finished))
    assert finished.frames_sha256 == reference(request).frames_sha256
    previews = [event for event in events if isinstance(event, messages.PreviewReady)]
    assert 1 <= len(previews) <= 5
    for preview in previews:
        with webp_of(preview) as image:
            assert (image.size, image.n_frames) == ((256, 213), 1)


def test_a_director_refuses_more_previews_than_there_may_be(app: Any) -> None:
    response = app.client._streaming.stream.remote(SMALL.packed(), SubmitOptions(previews=33), 60.0)
    with pytest.raises(RequestError, match="previews=33: allowed is a whole number from 0 to 32"):
        list(EventStream(response, 60.0))


def test_past_its_bounds_the_app_says_when_to_come_back(start_app: Callable[..., Any]) -> None:
    """Two places behind three: of twelve callers over HTTP and three by handle, one is served and one waits at a time;
    the rest is told 429, or its typed twin, by whichever bound it met first. Nobody gets a 5xx."""
    app = start_app(
        "narrow",
        jobs__max_running_videos=1,
        jobs__max_queued=1,
        ingress__max_ongoing_requests=3,
        ingress__max_queued_requests=1,
    )
    request = replace(SMALL, num_frames=5, num_inference_steps=300)
    body = {"prompt": "a car", "num_frames": 5, "height": 80, "width": 96, "num_inference_steps": 300}
    barrier = threading.Barrier(15)

    def by_http() -> tuple[int, str]:
        barrier.wait()
        headers = {"content-type": "application/json"}
        data = json.dumps(body).encode()
        try:
            answer = urllib.request.urlopen(
                urllib.request.Request(f"{app.url}/v1/videos/sync", data, headers), timeout=200
            )
        except urllib.error.HTTPError as refused:
            answer = refused
        with answer:
            answer.read()
            return answer.status, answer.headers.get("retry-after", "")

    def by_handle() -> tuple[int, str]:
        barrier.wait()
        try:
            app.client.generate(request)
        except OverloadedError as refused:
            return 429, str(refused.retry_after_s)
        return 200, ""

    with ThreadPoolExecutor(15) as pool:
        futures = [pool.submit(by_http) for _ in range(12)] + [pool.submit(by_handle) for _ in range(3)]
        answers = [future.result() for future in futures]
    codes = [code for code, _ in answers]
    assert set(codes) == {200, 429}
    assert codes.count(200) >= 2
    assert codes.count(429) >= 9
    assert all(float(retry_after) >= 1 for code, retry_after in answers if code == 429)
    assert app.client.generate(SMALL).info.num_frames == 17, "a place is free again"


def test_a_request_past_its_deadline_stops_everywhere(app: Any, eventually: Callable[..., bool]) -> None:
    watched = Watched(app)
    with pytest.raises(DeadlineExceeded, match="within 2 s; it was in the stage 'denoise'"):
        app.client.generate(LONG_DENOISE, timeout_s=2)
    assert eventually(watched.is_idle, IDLE_S)
