"""The table of metrics, their recording, and the merged text of a cluster; a real cluster is in graph/."""

from __future__ import annotations

import asyncio
import http.server
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cluster.gang_meter import BusyClock
from deployments.observability import cluster_metrics
from deployments.observability.cluster_metrics import FAILURES, ClusterMetrics, fetch_text, select_families
from deployments.observability.metrics import (
    FAULTS,
    FILE_BYTES,
    FIRST_BYTE_SECONDS,
    FIRST_CHUNK_SECONDS,
    QUEUE_WAIT_SECONDS,
    REJECTIONS,
    REQUEST_SECONDS,
    REQUESTS,
    SENT_BYTES,
    STAGE_RETRIES,
    STAGE_SECONDS,
    TABLE,
    TAKEOVERS,
    Metrics,
    _make_ray_recorder,
    metrics,
)
from tests.observability.recording import RecordingMetrics

PACKAGES = Path(__file__).parents[2]


@pytest.fixture
def recording() -> RecordingMetrics:
    return RecordingMetrics()


def record_everything(ours: Metrics) -> None:
    ours.record(REQUESTS, 1, "text_to_video", "completed")
    ours.record(REQUEST_SECONDS, 12.5, "text_to_video", "completed")
    ours.record(REJECTIONS, 1, "jobs that wait")
    ours.set_jobs({("video", "batch"): 2}, {("image", "standard"): 1})
    ours.record(QUEUE_WAIT_SECONDS, 3.0, "jobs", "video", "batch")
    ours.record(STAGE_SECONDS, 10.0, "denoise", "finished")
    ours.record(STAGE_RETRIES, 1, "decode")
    ours.record(TAKEOVERS, 1)
    ours.record(FAULTS, 1, "media_unavailable")
    ours.record(FIRST_CHUNK_SECONDS, 0.5)
    ours.record(FIRST_BYTE_SECONDS, 11.0, "text_to_video")
    ours.record(FILE_BYTES, 1000, "text_to_video")
    ours.record(SENT_BYTES, 500)
    ours.record_steps("video", 4, 2.0)
    ours.record_gang_wait("video", 1.0)
    ours.set_busy_share(0.75)
    ours.count_prompt_lookups(1, 1)


def test_every_row_of_the_table_is_recorded_with_its_labels(recording: RecordingMetrics) -> None:
    record_everything(recording)
    assert {name for name, *_ in recording.values} == {metric.name for metric in TABLE}
    labels = {metric.name: metric.labels for metric in TABLE}
    assert all(tuple(given) == labels[name] for name, _, given in recording.values)
    assert recording.values_of("cosmos3_requests") == [(1, "text_to_video", "completed")]
    assert recording.values_of("cosmos3_step_seconds") == [(0.5, "video")]
    assert recording.values_of("cosmos3_steps") == [(4, "video")]
    assert recording.values_of("cosmos3_queue_wait_seconds") == [
        (3, "jobs", "video", "batch"),
        (1, "gang", "video", ""),
    ]


def test_the_table_is_in_order() -> None:
    assert len({metric.name for metric in TABLE}) == len(TABLE)
    for metric in TABLE:
        assert re.fullmatch(r"cosmos3_[a-z_]+", metric.name)
        assert not metric.name.endswith("_total"), "Ray adds it"
        assert bool(metric.bounds) == (metric.kind == "histogram"), metric
        assert list(metric.bounds) == sorted(set(metric.bounds))
        assert metric.description.endswith(".")
        # What Serve adds.
        assert not {"deployment", "replica", "application"} & set(metric.labels)


def test_nothing_else_names_a_metric() -> None:
    names = re.compile("|".join(rf"\b{metric.name}\b" for metric in TABLE))
    found = {
        str(path.relative_to(PACKAGES))
        for package in ("cosmos3_core", "cluster", "deployments")
        for path in (PACKAGES / package).rglob("*.py")
        if names.search(path.read_text())
    }
    assert found == {"deployments/observability/metrics.py"}


def test_gone_jobs_are_reported_as_zero(recording: RecordingMetrics) -> None:
    recording.set_jobs({("video", "batch"): 2}, {})
    recording.set_jobs({}, {("video", "batch"): 2})
    assert sorted(recording.values_of("cosmos3_jobs")) == [
        (0, "queued", "video", "batch"),
        (2, "queued", "video", "batch"),
        (2, "running", "video", "batch"),
    ]


def test_a_counter_is_not_incremented_by_zero(recording: RecordingMetrics) -> None:
    recording.count_prompt_lookups(2, 0)  # Ray refuses a zero
    recording.set_busy_share(0.0)
    assert [name for name, *_ in recording.values] == ["cosmos3_text_cache_lookups", "cosmos3_gang_busy_share"]


def test_a_recording_error_is_logged_once_and_never_raised(caplog: pytest.LogCaptureFixture) -> None:
    def fail(value: float, labels: dict[str, str]) -> None:
        raise RuntimeError("no agent")

    def no_instrument(metric: Any) -> Any:
        raise RuntimeError("no registry")

    for instrument in (lambda metric: fail, no_instrument):
        caplog.clear()
        record_everything(Metrics(instrument))
        assert len(caplog.records) == 1


def test_recording_starts_when_ray_does() -> None:
    import ray

    if not ray.is_initialized():
        assert all(_make_ray_recorder(metric) is None for metric in TABLE)
        record_everything(metrics())
    values: list[float] = []
    instruments: list[Any] = [None, None, lambda value, labels: values.append(value)]
    ours = Metrics(lambda metric: instruments.pop(0))
    for share in (0.1, 0.2, 0.3, 0.4):
        ours.set_busy_share(share)
    assert values == [0.3, 0.4]


def test_labels_are_bounded_in_number_and_form(recording: RecordingMetrics) -> None:
    for number in range(1000):
        recording.record(REJECTIONS, 1, f"bound {number}\n{'x' * 1000}")
    labels = {bound for _, bound in recording.values_of("cosmos3_rejections")}
    assert len(labels) == 257
    assert "other" in labels
    assert all(label.isprintable() and len(label) <= 80 for label in labels)
    recording.record(REJECTIONS, 1, "bound 0\n" + "x" * 1000)  # a known label is kept
    assert recording.values_of("cosmos3_rejections")[-1][1] != "other"


def test_a_gangs_busy_share_covers_the_time_since_its_last_report() -> None:
    clock = BusyClock(100.0)
    clock.add_work(100.0, 102.0)
    assert clock.share(104.0) is None
    assert clock.share(105.0) == pytest.approx(0.4)
    clock.add_work(105.0, 115.0)
    assert clock.share(115.0) == 1.0
    assert clock.share(125.0) == 0.0


NODE = """# HELP ray_node_cpu_count Not ours.
# TYPE ray_node_cpu_count gauge
ray_node_cpu_count{{node="{node}"}} 8.0
# HELP ray_cosmos3_requests_total Accepted requests that have ended.
# TYPE ray_cosmos3_requests_total counter
ray_cosmos3_requests_total{{node="{node}",mode="a b"}} {value}
# HELP ray_serve_latency_ms Of Serve.
# TYPE ray_serve_latency_ms histogram
ray_serve_latency_ms_bucket{{node="{node}",le="1.0"}} 1.0
ray_serve_latency_ms_bucket{{node="{node}",le="+Inf"}} 2.0
ray_serve_latency_ms_count{{node="{node}"}} 2.0
ray_serve_latency_ms_sum{{node="{node}"}} 3.5
# HELP ray_tasks Not ours.
# TYPE ray_tasks gauge
ray_tasks{{Name="ray_serve_x"}} 1.0
"""


def node_text(node: str, value: float) -> bytes:
    return NODE.format(node=node, value=value).encode()


class Nodes:
    """Fake metrics agents of nodes."""

    def __init__(self, **texts: bytes | float | Exception) -> None:
        self.texts = texts
        self.num_asked = 0

    def urls(self) -> Sequence[str | None]:
        return [None if name == "without" else name for name in self.texts]

    async def fetch(self, url: str) -> bytes:
        self.num_asked += 1
        answer = self.texts[url]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, float):
            await asyncio.sleep(answer)
            return b""
        return answer

    def text(self, limit_s: float = 20.0) -> str:
        text, content_type = asyncio.run(ClusterMetrics(self.urls, self.fetch, limit_s).text())
        assert content_type == "text/plain; version=0.0.4; charset=utf-8"
        return text


def families(text: str) -> dict[str, Any]:
    """Parse a text with Prometheus' own parser."""
    return {family.name: family for family in text_string_to_metric_families(text)}


def test_nodes_are_merged_by_family_and_filtered() -> None:
    text = Nodes(a=node_text("a", 1.0), b=node_text("b", 2.0)).text()
    read = families(text)
    assert set(read) == {"ray_cosmos3_requests", "ray_serve_latency_ms", FAILURES}
    assert {(it.labels["node"], it.labels["mode"], it.value) for it in read["ray_cosmos3_requests"].samples} == {
        ("a", "a b", 1.0),
        ("b", "a b", 2.0),
    }
    assert len(read["ray_serve_latency_ms"].samples) == 8
    assert text.count("# HELP ") == text.count("# TYPE ") == 3
    assert text.endswith("\n")


def test_families_are_selected_by_a_part_of_their_names() -> None:
    text = Nodes(a=node_text("a", 1.0)).text()
    assert select_families(text, "") == text
    assert set(families(select_families(text, "latency"))) == {"ray_serve_latency_ms"}
    assert set(families(select_families(text, "cosmos3"))) == {"ray_cosmos3_requests", FAILURES}
    assert select_families(text, "a b") == "", "labels do not count"


def test_the_gpus_are_among_the_kept_metrics() -> None:
    lines = '# HELP ray_node_gram_used x\n# TYPE ray_node_gram_used gauge\nray_node_gram_used{GpuIndex="0"} 1.0\n'
    text = Nodes(a=lines.encode() + node_text("a", 1.0)).text()
    assert families(text)["ray_node_gram_used"].samples[0].value == 1.0


def failures(text: str) -> float:
    return float(families(text)[FAILURES].samples[0].value)


def test_failing_and_late_nodes_are_counted_without_affecting_others() -> None:
    nodes = Nodes(a=node_text("a", 1.0), b=OSError("away"), c=1000.0, without=b"", d=node_text("d", 2.0))
    text = nodes.text(limit_s=2.0)
    assert failures(text) == 3
    assert len(families(text)["ray_cosmos3_requests"].samples) == 2
    late = {f"late{number}": 1000.0 for number in range(40)}
    text = Nodes(**late, a=node_text("a", 1.0)).text(limit_s=2.0)
    assert failures(text) == 40
    assert len(families(text)["ray_cosmos3_requests"].samples) == 1


def test_a_cluster_whose_nodes_are_unknown_is_one_failure() -> None:
    def refuse() -> Sequence[str]:
        raise ConnectionError("the head is away")

    text, _ = asyncio.run(ClusterMetrics(refuse, Nodes().fetch).text())
    assert (set(families(text)), failures(text)) == ({FAILURES}, 1)


def test_a_cluster_that_does_not_list_its_nodes_in_time_is_one_failure() -> None:
    is_over = threading.Event()

    def hang() -> Sequence[str]:
        is_over.wait(30)
        return ["a"]

    async def scrape() -> str:
        try:
            text, _ = await ClusterMetrics(hang, Nodes(a=node_text("a", 1.0)).fetch, limit_s=0.1).text()
        finally:
            is_over.set()
        return text

    text = asyncio.run(scrape())
    assert (set(families(text)), failures(text)) == ({FAILURES}, 1)


def test_an_empty_cluster_has_no_failure() -> None:
    assert failures(Nodes().text()) == 0


def test_duplicate_series_and_conflicting_kinds_are_dropped() -> None:
    other = node_text("b", 2.0).replace(b"_total counter", b"_total gauge")
    text = Nodes(a=node_text("a", 1.0), again=node_text("a", 1.0), b=other).text()
    assert [it.labels["node"] for it in families(text)["ray_cosmos3_requests"].samples] == ["a"]
    assert len(families(text)["ray_serve_latency_ms"].samples) == 8


def test_a_text_beyond_the_bound_leaves_nodes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_metrics, "_MAX_TEXT_BYTES", 700)
    text = Nodes(a=node_text("a", 1.0), b=node_text("b", 2.0)).text()
    assert failures(text) == 1
    assert len(families(text)["ray_cosmos3_requests"].samples) == 1


def test_concurrent_scrapes_share_an_answer() -> None:
    nodes = Nodes(a=node_text("a", 1.0))

    async def ask() -> None:
        cluster = ClusterMetrics(nodes.urls, nodes.fetch)
        first = asyncio.create_task(cluster.text())
        others = [asyncio.create_task(cluster.text()) for _ in range(9)]
        await asyncio.sleep(0)
        first.cancel()  # a caller that leaves does not cancel the others
        texts = await asyncio.gather(*others)
        assert len(set(texts)) == 1
        assert nodes.num_asked == 1
        cluster._end_s -= 100
        await cluster.text()
        assert nodes.num_asked == 2

    asyncio.run(ask())


@contextmanager
def agent(answer: Callable[[http.server.BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """Run an HTTP server on this machine; give its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/metrics"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_an_agent_is_called_without_a_proxy_and_what_is_kept_of_its_text_is_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray's own metrics take many times the bound after some hours."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setattr(cluster_metrics, "_MAX_NODE_BYTES", 1000)
    for limit in ("_CONNECT_S", "_LIMIT_S"):
        monkeypatch.setattr(cluster_metrics, limit, 60.0)
    ours = b"# HELP ray_cosmos3_a A.\n# TYPE ray_cosmos3_a gauge\nray_cosmos3_a 1.0\nray_serve_b 2.0\n"
    others = b"# HELP ray_tasks Tasks.\n" + b'ray_tasks{Name="ray_serve_x"} 1.0\n' * 10_000
    body = others + ours + others
    status = 200

    def answer(handler: http.server.BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.end_headers()
        handler.wfile.write(body)

    with agent(answer) as url:
        assert asyncio.run(fetch_text(url)) == ours
        for too_long in (b"ray_cosmos3_a 1.0\n" * 60, b"ray_tasks" * 1000):
            body = too_long
            with pytest.raises(ValueError, match="must send at most 1000 bytes"):
                asyncio.run(fetch_text(url))
        body = b"\n"
        with pytest.raises(ValueError, match="has no metrics"):
            asyncio.run(fetch_text(url))
        status = 500
        with pytest.raises(Exception, match="500"):
            asyncio.run(fetch_text(url))


def test_addresses_of_both_kinds_make_urls() -> None:
    assert cluster_metrics._make_url("10.0.0.1", 80) == "http://10.0.0.1:80/metrics"
    assert cluster_metrics._make_url("fd00::1", 80) == "http://[fd00::1]:80/metrics"
    assert cluster_metrics._make_url("10.0.0.1", 0) is None
