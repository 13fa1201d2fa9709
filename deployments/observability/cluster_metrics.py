"""The metrics of all nodes of the cluster as one text.

Ray's agents, one a node, are scraped side by side. A node that does not answer in time, or answers too much, is left
out and counted.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field

import httpx2
import ray

from deployments.threads import start_task

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIXES = ("ray_cosmos3_", "ray_serve_", "ray_node_gpus_", "ray_node_gram_")
"""Prefixes of the metrics that are kept: this project's, Serve's, and those of GPUs and their memory that Ray has."""
FAILURES = "ray_cosmos3_scrape_failures"

_LIMIT_S = 5.0  # to learn the nodes, and then to scrape them all
_CONNECT_S = 2.0  # shorter, so that nodes that are away do not hold the places of others
_MAX_NODE_BYTES = 16 * 2**20  # of the kept metrics; Ray's others take many times that after some hours
_MAX_TEXT_BYTES = 32 * 2**20
_MAX_AT_ONCE = 128
_FRESH_S = 1.0

_KEPT_LINES = tuple(start + prefix.encode() for start in (b"", b"# HELP ", b"# TYPE ") for prefix in PREFIXES)


@dataclass
class Family:
    """A metric with all its series, in Prometheus' text format.

    ``about`` has its HELP and TYPE lines; ``samples`` maps a series, a name with labels, to its line.
    """

    name: str
    about: list[str] = field(default_factory=list)
    samples: dict[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Return the lines of its text."""
        return [*self.about, *self.samples.values()]


def find_node_urls() -> list[str | None]:
    """Return the URL of each live node's metrics; None for a node that exports none."""
    alive = [node for node in ray.nodes() if node["Alive"]]
    return [_make_url(node["NodeManagerAddress"], node["MetricsExportPort"]) for node in alive]


def _make_url(address: str, port: int) -> str | None:
    host = f"[{address}]" if ":" in address else address
    return f"http://{host}:{port}/metrics" if port > 0 else None


async def fetch_text(url: str) -> bytes:
    """Fetch the lines of a node's text about the kept metrics.

    Raise httpx2.HTTPError without an answer, ValueError for one that is too long, or without any number: every node has
    some of its own, and so an agent without has just been started.
    """
    kept, rest, num_bytes, is_empty = [], b"", 0, True
    limits = httpx2.Timeout(_LIMIT_S, connect=_CONNECT_S)
    # Nodes are reached directly, never through a proxy of the environment.
    async with httpx2.AsyncClient(trust_env=False, timeout=limits) as client, client.stream("GET", url) as answer:
        answer.raise_for_status()
        async for part in answer.aiter_bytes():
            is_empty = is_empty and not part.strip()
            *lines, rest = (rest + part).split(b"\n")
            lines = [line for line in lines if line.startswith(_KEPT_LINES)]
            kept += lines
            num_bytes += sum(map(len, lines))
            if num_bytes + len(rest) > _MAX_NODE_BYTES:
                raise ValueError(f"{url} must send at most {_MAX_NODE_BYTES} bytes about {' and '.join(PREFIXES)}")
    if is_empty:
        raise ValueError(f"{url} has no metrics")
    return b"\n".join([*kept, rest])


class ClusterMetrics:
    """The metrics of a cluster, for one event loop.

    Args:
        urls: returns the URLs of all nodes' metrics, None for a node that has none; may block and raise.
        fetch: returns the text at a URL; may raise anything.
        limit_s: for learning the URLs, and then for all nodes together.
    """

    def __init__(
        self,
        urls: Callable[[], Sequence[str | None]] = find_node_urls,
        fetch: Callable[[str], Awaitable[bytes]] = fetch_text,
        limit_s: float = _LIMIT_S,
    ) -> None:
        self._urls = urls
        self._fetch = fetch
        self._limit_s = limit_s
        self._scraping: asyncio.Task[str] | None = None
        self._end_s = 0.0

    async def text(self) -> tuple[str, str]:
        """Return the text and its content type. Calls within a second share an answer."""
        task = self._scraping
        if task is None or (task.done() and time.monotonic() - self._end_s > _FRESH_S):
            task = start_task(self._scrape())
            self._scraping = task
        return await asyncio.shield(task), CONTENT_TYPE

    async def _scrape(self) -> str:
        try:
            async with asyncio.timeout(self._limit_s):
                urls = await asyncio.to_thread(self._urls)
        except Exception:  # noqa: BLE001 - Ray's head is away; what it raises then is not documented
            urls = [None]  # one failure stands for all nodes
        try:
            nodes = await self._scrape_nodes(urls)
            return await asyncio.to_thread(merge_nodes, nodes, len(urls) - len(nodes))
        finally:
            self._end_s = time.monotonic()

    async def _scrape_nodes(self, urls: Sequence[str | None]) -> list[list[Family]]:
        """Return the families of each node that answers in time."""
        places = asyncio.Semaphore(_MAX_AT_ONCE)

        async def scrape(url: str) -> list[Family]:
            async with places:
                text = await self._fetch(url)
            return await asyncio.to_thread(parse_families, text)  # in a thread: it may be megabytes

        scrapes = [asyncio.create_task(scrape(url)) for url in urls if url is not None]
        if not scrapes:
            return []
        done, late = await asyncio.wait(scrapes, timeout=self._limit_s)
        for task in late:
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        return [task.result() for task in scrapes if task in done and task.exception() is None]


def parse_families(text: bytes) -> list[Family]:
    """Return the families of a node's text that are kept."""
    families: dict[str, Family] = {}
    current = Family("")
    for line in text.decode(errors="replace").split("\n"):
        if line.startswith(("# HELP ", "# TYPE ")):
            name = line.split(" ", 3)[2]
            if name != current.name:
                current = families.setdefault(name, Family(name))
            current.about.append(line)
        elif line and not line.startswith("#"):
            # Samples follow the lines about their family; their names begin with its name.
            current.samples[line.rpartition(" ")[0]] = line
    return [family for name, family in families.items() if name.startswith(PREFIXES)]


def select_families(text: str, part: str) -> str:
    """Return the lines of the families whose names contain ``part``."""
    return "".join(line for line in text.splitlines(keepends=True) if part in _name_of(line))


def _name_of(line: str) -> str:
    """Return a line's metric; of a sample with its ending, such as ``_bucket``."""
    return line.split(" ", 3)[2] if line.startswith("# ") else line.partition(" ")[0].partition("{")[0]


def merge_nodes(nodes: Iterable[list[Family]], num_failures: int) -> str:
    """Return one text with each family and each series of the nodes once; ``num_failures`` nodes are missing."""
    families: dict[str, Family] = {}
    num_bytes = 0
    for node in nodes:
        num_bytes += sum(len(line) + 1 for family in node for line in family.lines())
        if num_bytes > _MAX_TEXT_BYTES:
            num_failures += 1
            continue
        for family in node:
            known = families.setdefault(family.name, Family(family.name, family.about))
            if known.about == family.about:  # else it is of another kind, or of another version of this app
                known.samples |= family.samples
    about = [f"# HELP {FAILURES} Nodes that are missing in this answer.", f"# TYPE {FAILURES} gauge"]
    families[FAILURES] = Family(FAILURES, about, {FAILURES: f"{FAILURES} {num_failures}"})
    lines = (line for _, family in sorted(families.items()) for line in family.lines())
    return "\n".join(lines) + "\n"
