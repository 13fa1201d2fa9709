"""The count of processes that tests start, and the budget of `make test`."""

from __future__ import annotations

import asyncio
import multiprocessing
import subprocess
import sys
from collections import Counter
from pathlib import Path

from tests.process_budget import APPS, BUDGET, MARKS, PROCESSES, SESSIONS, count, overspent, started

MAKEFILE = Path(__file__).parents[2] / "Makefile"


def test_every_way_to_start_python_is_counted() -> None:
    before = started[PROCESSES]
    subprocess.run([sys.executable, "-c", ""], check=True, timeout=100)
    assert started[PROCESSES] == before + 1

    async def start() -> None:
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", "")
        await process.wait()

    asyncio.run(start())
    assert started[PROCESSES] == before + 2
    spawned = multiprocessing.get_context("spawn").Process(target=len, args=("",))
    spawned.start()
    spawned.join(100)
    assert started[PROCESSES] >= before + 3, "multiprocessing may start its tracker of resources as well"


def test_other_commands_are_not_counted() -> None:
    before = Counter(started)
    subprocess.run(["/bin/true"], check=True, timeout=100)
    assert started == before


def test_a_ray_session_is_counted_by_its_head() -> None:
    before = Counter(started)
    count([b"/somewhere/ray/core/src/ray/gcs/gcs_server", "--log_dir=x"])
    assert started - before == Counter({SESSIONS: 1})
    started.subtract({SESSIONS: 1})


def test_exceeding_the_budget_is_named() -> None:
    assert overspent(Counter(BUDGET)) == []
    assert overspent(Counter({**BUDGET, APPS: BUDGET[APPS] + 1})) == [
        f"Ray apps: {BUDGET[APPS] + 1}, at most {BUDGET[APPS]}"
    ]


def test_the_budget_applies_to_make_test() -> None:
    assert f'-m "{MARKS}"\n' in MAKEFILE.read_text()
