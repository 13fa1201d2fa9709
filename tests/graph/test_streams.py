"""Clips in flight: each reaches one encoder whole, the Director never holds their bytes, and leaving stops the work."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from typing import Any

import httpx2
import numpy as np
import pytest

from cluster.errors import DeadlineExceeded, OverloadedError
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from deployments import messages

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


def of_kind(events: Iterable[Any], kind: type) -> Iterator[Any]:
    return (event for event in events if isinstance(event, kind))


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
    return int(app.client.ask("num_open_clips"))


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


def num_queued(app: Any) -> int:
    """Jobs that wait, those of callers too, which no page shows."""
    path = app.config.jobs.database.removeprefix("sqlite:///")
    with closing(sqlite3.connect(path)) as database:
        return int(database.execute("select count(*) from jobs where state = 'queued'").fetchone()[0])


def test_past_its_bounds_the_app_says_when_to_come_back(
    start_app: Callable[..., Any], eventually: Callable[..., bool]
) -> None:
    """One clip runs and is held, so whatever is full stays full: the ingress with three calls and a fourth that waits
    for it, then the queue of jobs with four. Callers beyond get 429, or its typed twin, and nobody gets a 5xx.
    """
    app = start_app(
        "narrow",
        jobs__max_running_videos=1,
        jobs__max_queued=4,
        ingress__max_ongoing_requests=3,
        ingress__max_queued_requests=1,
        transformer__quantum_timeout_s=1000,
    )
    body = {"prompt": "a car", "num_frames": 5, "height": 80, "width": 96, "num_inference_steps": 2}

    def by_http() -> httpx2.Response:
        return httpx2.post(f"{app.url}/v1/videos/sync", json=body, timeout=500)

    with app.client.stream(replace(SMALL, num_inference_steps=1000)) as running, ThreadPoolExecutor(11) as pool:
        (rank_pid,) = {event.pid for event in itertools.islice(of_kind(running, messages.StepDone), 1)}
        os.kill(rank_pid, signal.SIGSTOP)
        try:
            taken = [pool.submit(by_http) for _ in range(3)]
            assert eventually(lambda: num_queued(app) == 3)
            others = [pool.submit(by_http) for _ in range(8)]
            assert eventually(lambda: sum(each.done() for each in others) == 7), "one has the place that there is"
            refused = [each.result() for each in others if each.done()]
            with app.client.stream(SMALL) as last:
                assert isinstance(next(last), messages.Accepted)
                with pytest.raises(OverloadedError) as full:
                    app.client.generate(SMALL)
        finally:
            os.kill(rank_pid, signal.SIGCONT)
        running.close()
        served = [each.result() for each in (*taken, *others) if each.result() not in refused]
    assert {answer.status_code for answer in refused} == {429}
    assert all(float(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert full.value.retry_after_s >= 1
    assert [answer.status_code for answer in served] == [200] * 4
    assert app.client.generate(SMALL).info.num_frames == 17, "a place is free again"


def test_a_request_past_its_deadline_stops_everywhere(app: Any, eventually: Callable[..., bool]) -> None:
    watched = Watched(app)
    with pytest.raises(DeadlineExceeded, match="within 2 s; it was in the stage 'denoise'"):
        app.client.generate(LONG_DENOISE, timeout_s=2)
    assert eventually(watched.is_idle, IDLE_S)
