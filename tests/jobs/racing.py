"""A process that races others for a database: ``python -m tests.jobs.racing ACTION URL NUMBER``.

It prints "ready", starts at the first line of input, and prints its result as JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cluster.errors import OverloadedError
from deployments.jobs.job import JobState
from deployments.jobs.store import JobStore
from tests.jobs.making import COMPLETED, LIMITS, claim, count_queued, limits_with, make_lease, new_job

_ROOT = Path(__file__).parents[2]
# For the whole race on a busy machine.
_RACE_S = 100


def race(action: str, url: str, number: int, num_processes: int) -> list[Any]:
    """Start processes at the same moment; return the result of each."""
    command = [sys.executable, "-m", "tests.jobs.racing", action, url, str(number)]
    running = [
        subprocess.Popen(command, cwd=_ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(num_processes)
    ]
    try:
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        for process in running:
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        outputs = [process.communicate(timeout=_RACE_S)[0] for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    return [json.loads(text) for text in outputs]


def _open(url: str, _: int) -> str:
    JobStore.open(url).close()
    return "opened"


def _claim(url: str, number: int) -> list[str]:
    """Claim and end jobs until all jobs have ended."""
    store, mine = JobStore.open(url), []
    deadline_s = time.monotonic() + _RACE_S
    while time.monotonic() < deadline_s:
        if (job := claim(store, f"runner-{time.monotonic_ns()}", lease_s=1000.0)) is not None:
            store.finish(make_lease(job), COMPLETED, keep_media_s=1)
            mine.append(job.job_id)
        elif not count_queued(store):
            return mine
    raise TimeoutError(f"{len(mine)} of {number} were mine, and some still wait")


def _create(url: str, number: int) -> dict[str, int]:
    """Create twice as many jobs as the queue's bound, ``number``."""
    store, limits = JobStore.open(url), limits_with(max_queued=number)
    counts = {"accepted": 0, "refused": 0, "most": 0}
    for _ in range(2 * number):
        try:
            store.create(new_job(), limits)
            counts["accepted"] += 1
        except OverloadedError:
            counts["refused"] += 1
        counts["most"] = max(counts["most"], count_queued(store))
    return counts


def _repeat(url: str, number: int) -> list[str]:
    """Create a job with one idempotency key several times."""
    store = JobStore.open(url)
    return [store.create(new_job(idempotency_key="again"), LIMITS).job_id for _ in range(number)]


def _die(url: str, _: int) -> None:
    """Accept a job, print its id, and die of SIGKILL at once."""
    import os
    import signal

    job = JobStore.open(url).create(new_job(), LIMITS)
    assert job.state is JobState.QUEUED
    print(json.dumps(job.job_id), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def main() -> None:
    """Run one action."""
    action, url, number = sys.argv[1:]
    actions = {"open": _open, "claim": _claim, "create": _create, "repeat": _repeat, "die": _die}
    print("ready", flush=True)
    sys.stdin.readline()
    print(json.dumps(actions[action](url, int(number))), flush=True)


if __name__ == "__main__":
    main()
