"""``cosmos3 logs``: what all processes of an app on this machine have logged, in the order of time."""

from __future__ import annotations

import argparse
import heapq
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from cosmos3_core.errors import RequestError

# Serve's replicas and proxies; ranks; each also in files that were rotated.
_FILES = ("serve/*.log*", "worker-*.err*")
_PLAIN = re.compile(r"(?:[A-Z]+ )?(?P<at>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) ")


class LogLine(NamedTuple):
    """A line with the time when it was written, or the one that it continues."""

    at: str
    text: str


def add_logs_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``cosmos3 logs``."""
    parser.add_argument("id", nargs="?", metavar="ID", help="of one request or job; default all lines")
    default = Path(tempfile.gettempdir()) / "ray" / "session_latest"
    help_text = "of Ray's session, whose logs `serve` names; default %(default)s, the latest"
    parser.add_argument("--session", type=Path, default=default, metavar="DIR", help=help_text)


def run(options: argparse.Namespace) -> int:
    """Print the lines; return the exit status, 1 if there is none. Raise RequestError if there are no logs."""
    directory = options.session / "logs"
    if not directory.is_dir():
        allowed = "the directory of a session of Ray, with logs/ in it"
        raise RequestError("session", str(options.session), allowed, "Has an app run on this machine?")
    num_lines = 0
    for line in merge_logs(directory, options.id or ""):
        print(line.text)
        num_lines += 1
    return 0 if num_lines else 1


def merge_logs(directory: Path, part: str = "") -> Iterator[LogLine]:
    """Yield the lines of all processes that contain ``part``, by time. Holds one line of each file at a time."""
    paths = sorted({path for pattern in _FILES for path in directory.glob(pattern)})
    return heapq.merge(*(_read_lines(path, part) for path in paths), key=lambda line: line.at)


def _read_lines(path: Path, part: str) -> Iterator[LogLine]:
    """Yield the lines of one file that contain ``part``; those of a traceback if their first one does."""
    at, is_wanted = "", False
    with path.open(encoding="utf-8", errors="replace") as file:
        for text in file:
            shown = text.rstrip("\n")
            try:
                record = json.loads(text) if text.startswith("{") else None
            except ValueError:
                record = None
            if isinstance(record, dict) and "asctime" in record:
                at, shown = str(record["asctime"]), _format(record)
                is_wanted = part in text
            elif found := _PLAIN.match(text):
                at, is_wanted = found["at"], part in text
            else:
                is_wanted = is_wanted or (not part and bool(at))
            if is_wanted:
                yield LogLine(at, shown)


def _format(record: dict[str, object]) -> str:
    rank = f"{record['gang']} {record.get('rank', '')}".strip() if "gang" in record else ""
    process = rank or str(record.get("deployment", "")).rpartition("_")[2] or record.get("component_name", "")
    error = f"\n{record['exc_text']}" if record.get("exc_text") else ""
    request = f" {record['request_id']}" if record.get("request_id") else ""
    return (
        f"{record['asctime']} {record.get('levelname', '')} {process}[{record.get('process', '')}]{request} "
        f"{record.get('message', '')}{error}"
    )
