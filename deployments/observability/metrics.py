"""The app's metrics: one table, their recording, and the text of the whole cluster.

Ray transports the values. Each process sends its own to its node's agent every 10 s, and the agent serves them to
Prometheus, with or without Ray's dashboard. :func:`metrics_text` is therefore up to 10 s old. Setting
``RAY_metrics_report_interval_ms`` in Ray's environment shortens that, down to a second. Ray's transport also means:

* Ray prefixes names with ``ray_`` and ends counters with ``_total``; Serve adds the labels deployment, replica and
  application.
* A gauge expires when it is not set again within two such periods, so gauges of dead processes disappear. Their
  counters and histograms stay as long as their node.
* A histogram's buckets and count are exact; its sum counts every value as the middle of its bucket.

Recording takes about ten microseconds and never fails: a request is worth more than its metrics. Without Ray nothing
is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from cluster.gang_meter import GangMeter
from cluster.logs import one_line
from deployments.observability.cluster_metrics import ClusterMetrics

logger = logging.getLogger("ray.serve")

# Bound of one metric's label sets in one process; further ones are recorded as "other". Labels come from our own code
# and configuration, so only a mistake of ours reaches it.
_MAX_SERIES = 256
_MAX_LABEL_CHARS = 80

_SHORT_S = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LONG_S = (*_SHORT_S, 120.0, 300.0, 600.0, 1800.0, 3600.0)

Record = Callable[[float, dict[str, str]], None]
"""Records a value with its labels."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        name: without Ray's prefix and suffix.
        kind: "counter" is a sum, "gauge" the last value, "histogram" counts values by size.
        labels: their names, besides Serve's.
        bounds: upper bounds of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    description: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


REQUESTS = Metric(
    "cosmos3_requests",
    "counter",
    "Admitted requests that ended: those that ran, and those whose caller left the queue. Not counted: jobs that were "
    "cancelled in the queue, and jobs that failed because their Director had died.",
    ("mode", "outcome"),
)
REQUEST_SECONDS = Metric(
    "cosmos3_request_seconds", "histogram", "Seconds from admission to the end.", ("mode", "outcome"), _LONG_S
)
REJECTIONS = Metric(
    "cosmos3_rejections", "counter", "Requests rejected with 429, by the bound that was reached.", ("bound",)
)
JOBS = Metric(
    "cosmos3_jobs",
    "gauge",
    "Jobs that are queued or running. Every Director reports the whole app's: take the maximum, not the sum.",
    ("state", "lane", "service_class"),
)
QUEUE_WAIT_SECONDS = Metric(
    "cosmos3_queue_wait_seconds",
    "histogram",
    "Seconds that a request waited: in the app's job queue, then at its transformer gang (there without a class).",
    ("queue", "lane", "service_class"),
    _LONG_S,
)
STAGE_SECONDS = Metric(
    "cosmos3_stage_seconds",
    "histogram",
    "Seconds of one attempt of a stage, with its wait there. Outcomes: finished, failed, full, left by the caller.",
    ("stage", "outcome"),
    _LONG_S,
)
STAGE_RETRIES = Metric("cosmos3_stage_retries", "counter", "Stages that were retried after a process died.", ("stage",))
TAKEOVERS = Metric("cosmos3_takeovers", "counter", "Jobs that were taken over from a dead Director.")
FAULTS = Metric(
    "cosmos3_faults", "gauge", "1 while a Director begins no job because something that all need fails.", ("fault",)
)
STEPS = Metric("cosmos3_steps", "counter", "Denoising steps of this replica's gang.", ("lane",))
STEP_SECONDS = Metric(
    "cosmos3_step_seconds", "histogram", "Seconds of a denoising step, as the mean of its quantum.", ("lane",), _SHORT_S
)
GANG_BUSY_SHARE = Metric(
    "cosmos3_gang_busy_share", "gauge", "Share of the last seconds in which this replica's gang was busy."
)
TEXT_CACHE_LOOKUPS = Metric(
    "cosmos3_text_cache_lookups",
    "counter",
    "Cache lookups of the prompts of requests that started on this gang: hit or miss.",
    ("result",),
)
FIRST_CHUNK_SECONDS = Metric(
    "cosmos3_first_chunk_seconds",
    "histogram",
    "Seconds from the end of denoising to the first decoded frames.",
    (),
    _SHORT_S,
)
FIRST_BYTE_SECONDS = Metric(
    "cosmos3_first_byte_seconds",
    "histogram",
    "Seconds from admission to the first frames in the file.",
    ("mode",),
    _LONG_S,
)
FILE_BYTES = Metric("cosmos3_file_bytes", "counter", "Bytes of finished files.", ("mode",))
SENT_BYTES = Metric(
    "cosmos3_sent_bytes", "counter", "Bytes of files that were sent over HTTP, but for files inside JSON or a zip."
)

TABLE = (
    *(REQUESTS, REQUEST_SECONDS, REJECTIONS, JOBS, QUEUE_WAIT_SECONDS, STAGE_SECONDS, STAGE_RETRIES, TAKEOVERS, FAULTS),
    *(STEPS, STEP_SECONDS, GANG_BUSY_SHARE, TEXT_CACHE_LOOKUPS),
    *(FIRST_CHUNK_SECONDS, FIRST_BYTE_SECONDS, FILE_BYTES, SENT_BYTES),
)
"""All metrics. No other module names one."""


class Metrics(GangMeter):
    """Records the metrics of one process, a gang's among them; thread-safe.

    ``instrument`` returns a metric's recorder, or None while there is no Ray.
    """

    def __init__(self, instrument: Callable[[Metric], Record | None]) -> None:
        self._instrument = instrument
        self._records: dict[str, Record] = {}
        self._seen: dict[str, set[tuple[str, ...]]] = {metric.name: set() for metric in TABLE}
        self._jobs: set[tuple[str, str, str]] = set()
        self._has_logged_failure = False

    def record(self, metric: Metric, value: float, *labels: str) -> None:
        """Add to a counter, set a gauge, or count a value in a histogram; ``labels`` in the order of the metric's."""
        if metric.kind == "counter" and value == 0:  # Ray refuses it
            return
        try:
            record = self._records.get(metric.name) or self._instrument(metric)
            if record is not None:
                self._records[metric.name] = record
                record(float(value), dict(zip(metric.labels, self._limit_labels(metric, labels), strict=True)))
        except Exception:  # a request is worth more than its metrics
            if not self._has_logged_failure:
                self._has_logged_failure = True
                logger.exception("%s was not recorded; further such failures are not logged", metric.name)

    def set_jobs(self, queued: Mapping[tuple[str, str], int], running: Mapping[tuple[str, str], int]) -> None:
        """Set the number of jobs by lane and class. Call it every few seconds: gauges expire after 20 s."""
        now = {
            (state, lane, service_class): number
            for state, numbers in (("queued", queued), ("running", running))
            for (lane, service_class), number in numbers.items()
        }
        # Label sets without jobs are reported as zero, not left to expire.
        self._jobs |= now.keys()
        for labels in self._jobs:
            self.record(JOBS, now.get(labels, 0), *labels)

    def record_steps(self, lane: str, num_steps: int, seconds: float) -> None:
        self.record(STEPS, num_steps, lane)
        self.record(STEP_SECONDS, seconds / num_steps, lane)

    def record_gang_wait(self, lane: str, seconds: float) -> None:
        self.record(QUEUE_WAIT_SECONDS, seconds, "gang", lane, "")

    def set_busy_share(self, share: float) -> None:
        self.record(GANG_BUSY_SHARE, share)

    def count_prompt_lookups(self, num_hits: int, num_misses: int) -> None:
        self.record(TEXT_CACHE_LOOKUPS, num_hits, "hit")
        self.record(TEXT_CACHE_LOOKUPS, num_misses, "miss")

    def _limit_labels(self, metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
        labels = tuple(one_line(label, _MAX_LABEL_CHARS) for label in labels)
        seen = self._seen[metric.name]
        if labels not in seen:
            if len(seen) >= _MAX_SERIES:
                return ("other",) * len(labels)
            seen.add(labels)
        return labels


def _make_ray_recorder(metric: Metric) -> Record | None:
    import ray
    from ray.serve import metrics as ray_metrics

    if not ray.is_initialized():
        return None
    # In a replica Serve adds its own labels; elsewhere these equal ray.util.metrics.
    if metric.kind == "counter":
        return ray_metrics.Counter(metric.name, metric.description, metric.labels).inc
    if metric.kind == "gauge":
        return ray_metrics.Gauge(metric.name, metric.description, metric.labels).set
    return ray_metrics.Histogram(metric.name, metric.description, list(metric.bounds), metric.labels).observe


@cache
def metrics() -> Metrics:
    """Return the metrics of this process."""
    return Metrics(_make_ray_recorder)


@cache
def _cluster_metrics() -> ClusterMetrics:
    return ClusterMetrics()


async def metrics_text() -> tuple[str, str]:
    """Return the cluster's metrics, ours and Serve's, in Prometheus' text format, and the content type.

    Nodes that do not answer are left out and counted in ``ray_cosmos3_scrape_failures``.
    """
    return await _cluster_metrics().text()
