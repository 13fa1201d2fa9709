"""Jobs over HTTP, on Ray or in process: create, wait, follow."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx2

DEADLINE_S = 200.0
SMALL: dict[str, Any] = {"prompt": "a car", "num_frames": 5, "height": 32, "width": 32, "num_inference_steps": 2}
CLASSES = ("interactive", "standard", "batch")
LONG: dict[str, Any] = {
    "prompt": "A red car.",
    "num_frames": 17,
    "height": 96,
    "width": 128,
    "num_inference_steps": 60,
    "negative_prompt": "",
}


def create_job(http: httpx2.Client, **changed: Any) -> str:
    """Create a job; return its id."""
    answer = http.post("/v1/videos", json={**LONG, **changed})
    assert answer.status_code == 200, answer.text
    return str(answer.json()["id"])


def get_until_up(http: httpx2.Client, path: str) -> dict[str, Any]:
    """GET a path until the process behind it is back; return the answer."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        try:
            answer = http.get(path)
            if answer.status_code == 200:
                return dict(answer.json())
        except httpx2.TransportError as error:
            answer = error  # type: ignore[assignment]
        assert time.monotonic() < deadline_s, answer
        time.sleep(0.05)


def wait_for_end(http: httpx2.Client, job_id: str) -> dict[str, Any]:
    """Wait until a job has ended; return it."""
    deadline_s = time.monotonic() + DEADLINE_S
    while (job := get_until_up(http, f"/v1/videos/{job_id}"))["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline_s, job
        time.sleep(0.05)
    return job


def events_of(http: httpx2.Client, job_id: str, after: int = 0) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Follow a job; return (number, kind, data) of every event."""
    headers = {"last-event-id": str(after)} if after else {}
    with http.stream("GET", f"/v1/videos/{job_id}/events", headers=headers) as answer:
        assert answer.status_code == 200
        number, kind = 0, ""
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                number = int(value)
            elif name == "event":
                kind = value
            elif name == "data":
                yield number, kind, json.loads(value)
                number = 0


async def patient_client(http: httpx2.AsyncClient, number: int) -> tuple[str, list[int]]:
    """Create a job, honouring Retry-After; return its id and the seconds it was told to wait."""
    waits: list[int] = []
    body = {**SMALL, "seed": number, "service_class": CLASSES[number % 3]}
    while (answer := await http.post("/v1/videos", json=body)).status_code == 429:
        waits.append(int(answer.headers["retry-after"]))
        await asyncio.sleep(waits[-1])
    assert answer.status_code == 200, answer.text
    job_id = answer.json()["id"]
    while (job := (await http.get(f"/v1/videos/{job_id}")).json())["status"] in ("queued", "in_progress"):
        await asyncio.sleep(0.5)
    assert job["status"] == "completed", job["error"]
    return job_id, waits
