"""The metrics of every node of the cluster in one text: asked for side by side, filtered, merged by family.

The agents that are asked are Ray's, one a node. A node that is away, late, or says more than anybody reads is left out
and counted; it costs the others nothing.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import httpx2
import ray

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIXES = ("ray_cosmos3_", "ray_serve_")
FAILURES = "ray_cosmos3_scrape_failures"

_LIMIT_S = 5.0  # to learn which nodes there are, and then for all of them
_CONNECT_S = 2.0  # or one that is away would keep others from being asked
_MAX_NODE_BYTES = 8 * 2**20
_MAX_TEXT_BYTES = 32 * 2**20
_MAX_AT_ONCE = 128
_FRESH_S = 1.0

Fetch = Callable[[str], Awaitable[bytes]]
"""URL -> a node's text. May raise anything."""


class ClusterMetrics:
    """See the module. Inside one event loop.

    Args:
        urls: of all nodes' metrics, None for a node that has none; may block and raise. By default the cluster's.
        fetch: see :data:`Fetch`.
        limit_s: for learning the URLs, and then for all nodes together.
    """

    def __init__(
        self,
        urls: Callable[[], Sequence[str | None]] | None = None,
        fetch: Fetch | None = None,
        limit_s: float = _LIMIT_S,
    ) -> None:
        self._urls = urls or node_urls
        self._fetch = fetch or fetched
        self._limit_s = limit_s
        self._making: asyncio.Task[str] | None = None
        self._made_s = 0.0

    async def text(self) -> tuple[str, str]:
        """The text and its content type.

        Whoever asks while it is being made, or a moment later, gets the same one: to ask often costs little.
        """
        making = self._making
        if making is None or (making.done() and time.monotonic() - self._made_s > _FRESH_S):
            # A context of its own: a task made inside a request would be cancelled with that request.
            making = asyncio.get_running_loop().create_task(self._make(), context=contextvars.Context())
            self._making = making
        return await asyncio.shield(making), CONTENT_TYPE

    async def _make(self) -> str:
        try:
            return await self._asked()
        finally:
            self._made_s = time.monotonic()

    async def _asked(self) -> str:
        try:
            async with asyncio.timeout(self._limit_s):
                urls = await asyncio.to_thread(self._urls)
        except Exception:  # noqa: BLE001 - Ray's head is away; what it raises then is not documented
            urls = [None]
        places = asyncio.Semaphore(_MAX_AT_ONCE)

        async def one(url: str) -> list[Family]:
            async with places:
                data = await self._fetch(url)
            return await asyncio.to_thread(families_of, data)  # in a thread: it may be megabytes

        asked = [asyncio.create_task(one(url)) for url in urls if url is not None]
        if asked:
            _, late = await asyncio.wait(asked, timeout=self._limit_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        nodes = [task.result() for task in asked if not task.cancelled() and task.exception() is None]
        return await asyncio.to_thread(merged, nodes, len(urls) - len(nodes))


def node_urls() -> list[str | None]:
    """Where the metrics of each node that lives are; None for one that exports none."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [_url(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in alive]


def _url(address: str, port: int) -> str | None:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}/metrics" if port > 0 else None


async def fetched(url: str) -> bytes:
    """A node's text.

    Raises:
        httpx2.HTTPError: it cannot be had.
        ValueError: it is longer than any is.
    """
    data = bytearray()
    limits = httpx2.Timeout(_LIMIT_S, connect=_CONNECT_S)
    # Not by a proxy that the environment names: the nodes are neighbours.
    async with httpx2.AsyncClient(trust_env=False, timeout=limits) as client, client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for part in answer.aiter_bytes():
            data += part
            if len(data) > _MAX_NODE_BYTES:
                raise ValueError(f"{url} says more than {_MAX_NODE_BYTES} bytes")
    return bytes(data)


@dataclass
class Family:
    """A metric with all its series, in Prometheus' text format.

    Attributes:
        name: of it.
        about: its HELP and TYPE lines.
        samples: series, a name with labels -> its line.
    """

    name: str
    about: list[str] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        return sum(len(line) + 1 for line in (*self.about, *self.samples.values()))


def families_of(data: bytes) -> list[Family]:
    """Those of a node's text that are ours or Serve's."""
    families: dict[str, Family] = {}
    current = Family("")
    for line in data.decode(errors="replace").split("\n"):
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2]
            if name != current.name:
                current = families[name] = families.get(name) or Family(name)
            current.about.append(line)
        elif line and not line.startswith("#"):
            # A family's samples follow what is said about it; their names begin with its own.
            current.samples[line.rpartition(" ")[0]] = line
    return [family for name, family in families.items() if name.startswith(PREFIXES)]


def merged(nodes: Iterable[list[Family]], num_failures: int) -> str:
    """One text of several nodes': each family once, each series once.

    Args:
        nodes: their families.
        num_failures: nodes that are missing.
    """
    families: dict[str, Family] = {}
    num_bytes = 0
    for node in nodes:
        num_bytes += sum(family.num_bytes for family in node)
        if num_bytes > _MAX_TEXT_BYTES:
            num_failures += 1
            continue
        for family in node:
            known = families.setdefault(family.name, Family(family.name, family.about))
            if known.about == family.about:  # else it is of another kind, or of another version of this app
                known.samples |= family.samples
    about = [f"# HELP {FAILURES} Nodes that are missing in this answer.", f"# TYPE {FAILURES} gauge"]
    families[FAILURES] = Family(FAILURES, about, {FAILURES: f"{FAILURES} {num_failures}"})
    lines = (line for _, it in sorted(families.items()) for line in (*it.about, *it.samples.values()))
    return "\n".join(lines) + "\n"
