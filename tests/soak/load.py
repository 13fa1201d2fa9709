"""A loaded app for long tries: clients that submit jobs and follow them, and the app's processes."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx2

from tests.graph.serving import Serving, serving

CLIP: dict[str, Any] = {"prompt": "A car.", "num_frames": 9, "height": 64, "width": 96, "num_inference_steps": 4}
LIMIT_S = 300.0
_NUM_CLIENTS = 3
_POLL_S = 0.05


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
                if job_id := _call(http, "POST", "/v1/videos", json=CLIP).get("id"):
                    self.ended[job_id] = submitted_s, *_follow(http, job_id)
                time.sleep(_POLL_S)

    def wait_for_file(self, since_s: float) -> float:
        """Wait for the first completed job that was submitted later; return the seconds until then."""
        while time.monotonic() - since_s < LIMIT_S:
            for submitted_s, completed_s, state in list(self.ended.values()):
                if submitted_s > since_s and state == "completed":
                    return completed_s - since_s
            time.sleep(_POLL_S)
        return float("inf")

    @property
    def num_lost(self) -> int:
        """Number of accepted jobs that did not complete."""
        return sum(state != "completed" for _, _, state in self.ended.values())


def _follow(http: httpx2.Client, job_id: str) -> tuple[float, str]:
    """Wait for a job's end; return when that was, and its state, or the last one that was seen in the time allowed."""
    deadline_s, state = time.monotonic() + LIMIT_S, ""
    while state not in ("completed", "failed", "cancelled") and time.monotonic() < deadline_s:
        state = _call(http, "GET", f"/v1/videos/{job_id}").get("status", state)
        time.sleep(_POLL_S)
    return time.monotonic(), state


def _call(http: httpx2.Client, method: str, path: str, **content: Any) -> dict[str, Any]:
    """Return a successful answer; empty if there is none."""
    try:
        answer = http.request(method, path, **content)
    except httpx2.HTTPError:
        return {}
    found: dict[str, Any] = answer.json() if answer.is_success else {}
    return found


def find_pids(app: Serving, pattern: str) -> list[int]:
    """Find the app's processes of a kind."""
    return sorted(pid for pid, command in app.leftovers().items() if re.search(pattern, command))


def start(directory: Path, checkpoint: str, settings: Mapping[str, object] = MappingProxyType({}), **more: Any) -> Any:
    """Start the app with a database and media in a directory, and with settings; returns a context manager."""
    directory = directory.resolve()
    own = {"media.directory": directory / "media", "jobs.database": f"sqlite:///{directory}/jobs.sqlite3"}
    flags = [part for key, value in {**own, **settings}.items() for part in ("--set", f"{key}={value}")]
    return serving(directory, "--checkpoint", str(Path(checkpoint).resolve()), "--num-cpus", "4", *flags, **more)


@contextmanager
def keep_busy(url: str) -> Iterator[Load]:
    """Keep clients submitting jobs for the block, which begins once the first is completed."""
    load = Load(url)
    with ExitStack() as stack:
        for _ in range(_NUM_CLIENTS):
            thread = threading.Thread(target=load.run)
            thread.start()
            stack.callback(thread.join)
        stack.callback(load.is_over.set)
        load.wait_for_file(time.monotonic())
        yield load
