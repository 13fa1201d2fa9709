"""Run 1,000 seeded schedules of faults: ``python -m tests.soak.fault_schedules CHECKPOINT DIRECTORY [SCHEDULES]``.

Prints how many calls of each boundary failed. A schedule whose jobs do not all end as they must ends it with an error.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.jobs.store import JobStore
from tests.jobs.fault_schedules import BOUNDARIES, NUM_JOBS, run_schedule


def main() -> None:
    """Print the table."""
    checkpoint, directory, *number = sys.argv[1:]
    num_schedules = int(number[0]) if number else 1_000
    empty = Path(directory) / "empty.sqlite3"
    empty.parent.mkdir(parents=True, exist_ok=True)
    JobStore.open(f"sqlite:///{empty}").close()
    run = partial(run_schedule, layout=CheckpointLayout.open(checkpoint), empty_sqlite=empty)
    begun_s = time.monotonic()
    with ProcessPoolExecutor(os.cpu_count(), initializer=logging.disable, initargs=(logging.CRITICAL,)) as pool:
        num_faults = sum(pool.map(run, range(num_schedules), chunksize=5), Counter())
    seconds = time.monotonic() - begun_s
    print(f"{num_schedules} schedules of {NUM_JOBS} jobs in {seconds:.0f} s: every job completed, once, in order")
    for boundary in BOUNDARIES:
        print(f"{boundary:<12} {num_faults[boundary]:7d} calls failed")


if __name__ == "__main__":
    main()
