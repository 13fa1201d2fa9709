"""A small Hugging Face hub for tests: one repository over HTTP, with hashes, ranges and faults on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

REPOSITORY, COMMIT = "nvidia/Cosmos3-Tiny", "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """The hub's one repository.

    Attributes:
        files: name -> bytes.
        wrong: names whose stated hash is that of other bytes.
        error: the ``X-Error-Code`` with which it refuses files, and the metadata too if it is not GatedRepo.
        stop_after: bytes after which answers stall, so that the client can be killed in the middle.
        break_after: bytes after which the first longer answer breaks off.
        asked: (method, path, first byte) of each request for a file.
    """

    files: dict[str, bytes]
    wrong: set[str] = field(default_factory=set)
    error: str = ""
    stop_after: int | None = None
    break_after: int | None = None
    asked: list[tuple[str, str, int]] = field(default_factory=list)
    url: str = ""
    has_stalled: threading.Event = field(default_factory=threading.Event)
    goes_on: threading.Event = field(default_factory=threading.Event)

    def sha256(self, name: str) -> str:
        return hashlib.sha256(b"others" if name in self.wrong else self.files[name]).hexdigest()

    def describe(self) -> list[dict[str, object]]:
        """List the files as the hub does: large ones with the hash of their bytes, others with git's."""
        listed: list[dict[str, object]] = []
        for name, data in self.files.items():
            blob = b"others" if name in self.wrong else data
            entry: dict[str, object] = {
                "size": len(data),
                "oid": hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest(),
            }
            if name.endswith(".safetensors"):
                entry["lfs"] = {
                    "sha256": self.sha256(name),
                    "oid": self.sha256(name),
                    "size": len(data),
                    "pointerSize": 130,
                }
            listed.append({"rfilename": name, "path": name, "type": "file", "blobId": entry["oid"], **entry})
        return listed


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(has_body=False)

    def do_GET(self) -> None:
        self._answer(has_body=True)

    def _answer(self, *, has_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        if path.startswith(f"/api/models/{REPOSITORY}"):
            if self.hub.error and self.hub.error != "GatedRepo":
                return self._send(404, b"{}", {"X-Error-Code": self.hub.error}, has_body=has_body)
            found: object = self.hub.describe()
            if "/tree/" not in path:
                found = {"id": REPOSITORY, "sha": COMMIT, "siblings": found, "cardData": {"license_name": "open-model"}}
            return self._send(200, json.dumps(found).encode(), {"content-type": "application/json"}, has_body=has_body)
        prefix = f"/{REPOSITORY}/resolve/"
        name = path.removeprefix(prefix).partition("/")[2]
        if not path.startswith(prefix) or name not in self.hub.files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"}, has_body=has_body)
        begin = int(self.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.hub.asked.append((self.command, name, begin))
        if self.hub.error:
            return self._send(403, b"", {"X-Error-Code": self.hub.error}, has_body=has_body)
        data = self.hub.files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{self.hub.sha256(name)}"', "accept-ranges": "bytes"}
        if begin:
            headers["content-range"] = f"bytes {begin}-{len(data) - 1}/{len(data)}"
        return self._send(206 if begin else 200, data[begin:], headers, has_body=has_body)

    def _send(self, status: int, body: bytes, headers: dict[str, str], *, has_body: bool) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if not has_body:
            return
        if self.hub.break_after is not None and len(body) > self.hub.break_after:
            self.wfile.write(body[: self.hub.break_after])
            self.hub.break_after = None
            self.close_connection = True
            return
        stop_after = self.hub.stop_after
        if stop_after is not None and len(body) > stop_after:
            self.wfile.write(body[:stop_after])
            self.wfile.flush()
            self.hub.has_stalled.set()
            self.hub.goes_on.wait(60)
            body = body[stop_after:]
        self.wfile.write(body)


@contextmanager
def serving_hub(files: dict[str, bytes]) -> Iterator[Hub]:
    """Serve a repository with these files for the duration of the block."""
    hub = Hub(files)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.goes_on.set()
        server.shutdown()
        server.server_close()
        thread.join(10)
