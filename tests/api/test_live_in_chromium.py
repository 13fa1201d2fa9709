"""Headless Chromium plays a clip while it is encoded; the page reports its position.

Where Chromium is missing, root installs Debian's package (`apt-get install chromium`, with a notice); others skip the
test.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from cosmos3_core.media.mp4 import Mp4Writer
from cosmos3_core.media.sound import SoundFormat
from deployments.jobs.job import new_job_id
from deployments.media.layout import new_media_id
from deployments.media.store import MediaStore
from tests.api.content_answers import content_answer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FPS, RATE, HEIGHT, WIDTH = 24, 48000, 96, 160
NUM_FRAMES, NUM_BEFORE = 240, 96  # 10 s, and the 4 s that exist when the browser starts
DEADLINE_S = 120.0

# With "autoplay" Chromium waits until it expects to play to the end: with a small clip, until the clip is complete.
PAGE = """<!doctype html><video id="clip" src="/v1/videos/MEDIA_ID/content" muted></video><script>
const clip = document.getElementById("clip");
clip.play();
const say = kind => fetch("/said", {method: "POST", body: JSON.stringify({
  kind, time: clip.currentTime, width: clip.videoWidth, height: clip.videoHeight,
  frames: clip.getVideoPlaybackQuality().totalVideoFrames, error: clip.error && clip.error.message})});
for (const kind of ["playing", "ended", "error"]) clip.addEventListener(kind, () => say(kind));
setInterval(() => say("time"), 100);
</script>"""


@pytest.fixture(scope="module")
def chromium() -> str:
    if shutil.which("chromium") is None:
        if os.geteuid() != 0 or shutil.which("apt-get") is None:
            pytest.skip("there is no chromium here: install it (Debian: apt-get install chromium)")
        print("installing chromium: apt-get install --no-install-recommends chromium")
        for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium"]):
            done = subprocess.run(["apt-get", "-q", *command], capture_output=True, text=True, timeout=600, check=False)
            if done.returncode != 0:
                pytest.skip(f"apt-get {command[0]} failed: {done.stderr[-300:]}")
    path = shutil.which("chromium")
    assert path is not None
    return path


class Said:
    """Receives the page's reports."""

    def __init__(self) -> None:
        self.all: list[dict[str, Any]] = []
        self._news = threading.Condition()

    def add(self, said: dict[str, Any]) -> None:
        with self._news:
            self.all.append(said)
            self._news.notify_all()

    def wait_for(self, is_it: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        with self._news:
            came = self._news.wait_for(lambda: any(is_it(said) or said["error"] for said in self.all), DEADLINE_S)
            assert came, f"it never came; last was {self.all[-3:]}"
            found = [said for said in self.all if is_it(said)]
            assert found, f"the browser cannot play it: {self.all[-1]}"
            return found[0]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[str, MediaStore, Said]]:
    """Serve the page and the store's files; give the address."""
    store, said = MediaStore(tmp_path / "media", max_bytes=1 << 30, keep_s=DEADLINE_S), Said()

    async def page(request: Request) -> Response:
        return HTMLResponse(PAGE.replace("MEDIA_ID", request.path_params["media_id"]))

    async def content(request: Request) -> Response:
        return await content_answer(store, request.path_params["media_id"], request.method, request.headers)

    async def listen(request: Request) -> Response:
        said.add(json.loads(await request.body()))
        return Response()

    routes = [
        Route("/page/{media_id:path}", page),
        Route("/v1/videos/{media_id:path}/content", content),
        Route("/said", listen, methods=["POST"]),
    ]
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=routes), log_level="warning", timeout_graceful_shutdown=1))
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}", store, said
    server.should_exit = True
    thread.join(DEADLINE_S)
    listener.close()


@pytest.fixture
def browse(chromium: str, tmp_path: Path) -> Iterator[Callable[[str], None]]:
    """Open a page in Chromium."""
    started: list[subprocess.Popen[bytes]] = []
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    flags += ["--autoplay-policy=no-user-gesture-required", f"--user-data-dir={tmp_path / 'profile'}"]

    def start(url: str) -> None:
        with (tmp_path / "chromium.log").open("wb") as log:
            started.append(
                subprocess.Popen([chromium, *flags, url], stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )

    yield start
    for process in started:
        process.terminate()
        process.wait(30)


def frames_of(start: int, end: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Make moving frames, uint8 [F, Y, X, 3]."""
    frame, row, column = np.mgrid[start:end, :HEIGHT, :WIDTH]
    planes = [127.5 + 120 * np.sin((column + speed * frame + row) / 20) for speed in (3, -2, 1)]
    return np.stack(planes, axis=-1).round().astype(np.uint8)


@pytest.mark.parametrize("with_sound", [False, True])
def test_chromium_plays_a_growing_clip_to_its_end(
    with_sound: bool, site: tuple[str, MediaStore, Said], browse: Callable[[str], None]
) -> None:
    url, store, said = site
    media_id = new_media_id(new_job_id())
    entry = store.create(media_id, "video/mp4", ".mp4", is_live=True)
    sound = SoundFormat(RATE, 2, NUM_FRAMES * RATE // FPS) if with_sound else None
    with Mp4Writer(entry.path, fps=FPS, height=HEIGHT, width=WIDTH, sound=sound, live=entry.live_path) as writer:

        def write(start: int, end: int) -> None:
            writer.write(frames_of(start, end))
            if with_sound:
                time_s = np.arange(start * RATE // FPS, end * RATE // FPS) / RATE
                writer.write_sound(0.3 * np.stack([np.sin(2 * np.pi * 440 * time_s)] * 2).astype(np.float32))

        write(0, NUM_BEFORE)
        browse(f"{url}/page/{media_id}")
        begun_s = time.monotonic()
        first = said.wait_for(lambda it: it["time"] > 0)
        later = said.wait_for(lambda it: it["time"] > first["time"] + 0.5)
        assert (later["width"], later["height"]) == (WIDTH, HEIGHT)
        assert later["frames"] > 5
        assert not entry.path.exists(), "it is still being written"
        print(f"plays {time.monotonic() - begun_s:.1f} s after the browser was started")
        for start in range(NUM_BEFORE, NUM_FRAMES, 24):
            write(start, start + 24)
    entry.finish()
    ended = said.wait_for(lambda it: it["kind"] == "ended")
    assert abs(ended["time"] - NUM_FRAMES / FPS) < 0.1
    assert not any(it["error"] for it in said.all)
