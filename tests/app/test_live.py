"""A file is streamed while it grows, and served whole afterwards."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import httpx2
import numpy as np
import pytest

from cosmos3_core.media.probe import read_frames
from cosmos3_core.request import GenerationRequest
from deployments import messages
from deployments.clients.http_transport import make_body
from tests.core_reference import Reference

pytestmark = pytest.mark.timeout(600)

DEADLINE_S = 300.0
LONG = GenerationRequest(prompt="A red car.", num_frames=61, height=96, width=128, num_inference_steps=2, seed=7)
SMALL = replace(LONG, num_frames=5, height=64, width=64)


def test_a_growing_file_is_streamed_and_stored_under_its_id(app: Any, reference: Reference, tmp_path: Path) -> None:
    path = reference(LONG).path
    assert path is not None
    expected = path.read_bytes()
    answer = httpx2.post(f"{app.url}/v1/videos/sync", json={**make_body(LONG), "stream": True}, timeout=DEADLINE_S)
    live = answer.content
    assert live[4:8] == expected[4:8] == b"ftyp"
    assert b"moof" in live
    assert b"moof" not in expected
    (tmp_path / "live.mp4").write_bytes(live)
    watched, kept = (np.stack(list(read_frames(clip))) for clip in (tmp_path / "live.mp4", path))
    assert np.array_equal(watched, kept), "the same packets"
    url = f"{app.url}/v1/videos/{answer.headers['x-video-id']}/content"
    whole = httpx2.get(url, timeout=DEADLINE_S)
    assert whole.content == expected
    assert int(whole.headers["content-length"]) == len(expected)
    part = httpx2.get(url, headers={"range": "bytes=100-199"}, timeout=DEADLINE_S)
    assert (part.status_code, part.headers["content-range"]) == (206, f"bytes 100-199/{len(expected)}")
    assert part.content == expected[100:200]


def test_the_gang_runs_the_next_request_while_a_clip_is_decoded(app: Any, tmp_path: Path) -> None:
    """Judged by the order of events, not by time."""
    with app.client.stream(replace(LONG, num_frames=101)) as events:
        started = next(event for event in events if isinstance(event, messages.FileStarted))
        assert app.client.generate(SMALL).info.num_frames == 5
        rest = list(events)
    assert any(isinstance(event, messages.ChunkDecoded) for event in rest)
    finished = rest[-1]
    assert isinstance(finished, messages.Finished)
    assert (finished.media_id, finished.num_frames) == (started.media_id, 101)
    (tmp_path / "clip.mp4").write_bytes(b"".join(app.client.read(finished.job_id)))
    with av.open(str(tmp_path / "clip.mp4")) as container:
        assert sum(1 for _ in container.decode(video=0)) == 101
