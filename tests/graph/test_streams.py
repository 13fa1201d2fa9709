"""Clips in flight: each reaches one encoder whole, the Director never holds their bytes, and leaving stops the work."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cluster.errors import DeadlineExceeded
from cluster.events import StepDone
from cosmos3_core.request import GenerationRequest
from deployments import messages
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]

SMALL = GenerationRequest(prompt="A red car.", num_frames=17, height=80, width=96, num_inference_steps=6, seed=5)
# At least four times IDLE_S of work in that stage: if it is idle earlier, it was stopped.
LONG_DENOISE = replace(SMALL, num_inference_steps=1000, num_frames=241, height=192, width=320)
# Unguided, to shorten the one step before it, which is not tested.
LONG_DECODE = replace(LONG_DENOISE, num_inference_steps=1, num_frames=801, guidance_scale=1.0)
IDLE_S = 20.0


def of_kind(events: Iterable[Any], kind: type) -> Iterator[Any]:
    return (event for event in events if isinstance(event, kind))


def rss_bytes(pid: int, kind: str = "RssAnon") -> int:
    with open(f"/proc/{pid}/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(kind))


def test_latents_pass_the_director_by_reference(ray_cluster: int) -> None:
    """A stage streams a 100 MB envelope; forwarding it as the Director does needs no memory."""
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


class StageActivity:
    """Activity of an app's stages, by their processes' CPU time."""

    def __init__(self, app: Any) -> None:
        request = replace(SMALL, num_frames=5, num_inference_steps=2)
        known = {type(event): event for event in app.client.stream(request)}
        chunk = known[messages.ChunkEncoded]
        self.pids = {"rank": known[StepDone].pid, "vae": chunk.decoded_by, "encoder": chunk.pid}
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


# tests/app runs all four in one process. On Ray, every run has two: a stream closed during steps, a disconnect.
@pytest.mark.parametrize(
    "at",
    [StepDone, pytest.param(messages.ChunkEncoded, marks=pytest.mark.slow)],
    ids=["denoising", "decoding"],
)
@pytest.mark.parametrize("how", ["close", pytest.param("drop", marks=pytest.mark.slow)])
def test_leaving_a_stream_stops_every_stage(how: str, at: type, app: Any) -> None:
    activity = StageActivity(app)
    stream = app.client.stream(LONG_DENOISE if at is StepDone else LONG_DECODE)
    for event in stream:
        if isinstance(event, at):
            break
    if how == "close":
        stream.close()
    del stream
    assert eventually(activity.is_idle, IDLE_S), "a stage went on working"
    assert eventually(lambda: open_clips(app) == 0)
    assert app.client.generate(SMALL).info.num_frames == 17


def test_a_client_that_hangs_up_stops_every_stage(app: Any) -> None:
    activity = StageActivity(app)
    host, port = app.url.split("/")[2].split(":")
    body = json.dumps({"prompt": "a car", "num_frames": 241, "height": 192, "width": 320, "num_inference_steps": 1000})
    head = f"POST /{app.name}/v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        assert eventually(lambda: not activity.is_idle()), "the request never started"
    assert eventually(activity.is_idle, IDLE_S), "a stage went on working after its client had left"
    assert eventually(lambda: open_clips(app) == 0)


@pytest.mark.slow  # tests/app runs the same in one process
def test_a_request_past_its_deadline_stops_everywhere(app: Any) -> None:
    activity = StageActivity(app)
    with pytest.raises(DeadlineExceeded, match="within 2 s; it was in the stage 'denoise'"):
        app.client.generate(LONG_DENOISE, timeout_s=2)
    assert eventually(activity.is_idle, IDLE_S)
