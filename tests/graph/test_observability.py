"""A request's id is in the logs of every process involved, and its numbers are in the cluster's metrics."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.observability.metrics import metrics_text
from tests.settling import eventually

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

REQUEST_ID = "seen-everywhere-7"
PROMPT = "an otter that nobody may read about"


@pytest.fixture(scope="module")
def sent_request(app: Any) -> None:
    """Send a request with an id over HTTP."""
    body = {"prompt": PROMPT, "size": "64x64", "num_frames": 9, "num_inference_steps": 4, "seed": 3}
    headers = {"content-type": "application/json", "x-request-id": REQUEST_ID}
    request = urllib.request.Request(f"{app.url}/v1/videos/sync", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=100) as answer:
        assert answer.headers["x-request-id"] == REQUEST_ID
        answer.read()


def lines_of(request_id: str) -> list[dict[str, Any]]:
    """Collect our log lines with a request's id from this Ray's replicas and ranks."""
    import ray

    runtime = ray.get_runtime_context()
    logs = Path(runtime.get_temp_dir()) / runtime.get_session_name() / "logs"
    texts = [path.read_text(errors="replace") for path in (*logs.glob("serve/*.log"), *logs.glob("worker-*.err"))]
    # Serve's replicas also write plain text to standard error.
    found = [json.loads(line) for text in texts for line in text.splitlines() if line.startswith("{")]
    return [line for line in found if line.get("request_id") == request_id and "event" in line]


def who_did_what(lines: list[dict[str, Any]]) -> set[tuple[str, str]]:
    def who(line: dict[str, Any]) -> str:
        return f"{line['gang']} {line['rank']}" if "rank" in line else line["deployment"].removeprefix("shared_")

    return {(who(line), line["event"]) for line in lines}


@pytest.mark.usefixtures("sent_request")
def test_every_process_logs_the_request_by_its_id() -> None:
    stages = ("Director", "PromptTokenizer", "Transformer", "VideoVAE", "Mp4Encoder")
    expected = {(stage, event) for stage in stages for event in ("stage began", "stage finished")}
    expected |= {("Transformer", "gang began"), ("Transformer", "gang ended")}
    for rank in ("TransformerRank 0", "VideoVAERank 0"):
        expected |= {(rank, "begin done"), (rank, "work ended")}
    assert eventually(lambda: expected <= who_did_what(lines_of(REQUEST_ID))), who_did_what(lines_of(REQUEST_ID))
    lines = lines_of(REQUEST_ID)
    assert len({line["job_id"] for line in lines}) == 1
    assert {line["attempt"] for line in lines} == {1}
    assert all(line["seconds"] > 0 for line in lines if line["event"] in ("stage finished", "work ended"))
    assert "otter" not in json.dumps(lines)


@pytest.mark.usefixtures("sent_request")
def test_metrics_of_the_cluster_include_ours_and_serves() -> None:
    def families() -> dict[str, Any]:
        text, _ = asyncio.run(metrics_text())
        return {family.name: family for family in text_string_to_metric_families(text)}

    def stages() -> set[str]:
        family = families().get("ray_cosmos3_stage_seconds")
        return set() if family is None else {sample.labels["stage"] for sample in family.samples}

    # An agent hears from its processes every 10 s, and a gang reports its busy share every five.
    assert eventually(lambda: {"tokenize", "denoise", "decode", "encode", "request"} <= stages(), 300), stages()
    ours = {"ray_cosmos3_file_bytes", "ray_cosmos3_steps", "ray_cosmos3_gang_busy_share"}
    assert eventually(lambda: {"ray_serve_deployment_replica_healthy", *ours} <= families().keys()), set(families())
    found = families()
    steps = [sample for sample in found["ray_cosmos3_steps"].samples if sample.labels["application"] == "shared"]
    assert sum(sample.value for sample in steps) >= 4
    assert {sample.labels["deployment"] for sample in steps} == {"Transformer"}
    assert [sample.value for sample in found["ray_cosmos3_scrape_failures"].samples] == [0]
