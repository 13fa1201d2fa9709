"""A running app that is asked over sockets of its own: nothing in between tidies up what is sent."""

from __future__ import annotations

import contextlib
import datetime
import socket
import time
import urllib.parse
from http.client import HTTPResponse
from typing import Any

import httpx2

from tests.api.accepting_api import Sent
from tests.api.documented import Documented
from tests.api.safe_answers import Inside

_ANSWER_S = 300.0
# A body without a length that grows no further is waited for no longer.
_PATIENCE_S = 1.0


class LiveApi:
    """A running app over sockets; jobs that a request made are deleted at once.

    Args:
        url: of the app.
        inside: what no answer may say.

    Attributes:
        documented: what it says of itself.
        num_accepted: jobs that were made and deleted.
    """

    def __init__(self, url: str, inside: Inside) -> None:
        parts = urllib.parse.urlsplit(url)
        self._address, self._prefix = (str(parts.hostname), int(parts.port or 80)), parts.path
        self._host, self._inside = f"Host: {parts.netloc}".encode(), inside
        self.num_accepted = 0
        answer = self.exchange(Sent("GET", "/openapi.json"))
        assert answer.status_code == 200, answer.text
        self.documented = Documented(answer.json())

    def answer(self, sent: Sent) -> httpx2.Response:
        """What comes back, which is safe."""
        answer = self.exchange(sent)
        self._inside.check(answer, sent.everything)
        if sent.method == "POST" and answer.status_code == 200 and not sent.target.endswith("/cancel"):
            self.delete(answer)
        return answer

    def delete(self, answer: httpx2.Response) -> None:
        """The job that an answer tells of."""
        self.num_accepted += 1
        self.exchange(Sent("DELETE", f"/v1/videos/{answer.json()['id']}"))

    def check_accepted(self) -> None:
        """Nothing: whether it can be read is for the app to say."""

    def exchange(self, sent: Sent) -> httpx2.Response:
        """What comes back. A server may answer before it has all, and hang up."""
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
            told = HTTPResponse(connection, method=sent.method)
            told.begin()
            if told.length is None:
                connection.settimeout(_PATIENCE_S)
            body = bytearray()
            with contextlib.suppress(TimeoutError):
                while part := told.read1(1 << 16):
                    body += part
        headers: list[Any] = [(name.encode(), value.encode("latin-1")) for name, value in told.getheaders()]
        # Those are of the connection, which is gone.
        headers = [
            (name, value) for name, value in headers if name.lower() not in (b"transfer-encoding", b"connection")
        ]
        request = httpx2.Request(sent.method, f"http://cosmos3{sent.target}", headers=list(sent.headers))
        answer = httpx2.Response(told.status, headers=headers, content=bytes(body), request=request)
        answer.elapsed = datetime.timedelta(seconds=time.monotonic() - begun_s)
        return answer
