"""A running app called over raw sockets: no HTTP client normalises the request."""

from __future__ import annotations

import contextlib
import datetime
import socket
import time
import urllib.parse
from http.client import HTTPResponse
from typing import Any

import httpx2

from tests.api.documented import ApiDocument
from tests.api.hostile.byte_api import Sent
from tests.api.hostile.safe_answers import ForbiddenWords

_ANSWER_S = 300.0
# How long to wait for more of a body without a length; longer than in process, see `byte_api`.
_PATIENCE_S = 1.0


class LiveApi:
    """A running app over sockets; created jobs are deleted at once.

    Args:
        url: URL of the app.
        forbidden: words that no answer may contain.

    Attributes:
        documented: its OpenAPI document.
        num_accepted: number of created and deleted jobs.
    """

    def __init__(self, url: str, forbidden: ForbiddenWords) -> None:
        parts = urllib.parse.urlsplit(url)
        self._address, self._prefix = (str(parts.hostname), int(parts.port or 80)), parts.path
        self._host, self._forbidden = f"Host: {parts.netloc}".encode(), forbidden
        self.num_accepted = 0
        answer = self.call(Sent("GET", "/openapi.json"))
        assert answer.status_code == 200, answer.text
        self.documented = ApiDocument(answer.json())

    def exchange(self, sent: Sent) -> httpx2.Response:
        """Return the answer, checked to be safe."""
        answer = self.call(sent)
        self._forbidden.check(answer, sent.all_bytes)
        if sent.method == "POST" and answer.status_code == 200 and not sent.target.endswith("/cancel"):
            self.delete(answer)
        return answer

    def delete(self, answer: httpx2.Response) -> None:
        """Delete the job that an answer reports."""
        self.num_accepted += 1
        self.call(Sent("DELETE", f"/v1/videos/{answer.json()['id']}"))

    def check_accepted(self) -> None:
        """Check nothing: the app itself finds out whether the media can be read."""

    def call(self, sent: Sent) -> httpx2.Response:
        """Exchange a request for its answer; a server may answer early and disconnect."""
        names = {name.lower() for name, _ in sent.headers}
        lines = [f"{sent.method} {self._prefix}{sent.target} HTTP/1.1".encode(), self._host, b"Connection: close"]
        lines += [name + b": " + value for name, value in sent.headers if name.lower() not in (b"host", b"connection")]
        if sent.body and b"content-length" not in names:
            lines.append(b"Content-Length: %d" % sum(map(len, sent.body)))
        begun_s = time.monotonic()
        with socket.create_connection(self._address, timeout=_ANSWER_S) as connection:
            with contextlib.suppress(ConnectionError):
                connection.sendall(b"\r\n".join([*lines, b"", b""]))
                for piece in sent.body:
                    connection.sendall(piece)
            response = HTTPResponse(connection, method=sent.method)
            response.begin()
            if response.length is None:
                connection.settimeout(_PATIENCE_S)
            body = bytearray()
            with contextlib.suppress(TimeoutError):
                while part := response.read1(1 << 16):
                    body += part
        headers: list[Any] = [(name.encode(), value.encode("latin-1")) for name, value in response.getheaders()]
        # Headers of the connection, which is closed.
        headers = [
            (name, value) for name, value in headers if name.lower() not in (b"transfer-encoding", b"connection")
        ]
        request = httpx2.Request(sent.method, f"http://cosmos3{sent.target}", headers=list(sent.headers))
        answer = httpx2.Response(response.status, headers=headers, content=bytes(body), request=request)
        answer.elapsed = datetime.timedelta(seconds=time.monotonic() - begun_s)
        return answer
