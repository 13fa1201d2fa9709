"""A process that watches the memory of others: prints the peak of each round, which ends with a line of input.

    python watch_memory.py PID PID ...

Started in the environment that leads to the app's Ray, whose object store it asks. Of processes it is the kernel that
watches: each one's own peak counts, whether they come together or not.
"""

from __future__ import annotations

import select
import sys
from pathlib import Path


def begin_peak(pid: int) -> None:
    """Reset the kernel's peak."""
    Path(f"/proc/{pid}/clear_refs").write_text("5")


def peak_anonymous_bytes(pid: int) -> int:
    """Return a process's peak of anonymous memory since then."""
    kilobytes = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("VmHWM", "RssFile", "RssShmem"):
            kilobytes[name] = int(value.split()[0])
    return (kilobytes["VmHWM"] - kilobytes["RssFile"] - kilobytes["RssShmem"]) * 1024


def object_store_bytes() -> int:
    """Return bytes reserved in memory now, plus all bytes ever spilled to disk."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    stats = get_memory_info_reply(get_state_from_address(ray.get_runtime_context().gcs_address)).store_stats
    return int(stats.object_store_bytes_used + stats.spilled_bytes_total)


def main() -> None:
    """Watch round after round."""
    import ray

    pids = [int(pid) for pid in sys.argv[1:]]
    ray.init("auto", log_to_driver=False)
    while True:
        for pid in pids:
            begin_peak(pid)
        peak = object_store_bytes()
        print("watching", flush=True)
        while not select.select([sys.stdin], [], [], 0.01)[0]:
            peak = max(peak, object_store_bytes())
        if not sys.stdin.readline():
            return
        print(peak + sum(map(peak_anonymous_bytes, pids)), flush=True)


if __name__ == "__main__":
    main()
