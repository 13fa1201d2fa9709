"""Golden files: recorded answers as JSON below ``tests/golden``, with ids numbered in order of appearance.

``pytest tests/api/test_golden.py --write-golden`` rewrites them. A changed file is a change that clients see.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import httpx2

DIRECTORY = Path(__file__).parent.parent / "golden"

# Ids of jobs and media have 32 hexadecimal digits; hashes have 64.
_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


class Golden:
    """Compares a value with a file, or writes the file.

    Args:
        name: the file's, without its suffix.
        is_written: whether it is written.
    """

    def __init__(self, name: str, *, is_written: bool) -> None:
        self._path = DIRECTORY / f"{name}.json"
        self._is_written = is_written

    def check(self, found: Any) -> None:
        """Compare plain JSON values with the file, including the order of keys."""
        text = _number_ids(json.dumps(found, indent=1, ensure_ascii=False, allow_nan=False)) + "\n"
        if self._is_written:
            self._path.write_text(text)
        assert text.splitlines() == self._path.read_text().splitlines()


def _number_ids(text: str) -> str:
    numbers: dict[str, str] = {}
    return _ID.sub(lambda match: numbers.setdefault(match[0], f"<id {len(numbers) + 1}>"), text)


def answer_as_json(answer: httpx2.Response) -> dict[str, Any]:
    """Return status, headers and body of an answer; checks Content-Length of JSON too."""
    kind = answer.headers.get("content-type", "").partition(";")[0]
    body: Any = answer.json() if kind == "application/json" and answer.content else answer.text
    if kind == "text/event-stream":
        body = answer.text.split("\n")
    elif kind.startswith("application/zip"):
        body = "(a zip)"
    return {"status": answer.status_code, "headers": dict(sorted(answer.headers.items())), "body": body}
