"""A job as the HTTP API tells of it: OpenAI's video object with vLLM-Omni's fields, and ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from cosmos3_core.media.file_kinds import SUFFIXES
from deployments.jobs.job import Job, JobState
from deployments.jobs.store import JobStore
from deployments.messages import QueuePosition
from deployments.threads import run_in_thread

LOSSLESS, HIGH = "lossless", "high"
"""Values of ``quality``."""

# Denoising is most of it: what is left is for decoding.
_DENOISED_PERCENT = 95
_MAX_UNFINISHED_PERCENT = 99
# What clients know of states is four words; how a job was stopped is told by its error.
_STATUSES = {JobState.CANCELLED: "failed"}
_DEFAULT_MESSAGES = {JobState.CANCELLED: "the job was cancelled", JobState.FAILED: "the job failed"}
# Between two looks of a client that asks again and again.
_LEAST_POLL_MS, _LONGEST_POLL_MS, _POLL_MS = 200, 5000, 1000
_POLLS = 10


class JobObjects:
    """Jobs as objects, with where they stand.

    Args:
        store: of the jobs.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store

    async def of(self, job: Job) -> dict[str, Any]:
        """Of one job.

        Raises:
            JobsError: the database cannot be used.
        """
        (told,) = await self.of_all([job])
        return told

    async def of_all(self, jobs: Sequence[Job]) -> list[dict[str, Any]]:
        """Of several, in their order.

        Raises:
            JobsError: the database cannot be used.
        """
        positions = await run_in_thread(self._store.queue_positions, jobs)
        return [job_object(job, positions.get(job.job_id)) for job in jobs]


def job_object(job: Job, position: QueuePosition | None) -> dict[str, Any]:
    """The object.

    Args:
        job: which one.
        position: in the queue; None where it does not wait.
    """
    eta_s = job.eta_s if position is None else position.eta_s
    result = job.result
    duration_s = result.get("num_frames", job.num_frames) / job.fps
    actions = result.get("actions")
    return {
        "id": job.job_id,
        "object": "video",
        "status": _STATUSES.get(job.state, job.state.value),
        "progress": _progress(job),
        "model": job.model,
        "prompt": job.prompt,
        "size": f"{job.width}x{job.height}",
        "seconds": f"{duration_s:.3f}".rstrip("0").rstrip("."),
        "quality": LOSSLESS if job.request.get("lossless") else HIGH,
        "created_at": int(job.created_s),
        "completed_at": None if job.completed_s is None else int(job.completed_s),
        "expires_at": None if job.expires_s is None else int(job.expires_s),
        "error": _error(job),
        "media_type": job.media_type or None,
        "file_name": file_name(job),
        "inference_time_s": result.get("inference_time_s"),
        "fps": job.fps,
        "num_frames": result.get("num_frames", job.num_frames),
        "duration_s": round(duration_s, 6),
        "metrics": _metrics(job),
        "stage_durations": result.get("stage_durations", {}),
        "peak_memory_mb": None,
        "action": None if actions is None else {**actions, "action_mode": job.mode},
        "remixed_from_video_id": job.remixed_from,
        "mode": job.mode,
        "seed": job.seed,
        "service_class": job.service_class,
        "stage": job.stage,
        "step": job.step,
        "num_steps": job.num_steps,
        "sigma": job.sigma,
        "eta_s": None if eta_s is None else round(eta_s, 3),
        "queue_position": None if position is None else position.position,
        "attempts": job.attempts,
        "notes": list(job.notes),
        "warnings": list(job.warnings),
        "frames_sha256": result.get("frames_sha256") or None,
    }


def file_name(job: Job) -> str | None:
    """What a job's file would be called on a disk; None where there is none."""
    return f"{job.job_id}{SUFFIXES[job.media_type]}" if job.media_type else None


def poll_after_ms(told: dict[str, Any]) -> int:
    """When to look at a job again, by its object."""
    eta_s = told["eta_s"]
    if eta_s is None:
        return _POLL_MS
    return int(min(max(eta_s * 1000 / _POLLS, _LEAST_POLL_MS), _LONGEST_POLL_MS))


def retry_after_s(eta_s: float | None) -> int:
    """When to ask again for what a job makes."""
    return 1 if eta_s is None else min(max(math.ceil(eta_s), 1), 3600)


def _progress(job: Job) -> int:
    if job.state is JobState.COMPLETED:
        return 100
    denoised = _DENOISED_PERCENT * job.step // job.num_steps
    return min(denoised, _MAX_UNFINISHED_PERCENT)


def _error(job: Job) -> dict[str, str] | None:
    if job.state not in _DEFAULT_MESSAGES:
        return None
    return {
        "code": job.error_code or job.state.value,
        "message": job.error_message or _DEFAULT_MESSAGES[job.state],
    }


def _metrics(job: Job) -> dict[str, float]:
    """Seconds that it has waited and run, as far as that is over."""
    metrics = {}
    if job.started_s is not None:
        metrics["queue_s"] = round(max(job.started_s - job.created_s, 0.0), 3)
        if job.completed_s is not None:
            metrics["run_s"] = round(max(job.completed_s - job.started_s, 0.0), 3)
    return metrics
