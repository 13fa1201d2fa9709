"""Memory of each process over many small requests: ``python -m tests.soak.growth CHECKPOINT DIRECTORY [REQUESTS]``.

Prints, for each kind of process, its memory at the begin and the end, and the fitted slope in MiB per 1,000 requests
over the last four fifths. The first fifth, in which caches fill, does not count.
"""

from __future__ import annotations

import re
import statistics
import sys
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2

from tests.graph.serving import Serving
from tests.soak.load import CLIP, start

_SMALL = CLIP | {"num_frames": 1, "height": 32, "width": 32, "num_inference_steps": 1}
_AT_ONCE = 2
_SAMPLE_S = 5.0
_MIB = 1 << 20
_PAGE_BYTES = 4096


def name_process(command: str) -> str:
    """Return the kind of a process by its command line."""
    if match := re.match(r"ray::(?:ServeReplica:\w+:)?([\w:]+)", command):
        return match[1].partition(".")[0].rstrip(":")
    for name in ("gcs_server", "raylet/raylet", "log_monitor", "dashboard/agent", "runtime_env/agent", "deployments"):
        if name in command:
            return name
    return Path(command.split()[0]).name if command.strip() else "ended"


def read_memory(app: Serving) -> dict[str, float]:
    """Read the memory of the app's processes by kind, in MiB. What shared memory holds counts in each."""
    found: dict[str, float] = defaultdict(float)
    for pid, command in app.leftovers().items():
        try:
            found[name_process(command)] += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / _MIB
        except OSError:
            continue  # it has ended
    return found


def main() -> None:
    """Print the table."""
    checkpoint, directory, *number = sys.argv[1:]
    num_requests = int(number[0]) if number else 5_000
    Path(directory).mkdir(parents=True, exist_ok=True)
    samples: dict[str, list[tuple[int, float]]] = defaultdict(list)
    num_done, failures = 0, 0
    counting, is_over = threading.Lock(), threading.Event()

    with start(Path(directory), checkpoint, {"jobs.max_kept": 200}) as app:
        url = app.url()

        def sample() -> None:
            while not is_over.wait(_SAMPLE_S):
                for kind, mib in read_memory(app).items():
                    samples[kind].append((num_done, mib))

        def request(seed: int) -> None:
            nonlocal num_done, failures
            with httpx2.Client(timeout=300) as http:
                answer = http.post(f"{url}/v1/videos/sync", json={**_SMALL, "seed": seed})
            with counting:
                num_done += 1
                failures += answer.status_code != 200

        sampling = threading.Thread(target=sample)
        sampling.start()
        begun_s = time.monotonic()
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            list(pool.map(request, range(num_requests)))
        seconds = time.monotonic() - begun_s
        is_over.set()
        sampling.join()
    print(f"{num_requests} requests in {seconds:.0f} s, {failures} failed")
    for kind, known in sorted(samples.items()):
        settled = [(number / 1000, mib) for number, mib in known if number > num_requests / 5]
        if len({number for number, _ in settled}) < 2:
            continue
        slope, _ = statistics.linear_regression(*zip(*settled, strict=True))
        print(f"{kind:<40} {known[0][1]:7.1f} MiB, then {known[-1][1]:7.1f}; {slope:+7.2f} MiB per 1,000 requests")


if __name__ == "__main__":
    main()
