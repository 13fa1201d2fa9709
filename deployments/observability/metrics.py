"""What this app counts and measures: one table, the functions that record it, and the whole cluster's text.

Ray carries the values. Each process hands its own to the agent of its node every 10 s, and the agent answers
Prometheus, with or without Ray's dashboard. So :func:`metrics_text` is up to 10 s behind;
``RAY_metrics_report_interval_ms``, in the environment in which Ray is started, makes that shorter, down to a second.
Three more things follow from how Ray does it:

* Names get ``ray_`` in front, counters ``_total`` at the end; Serve adds the labels deployment, replica, application.
* A gauge that is not set again within two such periods is gone, and with it those of processes that have died.
  Counters and histograms of the dead stay, as long as their node does.
* A histogram's buckets and count are exact; its sum takes every value for the middle of its bucket.

To record costs some ten microseconds. It never fails: a request is worth more than its numbers. Where there is no Ray
nothing is recorded.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

from cluster.logs import one_line
from deployments.observability.cluster_metrics import ClusterMetrics

logger = logging.getLogger("ray.serve")

# Of one metric in one process; what comes after has the label "other". Labels are names from our own code and
# configuration, so that many are a mistake of ours, and may not grow without end even so.
_MAX_SERIES = 256
_MAX_LABEL_CHARS = 80

_SHORT_S = (0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_LONG_S = (*_SHORT_S, 120.0, 300.0, 600.0, 1800.0, 3600.0)

Record = Callable[[float, dict[str, str]], None]
"""Takes a value and its labels."""


@dataclass(frozen=True)
class Metric:
    """A row of the table.

    Attributes:
        name: without what Ray puts around it.
        kind: "counter" adds up, "gauge" is the last value, "histogram" counts by size.
        tells: in one sentence.
        labels: names of them, besides Serve's.
        bounds: upper ones of a histogram's buckets.
    """

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    tells: str
    labels: tuple[str, ...] = ()
    bounds: tuple[float, ...] = ()


REQUESTS = Metric(
    "cosmos3_requests",
    "counter",
    "Accepted requests that were run to an end, and those that ended in the queue when their caller left. Without jobs "
    "that were cancelled in the queue, or failed when their Director had died.",
    ("mode", "outcome"),
)
REQUEST_SECONDS = Metric(
    "cosmos3_request_seconds", "histogram", "From acceptance to the end.", ("mode", "outcome"), _LONG_S
)
REJECTIONS = Metric(
    "cosmos3_rejections", "counter", "Requests answered with 429, by the bound that was reached.", ("bound",)
)
JOBS = Metric(
    "cosmos3_jobs",
    "gauge",
    "Jobs that are queued or running. Every Director tells those of the whole app: take the largest, not the sum.",
    ("state", "lane", "service_class"),
)
QUEUE_WAIT_SECONDS = Metric(
    "cosmos3_queue_wait_seconds",
    "histogram",
    "What a request waited: in the app's queue of jobs, then at its transformer gang (there without a class).",
    ("queue", "lane", "service_class"),
    _LONG_S,
)
STAGE_SECONDS = Metric(
    "cosmos3_stage_seconds",
    "histogram",
    "One try of a stage, its waiting there included: finished, failed, full, or left by whoever asked.",
    ("stage", "outcome"),
    _LONG_S,
)
STAGE_RETRIES = Metric("cosmos3_stage_retries", "counter", "Stages that were begun again after a death.", ("stage",))
TAKEOVERS = Metric("cosmos3_takeovers", "counter", "Jobs that were taken over from a Director that had died.")
STEPS = Metric("cosmos3_steps", "counter", "Denoising steps that the gang of this replica has done.", ("lane",))
STEP_SECONDS = Metric(
    "cosmos3_step_seconds", "histogram", "A denoising step, the mean of its quantum.", ("lane",), _SHORT_S
)
GANG_BUSY_SHARE = Metric(
    "cosmos3_gang_busy_share", "gauge", "Share of the last seconds in which the gang of this replica was at work."
)
TEXT_CACHE_LOOKUPS = Metric(
    "cosmos3_text_cache_lookups",
    "counter",
    "Prompts of requests that began on this gang: hit, kept from before, or miss.",
    ("result",),
)
FIRST_CHUNK_SECONDS = Metric(
    "cosmos3_first_chunk_seconds", "histogram", "From the end of denoising to the first decoded frames.", (), _SHORT_S
)
FIRST_BYTE_SECONDS = Metric(
    "cosmos3_first_byte_seconds", "histogram", "From acceptance to the first frames in the file.", ("mode",), _LONG_S
)
FILE_BYTES = Metric("cosmos3_file_bytes", "counter", "Bytes of finished files.", ("mode",))
SENT_BYTES = Metric("cosmos3_sent_bytes", "counter", "Bytes of files that were sent to clients.")

TABLE = (
    *(REQUESTS, REQUEST_SECONDS, REJECTIONS, JOBS, QUEUE_WAIT_SECONDS, STAGE_SECONDS, STAGE_RETRIES, TAKEOVERS),
    *(STEPS, STEP_SECONDS, GANG_BUSY_SHARE, TEXT_CACHE_LOOKUPS),
    *(FIRST_CHUNK_SECONDS, FIRST_BYTE_SECONDS, FILE_BYTES, SENT_BYTES),
)
"""Everything that is recorded. No other module names a metric."""


class Metrics:
    """What one process records. Any thread may.

    Args:
        instrument: makes what takes a metric's values; None where there is nobody to take them yet.
    """

    def __init__(self, instrument: Callable[[Metric], Record | None]) -> None:
        self._instrument = instrument
        self._records: dict[str, Record] = {}
        self._seen: dict[str, set[tuple[str, ...]]] = {metric.name: set() for metric in TABLE}
        self._jobs: set[tuple[str, str, str]] = set()
        self._has_complained = False

    def request_ended(self, mode: str, outcome: str, seconds: float) -> None:
        """An accepted request is "completed", "failed" or "cancelled", so long after its acceptance."""
        self._add(REQUESTS, 1, mode, outcome)
        self._add(REQUEST_SECONDS, seconds, mode, outcome)

    def rejected(self, bound: str) -> None:
        """A request was refused for a bound: :attr:`cluster.errors.OverloadedError.what`."""
        self._add(REJECTIONS, 1, bound)

    def jobs(self, queued: Mapping[tuple[str, str], int], running: Mapping[tuple[str, str], int]) -> None:
        """Jobs by lane and class. To be told every few seconds, changed or not: gauges are forgotten after 20."""
        now = {
            (state, lane, service_class): number
            for state, numbers in (("queued", queued), ("running", running))
            for (lane, service_class), number in numbers.items()
        }
        # Those that are none any more are zero, which is not the same as unknown.
        self._jobs |= now.keys()
        for labels in self._jobs:
            self._add(JOBS, now.get(labels, 0), *labels)

    def waited_in_queue(self, lane: str, service_class: str, seconds: float) -> None:
        """A job waited so long before it was claimed."""
        self._add(QUEUE_WAIT_SECONDS, seconds, "jobs", lane, service_class)

    def stage_ended(self, stage: str, outcome: str, seconds: float) -> None:
        """A try of a stage is over; see :func:`deployments.observability.logs.watch_stage`."""
        self._add(STAGE_SECONDS, seconds, stage, outcome)

    def stage_retried(self, stage: str) -> None:
        """A stage is tried again."""
        self._add(STAGE_RETRIES, 1, stage)

    def taken_over(self) -> None:
        """A job was claimed whose runner had died."""
        self._add(TAKEOVERS, 1)

    def first_chunk(self, seconds: float) -> None:
        """The first frames are decoded, so long after the end of denoising."""
        self._add(FIRST_CHUNK_SECONDS, seconds)

    def first_byte(self, mode: str, seconds: float) -> None:
        """The first frames are in the file, so long after acceptance."""
        self._add(FIRST_BYTE_SECONDS, seconds, mode)

    def file_made(self, mode: str, num_bytes: int) -> None:
        """A file is whole."""
        self._add(FILE_BYTES, num_bytes, mode)

    def sent(self, num_bytes: int) -> None:
        """A part of a file went to a client."""
        self._add(SENT_BYTES, num_bytes)

    # What an engine loop tells: :class:`cluster.gang_meter.GangMeter`.

    def stepped(self, lane: str, num_steps: int, seconds: float) -> None:
        """A gang has run a quantum."""
        self._add(STEPS, num_steps, lane)
        self._add(STEP_SECONDS, seconds / num_steps, lane)

    def waited_for_gang(self, lane: str, seconds: float) -> None:
        """A request waited so long before its gang began it."""
        self._add(QUEUE_WAIT_SECONDS, seconds, "gang", lane, "")

    def busy(self, share: float) -> None:
        """Of the last seconds the gang was at work in this share."""
        self._add(GANG_BUSY_SHARE, share)

    def looked_up_prompts(self, num_hits: int, num_misses: int) -> None:
        """A request's prompts were found in the gang's cache, or not."""
        self._add(TEXT_CACHE_LOOKUPS, num_hits, "hit")
        self._add(TEXT_CACHE_LOOKUPS, num_misses, "miss")

    def _add(self, metric: Metric, value: float, *labels: str) -> None:
        if metric.kind == "counter" and value == 0:  # which Ray refuses
            return
        try:
            record = self._records.get(metric.name) or self._instrument(metric)
            if record is not None:
                self._records[metric.name] = record
                record(float(value), dict(zip(metric.labels, self._bounded(metric, labels), strict=True)))
        except Exception:  # a request is worth more than its numbers
            if not self._has_complained:
                self._has_complained = True
                logger.exception("%s was not recorded; there will be no further word of such failures", metric.name)

    def _bounded(self, metric: Metric, labels: tuple[str, ...]) -> tuple[str, ...]:
        labels = tuple(one_line(label, _MAX_LABEL_CHARS) for label in labels)
        seen = self._seen[metric.name]
        if labels not in seen:
            if len(seen) >= _MAX_SERIES:
                return ("other",) * len(labels)
            seen.add(labels)
        return labels


def _of_ray(metric: Metric) -> Record | None:
    import ray
    from ray.serve import metrics as ray_metrics

    if not ray.is_initialized():
        return None
    # In a replica Serve adds its own labels; elsewhere these are as ray.util.metrics'.
    if metric.kind == "counter":
        counter = ray_metrics.Counter(metric.name, metric.tells, metric.labels)
        return lambda value, labels: counter.inc(value, labels)
    if metric.kind == "gauge":
        gauge = ray_metrics.Gauge(metric.name, metric.tells, metric.labels)
        return lambda value, labels: gauge.set(value, labels)
    histogram = ray_metrics.Histogram(metric.name, metric.tells, boundaries=list(metric.bounds), tag_keys=metric.labels)
    return lambda value, labels: histogram.observe(value, labels)


@cache
def metrics() -> Metrics:
    """This process'."""
    return Metrics(_of_ray)


@cache
def _of_cluster() -> ClusterMetrics:
    return ClusterMetrics()


async def metrics_text() -> tuple[str, str]:
    """Our metrics and Serve's, of the whole cluster, in Prometheus' text format; and its content type.

    Nodes that do not answer are left out and counted in ``ray_cosmos3_scrape_failures``. Calls at the same time, and
    within a second, share one answer. What is in it is up to 10 s old, see the module.
    """
    return await _of_cluster().text()
