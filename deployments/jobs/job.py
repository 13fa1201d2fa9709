"""A job: one accepted request, its states, the options that it came with, and the form in which it is stored.

Every request is a job, whether its caller waits for the answer or comes back for it. A job of a caller who waits is
*attached*: it belongs to the Director that admitted it, and ends when the caller leaves. Any other job is claimed by a
Director that has room, keeps running when its client disconnects, and resumes after a restart.

    queued ──> in_progress ──> completed
      ^  │        │  │ └─────> failed
      │  │        │  └───────> cancelled     (a job whose runner died is claimed again: in_progress -> in_progress)
      └──┼────────┘ given back
         └─> failed, cancelled
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cosmos3_core.actions import action_rows
from cosmos3_core.conditioning.modes import IMAGE_FIELD, VIDEO_FIELD
from cosmos3_core.errors import RequestError
from cosmos3_core.media.source import Packed
from cosmos3_core.request import GenerationRequest

if TYPE_CHECKING:
    from deployments.jobs.keys import KeyLimits

MEDIA = (IMAGE_FIELD, VIDEO_FIELD)
"""Names of the files that a request may have."""

_DEFAULTS = GenerationRequest()


class JobState(StrEnum):
    """The states of a job."""

    QUEUED = "queued"
    IN_PROGRESS = "in_progress"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def is_final(self) -> bool:
        """Whether the job has ended."""
        return not TRANSITIONS[self]


TRANSITIONS: Mapping[JobState, frozenset[JobState]] = MappingProxyType(
    {
        JobState.QUEUED: frozenset({JobState.IN_PROGRESS, JobState.FAILED, JobState.CANCELLED}),
        JobState.IN_PROGRESS: frozenset(JobState),
        JobState.COMPLETED: frozenset(),
        JobState.FAILED: frozenset(),
        JobState.CANCELLED: frozenset(),
    }
)
"""State -> the states that may follow it. Every change of a job goes through ``rows.change_job``."""


class Lane(StrEnum):
    """The queue that a job waits in: an image never waits for a place that clips have taken."""

    IMAGE = "image"
    VIDEO = "video"


def new_job_id() -> str:
    """Return a fresh id."""
    return f"video_gen_{uuid.uuid4().hex}"


@dataclass(frozen=True)
class SubmitOptions:
    """Options of a request beside what to generate; they travel to the Director with it.

    Attributes:
        request_id: the caller's name for the request, for logs; None = a new one.
        owner: id of the API key, "" without.
        service_class: of the configuration; None = the standard one.
        classes, limits: of the key; None = the configuration's.
        previews: number of previews to record, 0 to 32.
        remixed_from: id of the job whose request is reused.
        warnings: fields that were accepted without effect.
    """

    request_id: str | None = None
    owner: str = ""
    service_class: str | None = None
    classes: tuple[str, ...] | None = None
    limits: KeyLimits | None = None
    idempotency_key: str | None = None
    previews: int = 0
    remixed_from: str | None = None
    warnings: tuple[str, ...] = ()
    skip_guardrails: bool = False


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A request that was checked and is about to be accepted; :class:`SubmitOptions` has the fields of both.

    Attributes:
        model: name of the served model: only Directors that serve it claim the job.
        request: plain JSON values of :func:`encode_request`.
        inputs: names of its files in the media store.
        fingerprint: hash of the request; two requests with one idempotency key must have the same.
        media_type: "" if there will be no file.
        work: estimate of :mod:`deployments.jobs.estimates`.
        attached_to: the runner whose caller waits for it; None for a job that stays.
        skip_guardrails: only if the operator still allows that when the job begins.
        notes: what admission changed in the request.
    """

    job_id: str
    owner: str
    model: str
    request: Mapping[str, Any]
    inputs: tuple[str, ...] = ()
    fingerprint: str
    mode: str
    prompt: str
    width: int
    height: int
    num_frames: int
    fps: float
    seed: int
    num_steps: int
    media_type: str
    lane: Lane
    service_class: str
    work: float
    request_id: str
    idempotency_key: str | None = None
    attached_to: str | None = None
    previews: int = 0
    remixed_from: str | None = None
    skip_guardrails: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Job(NewJob):
    """A job as it is in the database. Times are seconds since 1970, by the clocks of the processes that wrote them.

    Attributes:
        order: place in the queue: jobs of a lane are claimed from the smallest one on.
        lease, lease_until_s: id of its runner's claim, and until when that is valid.
        attempts: how often it was claimed.
        is_cancelling: whether its runner must stop it.
        step, sigma: of the last finished denoising step; 0 and None before.
        stage: "queued", then "denoising", "decoding" ...
        step_s: seconds that the last step took on its gang.
        media_id: of its file in the media store; "" before.
        result: of a completed job, see :mod:`deployments.director.recorder`.
        last_seq: number of its last event.
        num_faults: how often it was put back because its surroundings failed.
        fault: what it waits for, while it is queued after such a fault; "" otherwise.
        fault_since_s: when the first of these faults was noticed.
        retry_at_s: not claimed before that.
    """

    state: JobState = JobState.QUEUED
    order: float = 0.0
    created_s: float = 0.0
    updated_s: float = 0.0
    started_s: float | None = None
    completed_s: float | None = None
    expires_s: float | None = None
    runner: str = ""
    lease: str = ""
    lease_until_s: float = 0.0
    attempts: int = 0
    is_cancelling: bool = False
    step: int = 0
    sigma: float | None = None
    stage: str = "queued"
    step_s: float | None = None
    media_id: str = ""
    result: Mapping[str, Any] = field(default_factory=dict)
    error_code: str = ""
    error_message: str = ""
    last_seq: int = 0
    num_faults: int = 0
    fault: str = ""
    fault_since_s: float | None = None
    retry_at_s: float = 0.0

    @property
    def eta_s(self) -> float | None:
        """Seconds until the last step of a job that denoises, by its own pace; None if that cannot be estimated."""
        if self.state is not JobState.IN_PROGRESS or self.started_s is None or not 0 < self.step < self.num_steps:
            return None
        # The elapsed time includes other jobs' turns, but not steps from before a restart.
        pace_s = max((self.updated_s - self.started_s) / self.step, self.step_s or 0.0)
        return (self.num_steps - self.step) * pace_s


@dataclass(frozen=True)
class JobEvent:
    """One event of a job's history, as ``GET /v1/videos/{id}/events`` reports it.

    Attributes:
        seq: 1, 2, ... in the job; the SSE id.
        kind: of :mod:`deployments.jobs.events`.
        data: plain JSON values.
        at_s: seconds since 1970.
    """

    job_id: str
    seq: int
    kind: str
    data: Mapping[str, Any]
    at_s: float


@dataclass(frozen=True)
class Progress:
    """Progress of a running job; None leaves a field as it is."""

    step: int | None = None
    sigma: float | None = None
    step_s: float | None = None
    stage: str | None = None
    media_id: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The end of a job: a final state, with a result if it is completed, else an error."""

    state: JobState
    result: Mapping[str, Any] = field(default_factory=dict)
    error_code: str = ""
    error_message: str = ""


def encode_request(request: GenerationRequest) -> tuple[dict[str, Any], dict[str, Packed]]:
    """Return the fields of a request that differ from their defaults, and its media by name.

    Args:
        request: checked, with its media :meth:`~GenerationRequest.packed`.

    Raises:
        RequestError: it brings its own noise, which is not kept.
    """
    if request.noise is not None:
        raise RequestError("noise", "tensors", "nothing where a service makes it", "Generate in process instead.")
    values: dict[str, Any] = {}
    media: dict[str, Packed] = {}
    for each in fields(request):
        value = getattr(request, each.name)
        if each.name in MEDIA:
            if value is not None:
                media[each.name] = value
        elif each.name == "actions":
            if value is not None:
                values["actions"] = action_rows("actions", value, None).tolist()
        elif value != getattr(_DEFAULTS, each.name):
            is_list = isinstance(value, Sequence) and not isinstance(value, str)
            values[each.name] = list(value) if is_list else value
    return values, media


def decode_request(values: Mapping[str, Any], media: Mapping[str, Packed]) -> GenerationRequest:
    """Rebuild a request from what :func:`encode_request` returned."""
    given: dict[str, Any] = {**values, **media}
    return GenerationRequest(**given)


def compute_fingerprint(values: Mapping[str, Any], media: Mapping[str, Packed], **options: Any) -> str:
    """Return a hash of a request and its options, the same in any process."""
    digest = hashlib.sha256(json.dumps([values, options], sort_keys=True).encode())
    for name in sorted(media):
        data = media[name]
        about = "bytes" if isinstance(data, bytes) else f"{data.dtype} {data.shape}"
        digest.update(f"\0{name} {about}\0".encode())
        digest.update(data if isinstance(data, bytes) else data.tobytes())
    return digest.hexdigest()
