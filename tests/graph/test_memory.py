"""A served clip's memory does not grow with its length: all processes, object store and spilled objects together."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cosmos3_core.request import GenerationRequest
from deployments.http_client import save_video
from tests.graph.serving import DEADLINE_S, Serving, serving

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1800)]

# What is freed goes back to the system at once: glibc would keep it, more or less by chance, tens of megabytes of it.
EXACT = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072", "MALLOC_ARENA_MAX": "2"}
LONG, SHORT = 189, 9


class Memory:
    """What an app holds, by the kernel's count.

    Args:
        served: the app, up.
    """

    def __init__(self, served: Serving) -> None:
        processes = served.leftovers()
        # Replicas, ranks and the object store; not Ray's own logs and metrics, which have nothing to do with clips.
        self.stages = {pid: name for pid, name in processes.items() if re.match(r"ray::(ServeReplica|\w+Rank)", name)}
        (self.raylet,) = (pid for pid, name in processes.items() if "/raylet --raylet" in name)
        session = re.search(r"--session_dir=(\S+)", processes[self.raylet])
        assert session is not None
        self.session = Path(session[1])

    def num_bytes(self) -> int:
        """RssAnon of every stage, the object store's pages, and what was spilled to disk."""
        spilled = sum(path.stat().st_size for path in self.session.glob("ray_spilled_objects*/*"))
        return sum(_status(pid, "RssAnon") for pid in self.stages) + _status(self.raylet, "RssShmem") + spilled


def _status(pid: int, kind: str) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(kind))


@contextmanager
def peak_of(num_bytes: Callable[[], int]) -> Iterator[list[int]]:
    """The largest of what was seen while the block ran, looked at all the time, in a list of one."""
    peak, stop = [0], threading.Event()

    def look() -> None:
        while not stop.wait(0.01):
            peak[0] = max(peak[0], num_bytes())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield peak
    finally:
        stop.set()
        looking.join()


@pytest.mark.slow  # 189 frames several times, on the slow side
def test_memory_does_not_grow_with_the_clip(tiny_nano: Path, tmp_path: Path) -> None:
    request = {"prompt": "A red car.", "height": 192, "width": 320, "num_inference_steps": 1}
    with serving(tmp_path, "--checkpoint", str(tiny_nano), variables=EXACT) as served:
        url = served.url()
        memory = Memory(served)
        assert len(memory.stages) >= 8, memory.stages

        def peak(num_frames: int) -> int:
            asked = GenerationRequest(num_frames=num_frames, **request)  # type: ignore[arg-type]
            with peak_of(memory.num_bytes) as found:
                save_video(url, asked, tmp_path / "clip", timeout_s=DEADLINE_S)
            return found[0]

        peak(LONG)  # what is loaded and bought once
        peaks = [(peak(SHORT), peak(LONG)) for _ in range(2)]
    print(f"peaks of {SHORT} and {LONG} frames in MB:", [(short // 10**6, long // 10**6) for short, long in peaks])
    assert min(long - short for short, long in peaks) < 10e6, peaks
