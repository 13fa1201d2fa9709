"""A running app over HTTP, with the standard library alone. Every call has a deadline; every failure is typed."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import http.client
import io
import json
import socket
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cosmos3_core.actions import GeneratedActions, action_rows, write_actions
from cosmos3_core.errors import Cosmos3Error, MediaError, RequestError
from cosmos3_core.media.image import write_image
from cosmos3_core.media.output import OutputFile
from cosmos3_core.request import GenerationRequest

_SUFFIXES = {
    "video/mp4": ".mp4",
    "audio/wav": ".wav",
    "image/png": ".png",
    "image/jpeg": ".jpg",
    "image/webp": ".webp",
}
_JSON = "application/json"
_PART_BYTES = 1 << 20
_MAX_TEXT_BYTES = 1 << 16
# Of actions with a clip in base64.
_MAX_JSON_BYTES = 1 << 30
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
    """What a server made, and what it said about it.

    Attributes:
        path: where the file was saved; None where there is none, only actions.
        actions_path: where generated actions were saved; None where there are none.
        num_bytes: of the file.
        seed: that it was made with.
        negative_origin: where the negative prompt came from.
        notes: what was changed on the way.
        stage_seconds: stage -> seconds, in the order of the path.
    """

    path: Path | None
    actions_path: Path | None
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
    """Have a request served and save what comes of it.

    Args:
        url: of the app.
        request: what is asked for; its image or clip is read here.
        out: path without its ending: the answer decides on ``.mp4``, ``.png`` ..., ``.actions.json``.
        timeout_s: for all of it.

    Raises:
        RequestError: not a URL, no place for the file, or an image or clip that cannot be read or sent.
        AnswerError: the server refused or failed.
        UnreachableError, MediaError: the answer did not come whole, or could not be written.
    """
    if not out.name:
        raise RequestError("out", str(out), "a path that ends in a name, without its ending")
    OutputFile(out.with_name(out.name + ".mp4"))  # a place that does not exist is refused before the work, not after it
    body = body_of(request)
    with _Call(url, timeout_s) as call:
        call.send("POST", "/v1/videos/sync", body)
        headers = call.headers
        if call.status != 200:
            raise AnswerError(call.status, _refusal(call))
        if "x-stage-durations" not in headers:
            raise _foreign(call, url)
        path, actions_path, num_bytes = None, None, 0
        if headers.get_content_type() == _JSON:
            path, actions_path, num_bytes = _save_json(call, url, out)
        else:
            path = _file_path(call, url, out, headers.get_content_type())
            num_bytes = _save(call.parts(), path)
        return SavedMedia(
            path=path,
            actions_path=actions_path,
            num_bytes=num_bytes,
            seed=int(headers["x-seed"]),
            negative_origin=headers["x-negative-prompt"],
            notes=tuple(json.loads(headers["x-notes"])),
            stage_seconds=json.loads(headers["x-stage-durations"]),
        )


def body_of(request: GenerationRequest) -> dict[str, Any]:
    """The request as a JSON body: the fields that differ from the defaults; an image or clip as a data URL.

    Raises:
        RequestError: a field that does not travel over HTTP, or an image or clip that cannot be read.
    """
    given = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    body: dict[str, Any] = {}
    if given.pop("noise") is not None:
        raise _kept_at_home("noise", "tensors")
    if (actions := given.pop("actions")) is not None:
        body["actions"] = action_rows("actions", actions, None).tolist()
    packed = request.packed()
    if packed.image is not None:
        body["image"] = _data_url(packed.image if isinstance(packed.image, bytes) else _png(packed.image))
    if packed.video is not None:
        if not isinstance(packed.video, bytes):
            raise RequestError("video", "frames", "a file over HTTP", "Write them to one, and give its path or bytes.")
        body["video"] = _data_url(packed.video)
    del given["image"], given["video"]
    for name in ("condition_frame_indexes_vision", "guidance_interval"):
        if isinstance(given[name], Sequence) and not isinstance(given[name], str):
            given[name] = list(given[name])
    body |= {name: value for name, value in given.items() if value != getattr(_DEFAULTS, name)}
    if "append_metadata" in body:
        raise _kept_at_home("append_metadata", body["append_metadata"])
    return body


def _kept_at_home(name: str, value: Any) -> RequestError:
    return RequestError(name, value, "the default over HTTP", "Generate in process instead.")


def _data_url(data: bytes) -> str:
    # What it is is told by its content.
    return "data:application/octet-stream;base64," + base64.b64encode(data).decode()


def _png(frame: Any) -> bytes:
    png = io.BytesIO()
    write_image(png, frame, "png")
    return png.getvalue()


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
            # A server may refuse a large body before it has all of it: what it says is more than that it hung up.
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self._connection.request(
                    method, self._prefix + path, None if body is None else json.dumps(body), headers
                )
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
        return self.content(_MAX_TEXT_BYTES).decode("utf-8", "replace")

    def content(self, max_bytes: int) -> bytes:
        """The answer's body, cut off at a length."""
        content = bytearray()
        for part in self.parts():
            content += part
            if len(content) >= max_bytes:
                break
        return bytes(content[:max_bytes])

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


def _foreign(call: _Call, url: str) -> AnswerError:
    return AnswerError(call.status, f"{url} answers, but not as this API does; is it a cosmos3 app?")


def _file_path(call: _Call, url: str, out: Path, media_type: str) -> Path:
    if media_type not in _SUFFIXES:
        raise _foreign(call, url)
    return out.with_name(out.name + _SUFFIXES[media_type])


def _save_json(call: _Call, url: str, out: Path) -> tuple[Path | None, Path, int]:
    """Write what an answer with actions holds. Returns the file's path, that of the actions, the file's size."""
    path, data = None, b""
    try:
        answer = json.loads(call.content(_MAX_JSON_BYTES))
        actions = GeneratedActions.from_json(answer["actions"])
        if (video := answer["video"]) is not None:
            path = _file_path(call, url, out, video["media_type"])
            data = base64.b64decode(video["b64_json"])
    except (ValueError, TypeError, KeyError):
        raise _foreign(call, url) from None
    if path is not None:
        _save(iter([data]), path)
    return path, write_actions(actions, out), len(data)


def _save(parts: Iterator[bytes], path: Path) -> int:
    """Write an answer's file; it appears when it is whole. Returns its size."""
    file = OutputFile(path)
    try:
        with file.path.open("wb") as stream:
            num_bytes = sum(stream.write(part) for part in parts)
        file.commit()
    except OSError as error:
        raise MediaError(f"{path}: cannot be written: {error}") from error
    finally:
        file.discard()
    return num_bytes
