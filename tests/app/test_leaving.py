"""A caller that leaves, or a deadline, stops the work of every stage."""

from __future__ import annotations

import json
import socket
from dataclasses import replace
from typing import Any

import pytest

from cluster.errors import DeadlineExceeded
from cluster.events import StepDone
from cosmos3_core.request import GenerationRequest
from deployments import messages
from tests.app.in_process import InProcessApp
from tests.settling import eventually

pytestmark = pytest.mark.timeout(600)

SMALL = GenerationRequest(prompt="A red car.", num_frames=5, height=32, width=32, num_inference_steps=2, seed=5)
# Would take hours if not stopped.
LONG = replace(SMALL, num_frames=61, height=96, width=128, num_inference_steps=1000)


def is_idle(app: InProcessApp) -> bool:
    """Whether the gang has no request and no clip is between decoder and encoder."""
    (leader,) = app.replicas("Transformer")
    return leader._loop.num_jobs == 0 and app.client.ask("num_open_clips") == 0


@pytest.mark.parametrize("how", ["close", "drop"])
@pytest.mark.parametrize("at", [StepDone, messages.ChunkEncoded], ids=["denoising", "decoding"])
def test_leaving_a_stream_stops_every_stage(how: str, at: type, app: InProcessApp) -> None:
    request = LONG if at is StepDone else replace(LONG, num_inference_steps=1, num_frames=401)
    stream = app.client.stream(request)
    assert any(isinstance(event, at) for event in stream)
    if how == "close":
        stream.close()
    del stream
    assert eventually(lambda: is_idle(app))
    assert app.client.generate(SMALL).info.num_frames == 5


def test_a_client_that_hangs_up_stops_every_stage(app: InProcessApp) -> None:
    host, port = app.url.removeprefix("http://").split(":")
    names = "prompt", "num_frames", "height", "width", "num_inference_steps"
    body = json.dumps({name: getattr(LONG, name) for name in names})
    head = "POST /v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"{head}content-length: {len(body)}\r\n\r\n{body}".encode())
        assert eventually(lambda: not is_idle(app)), "the request never started"
    assert eventually(lambda: is_idle(app))


def test_a_request_past_its_deadline_stops_everywhere(app: Any) -> None:
    with pytest.raises(DeadlineExceeded, match="within 2 s; it was in the stage 'denoise'"):
        app.client.generate(LONG, timeout_s=2)
    assert eventually(lambda: is_idle(app))
