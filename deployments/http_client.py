"""A running app over HTTP, with the standard library alone. Every call has a deadline; every failure is typed."""

from __future__ import annotations

import dataclasses
import http.client
import json
import socket
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cosmos3_core.errors import Cosmos3Error, MediaError, RequestError
from cosmos3_core.media.output import OutputFile
from cosmos3_core.request import GenerationRequest

_SUFFIXES = {"video/mp4": ".mp4", "image/png": ".png"}
_PART_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 16
_DEFAULTS = GenerationRequest(prompt="")


class UnreachableError(Cosmos3Error):
    """No answer, or none in time, or one that broke off."""


class AnswerError(Cosmos3Error):
    """The server said no.

    Args:
        status: of the answer.
        message: the server's own words.
    """

    def __init__(self, status: int, message: str) -> None:
        self.status, self.message = status, message
        super().__init__(status, message)

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class SavedMedia:
    """A file that a server made, and what it said about it.

    Attributes:
        path: where it was saved.
        num_bytes: of the file.
        seed: that it was made with.
        negative_origin: where the negative prompt came from.
        notes: what was changed on the way.
        stage_seconds: stage -> seconds, in the order of the path.
    """

    path: Path
    num_bytes: int
    seed: int
    negative_origin: str
    notes: tuple[str, ...]
    stage_seconds: dict[str, float]


def get(url: str, path: str, *, timeout_s: float) -> tuple[int, str]:
    """A small answer of the app: its status and text.

    Raises:
        RequestError: not a URL.
        UnreachableError: see the class.
    """
    with _Call(url, timeout_s) as call:
        call.send("GET", path)
        return call.status, call.text()


def save_video(url: str, request: GenerationRequest, out: Path, *, timeout_s: float) -> SavedMedia:
    """Have a request served and save its file.

    Args:
        url: of the app.
        request: what is asked for.
        out: path without its ending; the answer's content type decides on ``.mp4`` or ``.png``.
        timeout_s: for all of it.

    Raises:
        RequestError: not a URL, or no place for the file.
        AnswerError: the server refused or failed.
        UnreachableError, MediaError: the answer did not come whole, or could not be written.
    """
    if not out.name:
        raise RequestError("out", str(out), "a path that ends in a name, without its ending")
    OutputFile(out.with_name(out.name + ".mp4"))  # a place that does not exist is refused before the work, not after it
    with _Call(url, timeout_s) as call:
        call.send("POST", "/v1/videos/sync", body_of(request))
        headers = call.headers
        if call.status != 200:
            raise AnswerError(call.status, _refusal(call))
        suffix = _SUFFIXES.get(headers.get_content_type())
        if suffix is None or "x-stage-durations" not in headers:
            raise AnswerError(call.status, f"{url} answers, but not as this API does; is it a cosmos3 app?")
        path = out.with_name(out.name + suffix)
        return SavedMedia(
            path=path,
            num_bytes=_save(call, path),
            seed=int(headers["x-seed"]),
            negative_origin=headers["x-negative-prompt"],
            notes=tuple(json.loads(headers["x-notes"])),
            stage_seconds=json.loads(headers["x-stage-durations"]),
        )


def body_of(request: GenerationRequest) -> dict[str, Any]:
    """The request as a JSON body: the fields that differ from the defaults.

    Raises:
        RequestError: a field that does not travel over HTTP.
    """
    names = [field.name for field in dataclasses.fields(request)]
    body = {name: getattr(request, name) for name in names if getattr(request, name) != getattr(_DEFAULTS, name)}
    for name in ("append_metadata", "noise"):
        if name in body:
            raise RequestError(name, body[name], "the default over HTTP", "Generate in process instead.")
    return body


class _Call:
    """One request and its answer, by a deadline. A context manager.

    Args:
        url: of the app; its path goes before every call's.
        timeout_s: for all of it.
    """

    def __init__(self, url: str, timeout_s: float) -> None:
        self._url, self._timeout_s = url, timeout_s
        self._deadline_s = time.monotonic() + timeout_s
        self._connection, self._prefix = _connection(url, timeout_s)
        self._socket: socket.socket | None = None
        self._answer: http.client.HTTPResponse

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> None:
        """Send the request and wait until the answer begins."""
        headers = {} if body is None else {"content-type": "application/json"}
        with self._typed_errors():
            self._connection.connect()
            # The connection forgets its socket when the answer is the last one on it.
            self._socket = self._connection.sock
            self._connection.request(method, self._prefix + path, None if body is None else json.dumps(body), headers)
            self._wait_no_longer_than_allowed()
            self._answer = self._connection.getresponse()

    @property
    def status(self) -> int:
        return self._answer.status

    @property
    def reason(self) -> str:
        return self._answer.reason

    @property
    def headers(self) -> http.client.HTTPMessage:
        return self._answer.headers

    def text(self) -> str:
        """The answer's body, cut off where it is longer than any message."""
        text = b""
        for part in self.parts():
            text += part
            if len(text) >= _MAX_TEXT_BYTES:
                break
        return text[:_MAX_TEXT_BYTES].decode("utf-8", "replace")

    def parts(self) -> Iterator[bytes]:
        """The answer's body as it comes."""
        announced, num_bytes = self.headers["content-length"], 0
        while True:
            with self._typed_errors():
                self._wait_no_longer_than_allowed()
                part = self._answer.read1(_PART_BYTES)
            if not part:
                break
            num_bytes += len(part)
            yield part
        if announced is not None and num_bytes != int(announced):
            raise UnreachableError(f"{self._url}: the answer broke off after {num_bytes} of {announced} bytes")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._connection.close()

    def _wait_no_longer_than_allowed(self) -> None:
        left_s = self._deadline_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        if self._socket is not None:
            self._socket.settimeout(left_s)

    @contextmanager
    def _typed_errors(self) -> Iterator[None]:
        try:
            yield
        except TimeoutError:
            raise UnreachableError(f"{self._url}: no complete answer within {self._timeout_s:g} s") from None
        except ConnectionRefusedError:
            raise UnreachableError(f"{self._url}: nothing listens there; `cosmos3 serve` starts an app") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # a host's name may be no name at all
            raise UnreachableError(f"{self._url}: {type(error).__name__}: {error}") from None


def _connection(url: str, timeout_s: float) -> tuple[http.client.HTTPConnection, str]:
    kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
    try:
        parts = urllib.parse.urlsplit(url)
        if not parts.hostname:
            raise ValueError("no host")
        connection = kinds[parts.scheme](parts.hostname, parts.port, timeout=timeout_s)
    except (KeyError, ValueError, http.client.InvalidURL):
        raise RequestError("url", url, "an address such as http://127.0.0.1:8000") from None
    return connection, parts.path.rstrip("/")


def _refusal(call: _Call) -> str:
    """Why the server said no: our error body's message, or another server's status and first line."""
    text = call.text()
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, TypeError, KeyError):
        return f"HTTP {call.status} {call.reason}: {text.partition(chr(10))[0]}"


def _save(call: _Call, path: Path) -> int:
    """Write the answer's body to a file; it appears when it is whole. Returns its size."""
    file = OutputFile(path)
    try:
        with file.path.open("wb") as stream:
            num_bytes = sum(stream.write(part) for part in call.parts())
        file.commit()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error}") from error
    finally:
        file.discard()
    return num_bytes
