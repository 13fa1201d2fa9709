"""Kill each kind of process of a loaded app: ``python -m tests.soak.kill_table CHECKPOINT DIRECTORY [KIND ...]``.

Prints, for each kind, the seconds until the next file of a job that was submitted after the kill, and how many accepted
jobs were lost. GCS, raylet and agent end the app: for them, the seconds until its exit, what it said, and how many jobs
the next start completed.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.graph.serving import Serving, serving

# Kind -> pattern of its processes' command lines.
SERVED = {
    "proxy": r"ray::ProxyActor",
    "Ingress": r"ray::ServeReplica:\w+:Ingress",
    "Director": r"ray::ServeReplica:\w+:Director",
    "tokenizer": r"ray::ServeReplica:\w+:PromptTokenizer",
    "transformer leader": r"ray::ServeReplica:\w+:Transformer",
    "transformer rank": r"ray::TransformerRank",
    "VAE leader": r"ray::ServeReplica:\w+:VideoVAE",
    "VAE rank": r"ray::VideoVAERank",
    "encoder": r"ray::ServeReplica:\w+:Mp4Encoder",
    "clip streams": r"ray::ClipStreams",
    "Serve's controller": r"ray::ServeController",
}
RAYS = {"GCS": r"/gcs_server ", "raylet": r"/raylet/raylet ", "agent": r"^ray::DashboardAgent"}
_CLIP: dict[str, Any] = {"prompt": "A car.", "num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 4}
_NUM_CLIENTS, _NUM_WAITING = 3, 10
_LIMIT_S = 300.0


@dataclass
class Load:
    """Clients that submit jobs one after the other, and how each job ended: id -> (submitted, completed, state)."""

    url: str
    ended: dict[str, tuple[float, float, str]] = field(default_factory=dict)
    is_over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Submit jobs and follow each to its end, whatever happens to the app."""
        with httpx2.Client(base_url=self.url, timeout=10) as http:
            while not self.is_over.is_set():
                submitted_s = time.monotonic()
                job_id = self._call(http, "POST", "/v1/videos", json=_CLIP).get("id")
                while job_id and not self.is_over.is_set():
                    state = self._call(http, "GET", f"/v1/videos/{job_id}").get("status", "")
                    if state in ("completed", "failed", "cancelled"):
                        self.ended[job_id] = submitted_s, time.monotonic(), state
                        break
                    time.sleep(0.05)

    def _call(self, http: httpx2.Client, method: str, path: str, **content: Any) -> dict[str, Any]:
        while not self.is_over.is_set():
            try:
                answer = http.request(method, path, **content)
                if answer.is_success:
                    found: dict[str, Any] = answer.json()
                    return found
            except httpx2.HTTPError:
                pass
            time.sleep(0.05)
        return {}

    def wait_for_file(self, since_s: float) -> float:
        """Wait for the first completed job that was submitted later; return the seconds until then."""
        while time.monotonic() - since_s < _LIMIT_S:
            for submitted_s, completed_s, state in list(self.ended.values()):
                if submitted_s > since_s and state == "completed":
                    return completed_s - since_s
            time.sleep(0.05)
        return float("inf")

    @property
    def num_lost(self) -> int:
        """Number of accepted jobs that did not complete."""
        return sum(state != "completed" for _, _, state in self.ended.values())


def find_pids(app: Serving, pattern: str) -> list[int]:
    """Find the app's processes of a kind."""
    return sorted(pid for pid, command in app.leftovers().items() if re.search(pattern, command))


def start(directory: Path, checkpoint: str) -> Any:
    """Start the app; returns a context manager."""
    settings = {"media.directory": directory / "media", "jobs.database": f"sqlite:///{directory}/jobs.sqlite3"}
    flags = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return serving(directory, "--checkpoint", checkpoint, "--num-cpus", "4", *flags)


def kill_served(directory: Path, checkpoint: str, kinds: list[str]) -> None:
    """Kill one process of each kind of one app, under load."""
    with start(directory, checkpoint) as app, ExitStack() as stack:
        load = Load(app.url())
        threads = [threading.Thread(target=load.run) for _ in range(_NUM_CLIENTS)]
        for thread in threads:
            thread.start()
            stack.callback(thread.join)
        stack.callback(load.is_over.set)
        load.wait_for_file(time.monotonic())
        for kind in kinds:
            num_before, lost_before = len(load.ended), load.num_lost
            killed_s = time.monotonic()
            os.kill(find_pids(app, SERVED[kind])[0], signal.SIGKILL)
            seconds = load.wait_for_file(killed_s)
            time.sleep(2.0)
            jobs = f"{load.num_lost - lost_before} of {len(load.ended) - num_before} jobs lost"
            print(f"{kind:<20} next file after {seconds:5.1f} s, {jobs}", flush=True)


def kill_ray(directory: Path, checkpoint: str, kind: str) -> None:
    """Kill a daemon of Ray while jobs wait, and start the app again."""
    with start(directory, checkpoint) as app, httpx2.Client(base_url=app.url(), timeout=30) as http:
        ids = [http.post("/v1/videos", json=_CLIP).json()["id"] for _ in range(_NUM_WAITING)]
        said_before = app.said()
        killed_s = time.monotonic()
        os.kill(find_pids(app, RAYS[kind])[0], signal.SIGKILL)
        app.process.wait(_LIMIT_S)
        seconds = time.monotonic() - killed_s
        said = app.said().removeprefix(said_before).strip()
    with start(directory, checkpoint) as app, httpx2.Client(base_url=app.url(), timeout=30) as http:
        deadline_s = time.monotonic() + _LIMIT_S
        states = [""]
        while time.monotonic() < deadline_s and not all(it in ("completed", "failed") for it in states):
            states = [http.get(f"/v1/videos/{job_id}").json()["status"] for job_id in ids]
            time.sleep(0.2)
    done = f"{states.count('completed')} of {len(ids)} jobs completed by the next start"
    print(f"{kind:<20} exit after {seconds:5.1f} s, {done}, said: {said!r}", flush=True)


def main() -> None:
    """Print the table."""
    checkpoint, directory, *kinds = sys.argv[1:]
    Path(directory).mkdir(parents=True, exist_ok=True)
    chosen = kinds or [*SERVED, *RAYS]
    if served := [kind for kind in chosen if kind in SERVED]:
        kill_served(Path(directory), checkpoint, served)
    for kind in chosen:
        if kind in RAYS:
            kill_ray(Path(directory), checkpoint, kind)


if __name__ == "__main__":
    main()
