"""Kill or stop each kind of process of a loaded app: ``python -m tests.soak.kill_table CHECKPOINT DIR [KIND ...]``.

Prints, for each kind or the ones that are named, the seconds until the next file of a job that was submitted after the
kill, and how many accepted jobs were lost; first, for comparison, without a kill. GCS, raylet and agent end the app:
for them, the seconds until its exit, what it said, and how many jobs the next start completed.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import httpx2

from tests.graph.serving import Serving
from tests.soak.load import CLIP, LIMIT_S, find_pids, keep_busy, start

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
STOPPED = ("Ingress", "Director", "tokenizer", "transformer leader", "VAE leader", "encoder")
"""Kinds that are stopped as well, and hang: Serve's checks of their health find it."""
RAYS = {"GCS": r"/gcs_server ", "raylet": r"/raylet/raylet "}
_AGENT, _STOP, _NOTHING = "agent", "stopped ", "nothing"
_NUM_WAITING = 10


def kill_served(directory: Path, checkpoint: str, kinds: list[str]) -> None:
    """Kill one process of each kind of one app, or stop it, under load."""
    with start(directory, checkpoint) as app, keep_busy(app.url()) as load:
        for kind in kinds:
            num_before, lost_before = len(load.ended), load.num_lost
            killed_s = time.monotonic()
            if kind != _NOTHING:
                number = signal.SIGSTOP if kind.startswith(_STOP) else signal.SIGKILL
                os.kill(find_pids(app, SERVED[kind.removeprefix(_STOP)])[0], number)
            seconds = load.wait_for_file(killed_s)
            time.sleep(2.0)
            jobs = f"{load.num_lost - lost_before} of {len(load.ended) - num_before} jobs lost"
            print(f"{kind:<20} next file after {seconds:5.1f} s, {jobs}", flush=True)


def find_daemon(app: Serving, kind: str) -> int:
    """Find a daemon of the app's Ray."""
    if kind != _AGENT:
        return find_pids(app, RAYS[kind])[0]
    raylet = find_daemon(app, "raylet")
    children = Path(f"/proc/{raylet}/task/{raylet}/children").read_text().split()
    # Its title has overwritten its environment.
    return next(int(pid) for pid in children if b"DashboardAgent" in Path(f"/proc/{pid}/cmdline").read_bytes())


def kill_ray(directory: Path, checkpoint: str, kind: str) -> None:
    """Kill a daemon of Ray while jobs wait, and start the app again."""
    with start(directory, checkpoint) as app, httpx2.Client(base_url=app.url(), timeout=30) as http:
        ids = [http.post("/v1/videos", json=CLIP).json()["id"] for _ in range(_NUM_WAITING)]
        said_before = app.said()
        killed_s = time.monotonic()
        os.kill(find_daemon(app, kind), signal.SIGKILL)
        app.process.wait(LIMIT_S)
        seconds = time.monotonic() - killed_s
        said = app.said().removeprefix(said_before).strip()
    with start(directory, checkpoint) as app, httpx2.Client(base_url=app.url(), timeout=30) as http:
        deadline_s = time.monotonic() + LIMIT_S
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
    served, rays = [_NOTHING, *SERVED, *(_STOP + kind for kind in STOPPED)], [*RAYS, _AGENT]
    if unknown := set(kinds) - {*served, *rays}:
        sys.exit(f"kinds must be among {', '.join(served + rays)} (got {', '.join(unknown)})")
    if chosen := [kind for kind in served if kind in kinds or not kinds]:
        kill_served(Path(directory), checkpoint, chosen)
    for kind in rays:
        if kind in kinds or not kinds:
            kill_ray(Path(directory), checkpoint, kind)


if __name__ == "__main__":
    main()
