"""Faults of the surroundings: accepted jobs wait, new ones are refused, and all go on when the fault has passed."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from deployments.media.objects import DirectoryObjects
from tests.app.http_jobs import DEADLINE_S, SMALL, create_job, wait_for_end
from tests.settling import eventually

pytestmark = pytest.mark.timeout(600)

NUM_JOBS = 6


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_a_media_directory_that_cannot_be_written_to_costs_no_job(number: int, start_app: Callable[..., Any]) -> None:
    """The database is elsewhere and works."""
    what = f"media_unavailable: {os.strerror(number)}"

    def refuse(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    app = start_app(f"media_{number}", jobs__max_running_videos=2)
    with httpx2.Client(base_url=app.url, timeout=DEADLINE_S) as http:
        with app.hold():
            jobs = [create_job(http, **SMALL, seed=seed) for seed in range(NUM_JOBS)]
            patch = pytest.MonkeyPatch()
            patch.setattr(DirectoryObjects, "_write", refuse)
        try:
            assert eventually(lambda: http.get("/ready").status_code == 503, DEADLINE_S)
            assert http.get("/ready").json() == {"status": "not ready", "waiting_for": [what]}
            answer = http.post("/v1/videos", json=SMALL)
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "media_unavailable")
            assert what in answer.json()["error"]["message"]
            assert int(answer.headers["retry-after"]) > 0

            def show() -> list[dict[str, Any]]:
                return [http.get(f"/v1/videos/{job_id}").json() for job_id in jobs]

            # The other running job may still be at its steps.
            assert eventually(lambda: all(job["status"] == "queued" for job in show()), DEADLINE_S)
            shown = show()
            waiting = [job for job in shown if job["waiting_for"] is not None]
            assert waiting
            assert all(job["waiting_for"] == what and job["waiting_since"] for job in waiting)
        finally:
            patch.undo()
        assert eventually(lambda: http.get("/ready").status_code == 200, DEADLINE_S)
        for job_id in jobs:
            job = wait_for_end(http, job_id)
            assert (job["status"], job["attempts"], job["waiting_for"]) == ("completed", 1, None)
        assert http.post("/v1/videos", json=SMALL).status_code == 200
