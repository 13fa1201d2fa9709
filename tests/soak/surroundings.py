"""Take away for a while what an app needs: ``python -m tests.soak.surroundings CHECKPOINT DIRECTORY [FAULT ...]``.

Prints, for each fault, the seconds until /ready says so, the seconds from its end until /ready is 200 again, and how
many accepted jobs were lost or had a second attempt. Needs root, for file systems of its own. The clock is shifted in
Python's ``time.time``, in the app's processes.
"""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path

import httpx2

from tests.graph.serving import REPOSITORY
from tests.soak.load import LIMIT_S, Load, keep_busy, start

# Python imports it by its name, sitecustomize, when it starts.
_CLOCK = """
import os, time

read, path = time.time, os.environ["COSMOS3_CLOCK"]

def read_shifted():
    try:
        with open(path) as file:
            return read() + float(file.read())
    except (OSError, ValueError):
        return read()

time.time = read_shifted
"""
_MEDIA_SIZE = "64m"


@contextmanager
def fill_disk(directory: Path) -> Iterator[None]:
    """Fill the file system of the media."""
    filler = directory / "media" / "filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def make_read_only(directory: Path) -> Iterator[None]:
    """Make the file system of the media read-only, as soon as no file is being written."""
    while subprocess.run(["mount", "-o", "remount,ro", directory / "media"], capture_output=True).returncode:
        time.sleep(0.01)
    try:
        yield
    finally:
        subprocess.run(["mount", "-o", "remount,rw", directory / "media"], check=True)


@contextmanager
def lock_database(directory: Path) -> Iterator[None]:
    """Hold SQLite's lock."""
    with closing(sqlite3.connect(directory / "jobs.sqlite3", timeout=60, isolation_level=None)) as database:
        database.execute("BEGIN EXCLUSIVE")
        try:
            yield
        finally:
            database.execute("ROLLBACK")


@contextmanager
def hide_archive(directory: Path) -> Iterator[None]:
    """Hide the archive behind a directory without files, to which nothing can be written."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", directory / "archive"], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", directory / "archive"], check=True)


@contextmanager
def shift_clock(directory: Path, shift: str) -> Iterator[None]:
    """Set the clock of the app's processes by so many seconds."""
    (directory / "clock").write_text(shift)
    try:
        yield
    finally:
        (directory / "clock").write_text("0")


# Seconds that each lasts.
FAULTS = {
    "full disk": (fill_disk, 60),
    "read-only disk": (make_read_only, 60),
    "locked database": (lock_database, 120),
    "archive away": (hide_archive, 60),
}
CLOCKS = {
    "clock back": (partial(shift_clock, shift="-3600"), 60),
    "clock forth": (partial(shift_clock, shift="3600"), 60),
}


def wait_for_ready(url: str, status: int, seconds: float) -> float:
    """Wait until /ready answers with a status; return the seconds until then, inf if that does not happen in time."""
    begun_s = time.monotonic()
    with httpx2.Client(timeout=15) as http:
        while (passed_s := time.monotonic() - begun_s) < seconds:
            try:
                if http.get(f"{url}/ready").status_code == status:
                    return passed_s
            except httpx2.HTTPError:
                pass
            time.sleep(0.1)
    return float("inf")


def try_fault(directory: Path, url: str, load: Load, kind: str) -> None:
    """Let a fault last under load; print what became of it."""
    make, seconds = (FAULTS | CLOCKS)[kind]
    num_before, lost_before = len(load.ended), load.num_lost
    with make(directory):
        begun_s = time.monotonic()
        noticed_s = wait_for_ready(url, 503, seconds)
        time.sleep(max(0.0, begun_s + seconds - time.monotonic()))
    ready_s = wait_for_ready(url, 200, LIMIT_S)
    file_s = load.wait_for_file(time.monotonic())
    jobs = f"{load.num_lost - lost_before} of {len(load.ended) - num_before} jobs lost"
    print(
        f"{kind:<16} {seconds:>4} s: /ready 503 after {noticed_s:.1f} s, 200 again {ready_s:.1f} s after its end, "
        f"next file {file_s:.1f} s later; {jobs}",
        flush=True,
    )


def try_faults(directory: Path, checkpoint: str, kinds: list[str], variables: dict[str, str]) -> None:
    """Try faults on one app under load; print the states and attempts of all its jobs at the end."""
    settings = {"media.archive": f"file://{directory}/archive", "jobs.lease_s": 10}
    with ExitStack() as stack:
        for name in ("media", "archive"):
            (directory / name).mkdir(exist_ok=True)
            subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_MEDIA_SIZE}", "tmpfs", directory / name], check=True)
            stack.callback(subprocess.run, ["umount", "--lazy", directory / name], check=True)
        app = stack.enter_context(start(directory, checkpoint, settings, variables=variables))
        url = app.url()
        with keep_busy(url) as load:
            for kind in kinds:
                try_fault(directory, url, load, kind)
        states = [state for _, _, state in load.ended.values()]
        counted = ", ".join(f"{states.count(state)} {state or 'unknown'}" for state in sorted(set(states)))
        with closing(sqlite3.connect(directory / "jobs.sqlite3")) as database:
            again = database.execute("SELECT count(*) FROM jobs WHERE attempts > 1").fetchone()[0]
        print(f"all jobs: {counted}; {again} with more than one attempt", flush=True)


def main() -> None:
    """Print the table."""
    checkpoint, directory, *kinds = sys.argv[1:]
    chosen = kinds or [*FAULTS, *CLOCKS]
    if unknown := set(chosen) - {*FAULTS, *CLOCKS}:
        sys.exit(f"kinds must be among {', '.join([*FAULTS, *CLOCKS])} (got {', '.join(unknown)})")
    for name, group in (("faults", FAULTS), ("clocks", CLOCKS)):
        place = Path(directory) / name
        place.mkdir(parents=True, exist_ok=True)
        variables = {}
        if group is CLOCKS:
            (place / "clock").write_text("0")
            (place / "sitecustomize.py").write_text(_CLOCK)
            variables = {"COSMOS3_CLOCK": str(place / "clock"), "PYTHONPATH": f"{place}{os.pathsep}{REPOSITORY}"}
        if picked := [kind for kind in chosen if kind in group]:
            try_faults(place, checkpoint, picked, variables)


if __name__ == "__main__":
    main()
