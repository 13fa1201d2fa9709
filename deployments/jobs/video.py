"""Video: a job as clients see it, OpenAI's video object with vLLM-Omni's fields and ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from cluster.events import QueuePosition
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.conditioning.modes import MODES
from cosmos3_core.media.file_kinds import SUFFIXES
from deployments.api_model import ApiModel
from deployments.jobs.job import Job, JobState
from deployments.media.layout import JOB_ID

LOSSLESS, HIGH = "lossless", "high"
"""Values of ``quality``."""

MAX_PAGE = 100
ORDERS = ("asc", "desc")
"""Most videos of a page, and the orders of a list."""

# Denoising is most of the progress; the rest is decoding.
_DENOISED_PERCENT = 95
_MAX_UNFINISHED_PERCENT = 99
# Clients know four statuses; the error says that a job was cancelled.
_STATUSES = {JobState.CANCELLED: "failed"}
_DEFAULT_MESSAGES = {JobState.CANCELLED: "the job was cancelled", JobState.FAILED: "the job failed"}
# Between two polls of a client.
_LEAST_POLL_MS, _LONGEST_POLL_MS, _POLL_MS = 200, 5000, 1000
_POLLS = 10


def _schema(**bounds: Any) -> Any:
    return Field(json_schema_extra=bounds)


JobId = Annotated[str, _schema(pattern=f"^{JOB_ID.pattern}$")]
Mode = Annotated[str, _schema(enum=list(MODES))]
Count = Annotated[int, _schema(minimum=0)]
Seconds = Annotated[float, _schema(minimum=0)]
Sha256 = Annotated[str, _schema(pattern="^[0-9a-f]{64}$")]


class Actions(TypedDict):
    """Generated actions as JSON; :class:`cosmos3_core.actions.GeneratedActions` has the numbers."""

    data: list[list[float]]
    shape: list[int]
    dtype: Literal["float32"]
    raw_action_dim: int
    domain_id: int
    domain_name: str
    is_normalised: bool
    action_mode: NotRequired[str]


class VideoError(ApiModel):
    """Why a video failed or was cancelled."""

    code: Annotated[str, Field(description="cancelled, or why it failed")]
    message: str


class VideoMetrics(TypedDict):
    """How long a video waited and ran; without a time that has not ended."""

    queue_s: NotRequired[Annotated[Seconds, Field(description="until its run began; earlier runs included")]]
    run_s: NotRequired[Seconds]


class Video(ApiModel):
    """A job and its results at one moment; a field that is not known yet, or does not apply, is None."""

    id: JobId
    object: Literal["video"]
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: Annotated[int, _schema(minimum=0, maximum=100)]
    model: str
    prompt: str
    size: Annotated[str, _schema(pattern="^[0-9]+x[0-9]+$"), Field(description="WIDTHxHEIGHT in pixels")]
    seconds: Annotated[str, _schema(pattern=r"^[0-9]+(\.[0-9]+)?$"), Field(description="duration, as text")]
    quality: Literal["high", "lossless"]
    created_at: Annotated[Count, Field(description="seconds since 1970, as all times")]
    completed_at: Count | None
    expires_at: Annotated[Count | None, Field(description="until when its file is kept")]
    error: VideoError | None
    media_type: Annotated[str | None, Field(description="of its file; null where there is none, only actions")]
    file_name: str | None
    inference_time_s: Seconds | None
    fps: Seconds
    num_frames: Count
    duration_s: Seconds
    metrics: VideoMetrics
    stage_durations: Annotated[Mapping[str, Seconds], Field(description="stage -> seconds")]
    peak_memory_mb: Annotated[None, Field(description="not measured")]
    action: Annotated[Actions | None, Field(repr=False)]
    remixed_from_video_id: JobId | None
    mode: Mode
    seed: Count
    service_class: str
    stage: Annotated[str, Field(description="that it is in")]
    step: Annotated[Count, Field(description="denoising steps that are done")]
    num_steps: Count
    sigma: Annotated[float | None, Field(description="noise level that the last step left")]
    eta_s: Annotated[Seconds | None, Field(description="until its last step, about")]
    queue_position: Annotated[Count | None, Field(description="jobs before it, those that run included")]
    attempts: Annotated[Count, Field(description="how often it was begun")]
    waiting_for: Annotated[str | None, Field(description="fault of its surroundings that must pass first")]
    waiting_since: Annotated[Count | None, Field(description="when it first met such a fault")]
    notes: Annotated[tuple[str, ...], Field(description="what was changed on the way")]
    warnings: Annotated[tuple[str, ...], Field(description="fields that were accepted without effect")]
    frames_sha256: Sha256 | None

    @classmethod
    def of(cls, job: Job, position: QueuePosition | None) -> Video:
        """Return a job as clients see it, with its position in the queue if it is queued."""
        eta_s = job.eta_s if position is None else position.eta_s
        result = job.result
        num_frames = result.get("num_frames", job.num_frames)
        duration_s = num_frames / job.fps
        actions = result.get("actions")
        return cls(
            id=job.job_id,
            object="video",
            status=_STATUSES.get(job.state, job.state.value),
            progress=_progress(job),
            model=job.model,
            prompt=job.prompt,
            size=f"{job.width}x{job.height}",
            seconds=f"{duration_s:.3f}".rstrip("0").rstrip("."),
            quality=LOSSLESS if job.request.get("lossless") else HIGH,
            created_at=int(job.created_s),
            completed_at=None if job.completed_s is None else int(job.completed_s),
            expires_at=None if job.expires_s is None else int(job.expires_s),
            error=_error(job),
            media_type=job.media_type or None,
            file_name=f"{job.job_id}{SUFFIXES[job.media_type]}" if job.media_type else None,
            inference_time_s=result.get("inference_time_s"),
            fps=job.fps,
            num_frames=num_frames,
            duration_s=round(duration_s, 6),
            metrics=_metrics(job),
            stage_durations=result.get("stage_durations", {}),
            peak_memory_mb=None,
            action=None if actions is None else {**actions, "action_mode": job.mode},
            remixed_from_video_id=job.remixed_from,
            mode=job.mode,
            seed=job.seed,
            service_class=job.service_class,
            stage=job.stage,
            step=job.step,
            num_steps=job.num_steps,
            sigma=job.sigma,
            eta_s=None if eta_s is None else round(eta_s, 3),
            queue_position=None if position is None else position.position,
            attempts=job.attempts,
            waiting_for=job.fault or None,
            waiting_since=int(job.fault_since_s) if job.fault and job.fault_since_s is not None else None,
            notes=job.notes,
            warnings=job.warnings,
            frames_sha256=result.get("frames_sha256") or None,
        )

    @property
    def has_ended(self) -> bool:
        """Whether it is completed or has failed."""
        return self.status in ("completed", "failed")

    @property
    def has_file(self) -> bool:
        """Whether it is completed with a file."""
        return self.status == "completed" and bool(self.media_type)

    @property
    def actions(self) -> GeneratedActions | None:
        """The generated actions as numbers; None without any."""
        return None if self.action is None else GeneratedActions.from_json(dict(self.action))


class VideoPage(ApiModel):
    """Some of an owner's videos, in the requested order."""

    object: Literal["list"]
    data: Annotated[tuple[Video, ...], _schema(maxItems=MAX_PAGE)]
    first_id: JobId | None
    last_id: JobId | None
    has_more: Annotated[bool, Field(description="whether others follow; the next page is after last_id")]

    @classmethod
    def of(cls, videos: tuple[Video, ...], *, has_more: bool) -> VideoPage:
        """Return a page of videos."""
        first_id, last_id = (videos[0].id, videos[-1].id) if videos else (None, None)
        return cls(object="list", data=videos, first_id=first_id, last_id=last_id, has_more=has_more)

    @property
    def videos(self) -> tuple[Video, ...]:
        """The videos."""
        return self.data


class VideoDeleted(ApiModel):
    """A video was deleted with its files."""

    id: JobId
    object: Literal["video.deleted"]
    deleted: Literal[True]

    @classmethod
    def of(cls, job_id: str) -> VideoDeleted:
        """Return the answer about a deleted job."""
        return cls(id=job_id, object="video.deleted", deleted=True)


def poll_after_ms(eta_s: float | None) -> int:
    """Return the milliseconds until a client should poll a video again."""
    if eta_s is None:
        return _POLL_MS
    return int(min(max(eta_s * 1000 / _POLLS, _LEAST_POLL_MS), _LONGEST_POLL_MS))


def retry_after_s(eta_s: float | None) -> int:
    """Return the seconds until a client should retry a file that is not ready."""
    return 1 if eta_s is None else min(max(math.ceil(eta_s), 1), 3600)


def _progress(job: Job) -> int:
    if job.state is JobState.COMPLETED:
        return 100
    return min(_DENOISED_PERCENT * job.step // job.num_steps, _MAX_UNFINISHED_PERCENT)


def _error(job: Job) -> VideoError | None:
    if job.state not in _DEFAULT_MESSAGES:
        return None
    return VideoError(code=job.error_code or job.state.value, message=job.error_message or _DEFAULT_MESSAGES[job.state])


def _metrics(job: Job) -> VideoMetrics:
    metrics: VideoMetrics = {}
    if job.started_s is not None:
        metrics["queue_s"] = round(max(job.started_s - job.created_s, 0.0), 3)
        if job.completed_s is not None:
            metrics["run_s"] = round(max(job.completed_s - job.started_s, 0.0), 3)
    return metrics
