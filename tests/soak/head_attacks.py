"""Attack an app with heads and bodies of requests: ``python -m tests.soak.head_attacks CHECKPOINT DIRECTORY``.

Prints how each of 500 attacks of 20 kinds ended, the proxy's and the ingress's own memory before, at most, and a minute
after, and the 95th percentile of other clients' seconds meanwhile; before that the same without an attack, and after it
for six clients that announce bodies of 100 MB.
"""

from __future__ import annotations

import itertools
import socket
import statistics
import sys
import threading
import time
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx2

from tests.graph.serving import Serving
from tests.soak.load import find_pids, start

_NUM_OF_EACH, _AT_ONCE = 25, 10
_WATCHED = {"proxy": r"ray::ProxyActor", "Ingress": r"ray::ServeReplica:\w+:Ingress"}
_WARMING_S, _SETTLING_S = 20.0, 60.0
_ATTACK_S = 40.0
_MIB = 1 << 20
_BLOCK, _NUM_BLOCKS = b"a" * 50_000, 2_000
_LINE = b"GET /health HTTP/1.1\r\nhost: a\r\n"


def _repeat(piece: bytes, num_bytes: int) -> Iterator[bytes]:
    block = piece * (65536 // len(piece) + 1)
    return itertools.repeat(block, num_bytes // len(block) + 1)


def _slowly(data: Iterable[bytes], pause_s: float) -> Iterator[bytes]:
    for piece in data:
        yield piece
        time.sleep(pause_s)


_ATTACKS = {
    "a header of 200 MiB": lambda: itertools.chain([_LINE, b"x-a: "], _repeat(b"a", 200 * _MIB)),
    "a path of 200 MiB": lambda: itertools.chain([b"GET /"], _repeat(b"a", 200 * _MIB)),
    "a method of 200 MiB": lambda: _repeat(b"A", 200 * _MIB),
    "a header's name of 200 MiB": lambda: itertools.chain([_LINE], _repeat(b"a", 200 * _MIB)),
    "20,000 headers": lambda: [_LINE, b"".join(b"x-%d: a\r\n" % number for number in range(20_000)), b"\r\n"],
    "20,000 headers of one name": lambda: [_LINE, b"x: a\r\n" * 20_000, b"\r\n"],
    "headers without end": lambda: itertools.chain([_LINE], _repeat(b"x: a\r\n", 200 * _MIB)),
    "a folded header without end": lambda: itertools.chain([_LINE, b"x: a\r\n"], _repeat(b" a\r\n", 200 * _MIB)),
    "empty lines without end": lambda: _repeat(b"\r\n", 50 * _MIB),
    "a byte a second": lambda: _slowly((bytes([byte]) for byte in _LINE), 1.0),
    "nothing": list,
    "half a head": lambda: [_LINE],
    "bytes of zero": lambda: _repeat(b"\0", _MIB),
    "the hello of TLS": lambda: [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(506)],
    "the preface of HTTP/2": lambda: [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"],
    "a header that is not UTF-8": lambda: [_LINE, b"x-request-id: \xe9\r\n\r\n"],
    "two lengths": lambda: [b"POST /v1/videos HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\n"],
    "a chunk's line without end": lambda: itertools.chain(
        [b"POST /v1/videos HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n1;"], _repeat(b"a", 200 * _MIB)
    ),
    "trailers without end": lambda: itertools.chain(
        [b"POST /v1/videos HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n0\r\n"],
        _repeat(b"x: a\r\n", 200 * _MIB),
    ),
    "10,000 requests at once": lambda: _repeat(_LINE + b"\r\n", 10_000 * len(_LINE)),
}


def attack(address: tuple[str, int], kind: str) -> str:
    """Send an attack; return the status that answered it, or how the connection ended."""
    deadline_s = time.monotonic() + _ATTACK_S
    answer = b""
    with socket.create_connection(address, timeout=_ATTACK_S) as connection:
        try:
            for piece in _ATTACKS[kind]():
                connection.settimeout(max(0.1, deadline_s - time.monotonic()))
                connection.sendall(piece)
        except TimeoutError:
            return "still open"
        except OSError:
            pass  # it was closed meanwhile; there may be an answer
        try:
            connection.settimeout(max(0.1, deadline_s - time.monotonic()))
            answer = connection.recv(64)
        except TimeoutError:
            return "still open"
        except OSError:
            return "closed"
    return answer.split(b" ")[1].decode() if answer.startswith(b"HTTP/") else "closed"


@dataclass
class Watch:
    """Measurements during an attack: memory of processes in MiB, seconds of other clients' requests."""

    app: Serving
    before: dict[str, float] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)
    seconds: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    _is_over: threading.Event = field(default_factory=threading.Event)

    def read_memory(self) -> dict[str, float]:
        """Read the memory that the watched processes hold, without what they share: Ray's object store lies in that."""
        found = {}
        for kind, pattern in _WATCHED.items():
            texts = (Path(f"/proc/{pid}/statm").read_text() for pid in find_pids(self.app, pattern))
            sizes = ([int(number) for number in text.split()] for text in texts)
            found[kind] = sum(resident - shared for _, resident, shared, *_ in sizes) * 4096 / _MIB
        return found

    def _sample_memory(self) -> None:
        while not self._is_over.wait(0.2):
            now = self.read_memory()
            self.peak = {kind: max(now[kind], self.peak.get(kind, 0.0)) for kind in now}

    def _request(self, url: str) -> None:
        with httpx2.Client(base_url=url, timeout=30) as http:
            while not self._is_over.wait(0.1):
                begun_s = time.monotonic()
                try:
                    status = http.get("/v1/videos").status_code
                    if status != 200:
                        self.failures.append(str(status))
                except httpx2.HTTPError as error:
                    self.failures.append(type(error).__name__)
                self.seconds.append(time.monotonic() - begun_s)

    @contextmanager
    def observe(self, title: str) -> Iterator[None]:
        """Watch during the block, and print what was seen a while after it."""
        url = self.app.url()
        self.before, self.peak = self.read_memory(), {}
        self.seconds, self.failures = [], []
        self._is_over.clear()
        threads = [threading.Thread(target=self._sample_memory)]
        threads += [threading.Thread(target=self._request, args=(url,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._is_over.set()
            for thread in threads:
                thread.join()
        time.sleep(_SETTLING_S)
        after = self.read_memory()
        for kind, before in self.before.items():
            print(f"{title}: {kind} {before:.0f} MiB before, at most {self.peak[kind]:.0f}, then {after[kind]:.0f}")
        p95_s = statistics.quantiles(self.seconds, n=20)[-1]
        print(f"{title}: p95 of {len(self.seconds)} other requests {p95_s:.3f} s, failed: {Counter(self.failures)}")


def send_body(url: str, num_blocks: int) -> str:
    """Announce and send a prompt of so many blocks, as JSON; return the answer's status.

    One block is sent again and again: making the whole body would stop the other clients of this process.
    """
    begin, end = b'{"prompt": "', b'"}'
    num_bytes = len(begin) + num_blocks * len(_BLOCK) + len(end)
    headers = {"content-type": "application/json", "content-length": str(num_bytes)}
    body = itertools.chain([begin], itertools.repeat(_BLOCK, num_blocks), [end])
    try:
        return str(httpx2.post(f"{url}/v1/videos", content=body, headers=headers, timeout=200).status_code)
    except httpx2.HTTPError as error:
        return type(error).__name__


def main() -> None:
    """Print the tables."""
    checkpoint, directory = sys.argv[1:]
    Path(directory).mkdir(parents=True, exist_ok=True)
    with start(Path(directory), checkpoint) as app:
        url = app.url()
        parts = urllib.parse.urlsplit(url)
        address = (str(parts.hostname), int(parts.port or 80))
        watch = Watch(app)
        with watch.observe("no attack"):  # and the processes are warm after it
            time.sleep(_WARMING_S)
        with watch.observe("heads"), ThreadPoolExecutor(_AT_ONCE) as pool:
            kinds = list(_ATTACKS) * _NUM_OF_EACH
            outcomes = list(pool.map(lambda kind: attack(address, kind), kinds))
        for kind in _ATTACKS:
            counted = Counter(outcome for known, outcome in zip(kinds, outcomes, strict=True) if known == kind)
            print(f"{kind:<30} {dict(counted)}")
        with watch.observe("six bodies of 100 MB"), ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(lambda _: send_body(url, _NUM_BLOCKS), range(6)))
        print(f"answers: {dict(Counter(answers))}", flush=True)


if __name__ == "__main__":
    main()
