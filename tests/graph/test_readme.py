"""README's blocks run as they stand, in order, in an empty folder, with this environment's Python."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from cosmos3_core.media.probe import probe_video

README = Path(__file__).parents[2] / "README.md"
BIN = Path(sys.executable).parent
READY_S = 280.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def ray_environment(said: str) -> dict[str, str]:
    """What `serve` prints for Python clients: its own Ray cluster, whatever others this machine runs."""
    pairs = re.findall(r"\b(RAY_\w+)=(\S+)", said)
    assert "RAY_ADDRESS" in dict(pairs)
    return dict(pairs)


def await_ready(port: int, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the app ended before it was ready"
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=10) as answer:
                assert answer.status == 200
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"not ready within {READY_S:.0f} s")


@pytest.mark.cluster
@pytest.mark.timeout(1500)
def test_every_block_runs(tmp_path: Path) -> None:
    blocks = re.findall(r"^```(bash background|bash|python)\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)
    kinds = ["bash", "bash background", "bash", "bash", "bash", "python", "python", "bash"]
    assert [kind for kind, _ in blocks] == kinds
    port = free_port()  # 8000 may be taken
    server: subprocess.Popen[bytes] | None = None
    try:
        for kind, code in blocks:
            # The environment is the one that runs this test; its commands lie beside its Python.
            code = code.replace("make env\n", "").replace(".venv/bin/", f"{BIN}/").replace(":8000", f":{port}")
            if kind == "bash background":
                command = [*code.split(), "--port", str(port)]
                with (tmp_path / "serve.txt").open("w") as said:
                    # Ray's workers would step back behind whatever else is being tested.
                    environment = {**os.environ, "RAY_worker_niceness": "0"}
                    server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said)
                await_ready(port, server)
                continue
            bash = ["bash", "-euo", "pipefail", "-c", code]
            command = bash if kind == "bash" else [sys.executable, "-c", code]
            environment = dict(os.environ)
            if kind == "python" and "connect()" in code:
                environment |= ray_environment((tmp_path / "serve.txt").read_text())
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
            assert done.returncode == 0, f"{code}\n{done.stdout}\n{done.stderr}"
    finally:
        if server is not None:
            server.send_signal(signal.SIGINT)
            assert server.wait(timeout=120) == 0
    first = probe_video(tmp_path / "first.mp4")
    assert (first.num_frames, first.height, first.width, first.fps) == (17, 192, 320, 24)
    made = {"clip": 17, "curl": 17, "job": 17, "live": 33, "whole": 33, "posted": 13}
    made |= {"handle": 9, "events": 9, "created": 9, "library": 9}
    for name, num_frames in made.items():
        assert probe_video(tmp_path / f"{name}.mp4").num_frames == num_frames
    for name in ("text", "image", "video", "waves", "loud", "louder", "policy", "carried"):
        info = probe_video(tmp_path / f"{name}.mp4")
        assert info.num_frames == (17 if name in ("policy", "carried") else 13)
        assert (info.sound is not None) == (name in ("waves", "loud", "louder"))
    for name in ("policy", "found"):
        actions = json.loads((tmp_path / f"{name}.actions.json").read_text())
        assert actions["shape"] == [16, 10]
    assert not (tmp_path / "found.mp4").exists()
    assert (tmp_path / "picture.png").exists()
    assert (tmp_path / "thumbnail.webp").read_bytes()[8:12] == b"WEBP"
    told = (tmp_path / "events.txt").read_text()
    assert told.count("event: step") == 8
    assert "event: completed" in told
    assert len(json.loads((tmp_path / "images.json").read_text())["data"]) == 2
    assert not os.path.exists(f"/proc/{server.pid}") if server is not None else False
