"""Checks that an answer is no server error and reveals nothing of the server's internals."""

from __future__ import annotations

import re
import sys
import sysconfig
import tempfile
from dataclasses import dataclass
from pathlib import Path

import httpx2

_REPOSITORY = Path(__file__).parents[2]
# Words of stack traces, the database and its drivers, media readers, and reprs of Python objects.
_WORDS = (
    b"Traceback",
    b'File "',
    b"sqlite",
    b"psycopg",
    b"sqlalchemy",
    b"SELECT ",
    b"site-packages",
    b"starlette",
    b"fastapi",
    b"ray.serve",
)
_OBJECT = re.compile(rb"<[\w.]+ object at 0x[0-9a-f]+>|0x[0-9a-f]{8,16}\b")
_LINE_OF_PASSWD = re.compile(rb"root:[^:\n]*:0:0:")
# Types whose bodies are text; bytes of a picture may contain any word.
_TEXTS = ("text/", "application/json")


class UnsafeAnswer(AssertionError):
    """The answer is a server error, or reveals internals."""


@dataclass(frozen=True)
class ForbiddenWords:
    """Words that no answer may contain.

    Attributes:
        words: the forbidden words.
    """

    words: tuple[bytes, ...]

    @classmethod
    def of(cls, *directories: Path, canary: bytes = b"") -> ForbiddenWords:
        """Collect them for this machine and a service on it.

        Args:
            directories: the service's checkpoint, files and database.
            canary: content of the file that must not be read.
        """
        paths = [*directories, _REPOSITORY, Path.home(), sys.prefix, sys.base_prefix, sysconfig.get_path("stdlib")]
        paths += [tempfile.gettempdir()]
        texts = {str(path).encode() for path in paths if str(path) != "/"}
        return cls((*sorted(texts), *_WORDS, *([canary] if canary else [])))

    def check(self, answer: httpx2.Response, sent: bytes = b"") -> None:
        """Check an answer.

        Args:
            answer: to any request.
            sent: the request; an answer may repeat it.

        Raises:
            UnsafeAnswer: the answer reveals a word, or is a server error.
        """
        what = f"{answer.request.method} {answer.request.url}: {answer.status_code}"
        if not 200 <= answer.status_code < 500:
            raise UnsafeAnswer(f"{what} {answer.text[:2000]}")
        text = b"\n".join(name + b": " + value for name, value in answer.headers.raw)
        if any(byte not in range(0x20, 0x7F) for byte in text.replace(b"\n", b"")):
            raise UnsafeAnswer(f"{what}: a header that is not printable ASCII: {text!r}")
        if answer.headers.get("content-type", "").startswith(_TEXTS):
            text += b"\n" + answer.content
        lowered, repeated = text.lower(), sent.lower()
        for word in self.words:
            if word.lower() in lowered and word.lower() not in repeated:
                raise UnsafeAnswer(f"{what} has {word!r}: {text[:2000]!r}")
        for pattern in (_OBJECT, _LINE_OF_PASSWD):
            if (found := pattern.search(text)) is not None and found[0].lower() not in repeated:
                raise UnsafeAnswer(f"{what} has {found[0]!r}: {text[:2000]!r}")
        if answer.status_code >= 400:
            _check_error(answer, what)


def _check_error(answer: httpx2.Response, what: str) -> None:
    """Check a refusal's body: one shape, and short for any request."""
    if answer.request.method == "HEAD":
        return
    if len(answer.content) > 6000:
        raise UnsafeAnswer(f"{what} has {len(answer.content)} bytes: {answer.content[:300]!r}")
    error = answer.json()["error"]
    if error["type"] != ("server_error" if answer.status_code == 429 else "invalid_request_error"):
        raise UnsafeAnswer(f"{what} is of type {error['type']}")
    if not error["code"] or not error["message"].strip() or not isinstance(error["param"], str | None):
        raise UnsafeAnswer(f"{what} says too little: {error}")
