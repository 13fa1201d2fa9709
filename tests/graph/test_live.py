"""Streaming: files are read while they grow, the gang runs the next request, and a stalled reader stops nothing."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import av
import pytest

from cluster.events import StepDone
from cosmos3_core.generate import GenerationResult
from cosmos3_core.request import GenerationRequest
from deployments import messages
from tests.graph.watch_memory import object_store_bytes
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

Reference = Callable[[GenerationRequest], GenerationResult]
# 36 chunks, so that first and last frame are seconds apart.
LONG = GenerationRequest(prompt="A red car.", num_frames=141, height=96, width=128, num_inference_steps=2, seed=7)
SMALL = replace(LONG, num_frames=5, height=64, width=64)
DEADLINE_S, LARGE_S = 300.0, 1500.0


def body_of(request: GenerationRequest, **more: Any) -> bytes:
    fields = "prompt", "num_frames", "height", "width", "num_inference_steps", "seed", "lossless"
    return json.dumps({name: getattr(request, name) for name in fields} | more).encode()


def post(app: Any, request: GenerationRequest, **more: Any) -> Any:
    headers = {"content-type": "application/json"}
    asked = urllib.request.Request(f"{app.url}/v1/videos/sync", body_of(request, **more), headers)
    return urllib.request.urlopen(asked, timeout=DEADLINE_S)


def content(app: Any, job_id: str, **headers: str) -> Any:
    asked = urllib.request.Request(f"{app.url}/v1/videos/{job_id}/content", headers=headers)
    return urllib.request.urlopen(asked, timeout=DEADLINE_S)


def live_content(app: Any, job_id: str) -> Any:
    """GET the growing file once the job has it, a moment after its event."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            return content(app, job_id)
        except urllib.error.HTTPError as error:
            if error.code != 409 or time.monotonic() > deadline_s:
                raise
        time.sleep(0.01)


class FollowedClip:
    """A request whose events are followed in a thread."""

    def __init__(self, app: Any, request: GenerationRequest) -> None:
        self.events: list[Any] = []
        self.failure: Exception | None = None
        self._news = threading.Condition()
        self._stream = app.client.stream(request, timeout_s=DEADLINE_S)
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def first(self, kind: type) -> Any:
        with self._news:
            assert self._news.wait_for(lambda: self._find(kind) or self.failure, DEADLINE_S)
        assert self._find(kind), self.failure
        return self._find(kind)[0]

    def all_of(self, kind: type) -> list[Any]:
        self._thread.join(DEADLINE_S)
        assert self.failure is None, self.failure
        return self._find(kind)

    def _find(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    def _follow(self) -> None:
        try:
            for event in self._stream:
                with self._news:
                    self.events.append(event)
                    self._news.notify_all()
        except Exception as error:  # noqa: BLE001 - shown by whoever waits
            with self._news:
                self.failure = error
                self._news.notify_all()


def test_before_a_clip_is_decoded_its_first_fragment_plays_and_the_gang_is_free(app: Any, reference: Reference) -> None:
    """Judged by the order of events on one machine's clock, not by time."""
    clip = FollowedClip(app, LONG)
    started = clip.first(messages.FileStarted)
    job_id = clip.first(messages.Accepted).job_id
    with live_content(app, job_id) as answer, av.open(answer, format="mp4") as growing:
        assert answer.headers["content-type"] == "video/mp4"
        assert answer.headers["content-length"] is None
        frames = growing.decode(video=0)
        first = next(frames)
        first_shown_s = time.time()
        next_step_s = 0.0
        for event in app.client.stream(SMALL, timeout_s=DEADLINE_S):
            if isinstance(event, StepDone):
                next_step_s = next_step_s or time.time()
        assert (first.width, first.height) == (128, 96)
        assert 1 + sum(1 for _ in frames) == LONG.num_frames, "a viewer of the growing file sees all of it"
    assert first_shown_s < clip.all_of(messages.ChunkDecoded)[-1].at_s
    assert 0 < next_step_s < clip.all_of(messages.ChunkEncoded)[-1].at_s
    (finished,) = clip.all_of(messages.Finished)
    assert finished.media_id == started.media_id
    assert finished.frames_sha256 == reference(LONG).frames_sha256


def test_a_dead_encoder_breaks_the_live_stream_and_the_clip_is_encoded_again(app: Any, reference: Reference) -> None:
    clip = FollowedClip(app, LONG)
    started = clip.first(messages.FileStarted)
    with live_content(app, clip.first(messages.Accepted).job_id) as answer:
        assert answer.read(1000)
        os.kill(started.pid, signal.SIGKILL)
        with pytest.raises((HTTPException, OSError)):
            while answer.read(1 << 16):
                pass
    again = clip.all_of(messages.FileStarted)[1]
    (finished,) = clip.all_of(messages.Finished)
    assert [event.stage for event in clip.all_of(messages.StageRetried)] == ["encode"]
    assert finished.media_id == again.media_id != started.media_id
    assert finished.frames_sha256 == reference(LONG).frames_sha256
    assert b"".join(app.client.read(finished.job_id)) == Path(reference(LONG).path or "").read_bytes()


def test_a_dead_decoder_does_not_break_the_live_stream(app: Any, reference: Reference) -> None:
    clip = FollowedClip(app, LONG)
    started = clip.first(messages.FileStarted)
    with live_content(app, clip.first(messages.Accepted).job_id) as answer:
        live = answer.read(1000)
        os.kill(clip.first(messages.ChunkEncoded).decoded_by, signal.SIGKILL)
        live += answer.read()
    (finished,) = clip.all_of(messages.Finished)
    assert [event.stage for event in clip.all_of(messages.StageRetried)] == ["decode"]
    assert finished.media_id == started.media_id
    expected = Path(reference(LONG).path or "").read_bytes()
    assert b"".join(app.client.read(finished.job_id)) == expected
    with post(app, LONG, stream=True) as undisturbed:
        assert live == undisturbed.read()


@pytest.mark.parametrize(
    ("num_frames", "least_bytes"), [(29, 1.5e6), pytest.param(801, 50e6, marks=pytest.mark.slow)], ids=["short", "long"]
)
def test_a_stalled_client_blocks_no_other(num_frames: int, least_bytes: float, app: Any, media: Path) -> None:
    """It reads 64 kB of a lossless clip, and then no more."""
    large = replace(LONG, num_frames=num_frames, height=192, width=320, num_inference_steps=1, lossless=True)
    host, port = app.url.split("/")[2].split(":")
    data = body_of(large, stream=True)
    head = f"POST /{app.name}/v1/videos/sync HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    before, files_before = object_store_bytes(), bytes_of_files(media)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
        stalled.settimeout(DEADLINE_S)
        stalled.connect((host, int(port)))
        stalled.sendall(f"{head}content-length: {len(data)}\r\n\r\n".encode() + data)
        taken = 0
        while taken < 65536:
            taken += len(stalled.recv(min(4096, 65536 - taken)))
        # The same clip for a client that reads: complete in spite of the stalled one.
        *_, finished = app.client.stream(large, timeout_s=LARGE_S)
        assert finished.num_frames == num_frames
        assert finished.num_bytes > least_bytes
        # What Serve has taken off the ingress' hands for the stalled client is at most the file, in its messages; with
        # what has been spilled. Latents of the clips go a moment after their requests.
        most_bytes = 1.1 * finished.num_bytes + 2**20
        assert eventually(lambda: object_store_bytes() - before < most_bytes), object_store_bytes() - before
        held_bytes = object_store_bytes() - before
        # Two clips, each as the file that grew and as the finished one.
        files_bytes = bytes_of_files(media) - files_before
        assert 2 * finished.num_bytes < files_bytes < 4.2 * finished.num_bytes + 2**16
        assert files_bytes < app.config.media.max_bytes
    shown = (f"{count / 1e6:.1f} MB {what}" for what, count in (("held", held_bytes), ("of files", files_bytes)))
    print(f"a file of {finished.num_bytes / 1e6:.1f} MB:", ", ".join(shown))


def bytes_of_files(directory: Path) -> int:
    num_bytes = 0
    for path in directory.rglob("*"):
        with suppress(FileNotFoundError):  # the file was just renamed
            num_bytes += path.stat().st_size if path.is_file() else 0
    return num_bytes
