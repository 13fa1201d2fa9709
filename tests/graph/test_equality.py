"""HTTP, handle and one process give the same frames and bytes, and every stage is a process."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from cluster.events import StepDone
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.clients.http_transport import make_body
from tests.app.every_mode import check_mode
from tests.mode_inputs import MINIMAL

pytestmark = pytest.mark.cluster

SMALL = GenerationRequest(prompt="A red car.", num_frames=17, height=80, width=96, num_inference_steps=6, seed=5)
Reference = Callable[[GenerationRequest], GenerationResult]


def post(url: str, body: dict[str, Any]) -> Any:
    data, headers = json.dumps(body).encode(), {"content-type": "application/json"}
    return urllib.request.urlopen(urllib.request.Request(f"{url}/v1/videos/sync", data, headers), timeout=100)


@pytest.mark.parametrize(
    "request_",
    [
        SMALL,
        replace(SMALL, num_frames=1),
        replace(SMALL, guidance_scale=1.0, num_frames=6),
        replace(SMALL, schedule="karras"),
    ],
    ids=["video", "image", "rounded, unguided", "karras"],
)
def test_handle_http_and_one_process_give_equal_files(
    request_: GenerationRequest, app: Any, reference: Reference
) -> None:
    alone = reference(request_)
    assert alone.path is not None
    expected = alone.path.read_bytes()

    generated = app.client.generate(request_)
    assert generated.info.frames_sha256 == alone.frames_sha256
    assert generated.media == expected
    assert generated.info.notes == alone.request.notes
    assert generated.info.negative_origin == "built-in"

    events = list(app.client.stream(request_))
    assert isinstance(events[-1], messages.Finished)
    assert b"".join(app.client.read(events[-1].job_id)) == expected

    with post(app.url, make_body(request_)) as answer:
        assert answer.read() == expected
        assert answer.headers["x-frames-sha256"] == alone.frames_sha256
        assert answer.headers["content-type"] == ("image/png" if request_.num_frames == 1 else "video/mp4")
        assert int(answer.headers["content-length"]) == len(expected)
        stages = json.loads(answer.headers["x-stage-durations"])
        assert set(stages) == {"tokenize", "denoise", "decode_encode", "encode", "total"}
        assert json.loads(answer.headers["x-notes"]) == list(alone.request.notes)


@pytest.mark.slow  # tests/app runs the same in one process
@pytest.mark.parametrize("mode", MINIMAL)
def test_every_mode_by_handle_and_over_http_equals_one_process(mode: str, app: Any, reference: Reference) -> None:
    check_mode(mode, app, reference)


def test_events_come_in_order_from_one_process_per_stage(app: Any) -> None:
    events = list(app.client.stream(SMALL))
    kinds = [type(event).__name__ for event in events if not isinstance(event, messages.StateSaved)]
    order = ["Accepted", "Tokenized", "QueuePosition", "StepDone", "LatentsReady", "FileStarted"]
    order += ["ChunkDecoded", "ChunkEncoded", "ClipEncoded", "Finished"]
    assert list(dict.fromkeys(kinds)) == order

    steps = [event for event in events if isinstance(event, StepDone)]
    assert [step.num_steps for step in steps] == [6] * len(steps)
    assert [step.step for step in steps] == sorted({step.step for step in steps})
    assert steps[-1].step == 6
    assert steps[-1].sigma == 0
    encoded = [event for event in events if isinstance(event, messages.ChunkEncoded)]
    assert [chunk.num_frames for chunk in encoded] == [1, 4, 4, 4, 4]

    by_kind = {type(event): event for event in events}
    pids = {
        "director": by_kind[messages.Accepted].pid,
        "tokenizer": by_kind[messages.Tokenized].pid,
        "leader": by_kind[messages.LatentsReady].pid,
        "rank": by_kind[StepDone].pid,
        "vae leader": by_kind[messages.ChunkDecoded].pid,
        "vae rank": encoded[0].decoded_by,
        "encoder": encoded[0].pid,
    }
    assert len(set(pids.values())) == len(pids), pids
    assert by_kind[messages.LatentsReady].rank_pids == (pids["rank"],)


def test_the_encoder_has_the_first_chunk_before_the_decoder_makes_the_last(app: Any) -> None:
    """A window of two chunks and a clip of five, judged by the order of events on one machine's clock."""
    assert app.config.director.chunk_window == 2
    events = list(app.client.stream(SMALL))
    decoded = {event.index: event.at_s for event in events if isinstance(event, messages.ChunkDecoded)}
    encoded = {event.chunk: event.at_s for event in events if isinstance(event, messages.ChunkEncoded)}
    assert len(decoded) == len(encoded) == 5
    assert encoded[0] < decoded[4]
    # Never more than two chunks ahead: chunk i + 2 is made only after chunk i is consumed and its credit returned.
    for index in range(3):
        assert encoded[index] < decoded[index + 2]
