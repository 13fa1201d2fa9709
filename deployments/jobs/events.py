"""Events as clients see them: their union and its JSON.

The recorder stores an event's kind and JSON values; the feed and the API pass them on.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import TypeAdapter

from cluster.events import INTERNAL, Event, PreviewReady, PreviewsOff, QueuePosition, StepDone, public_names
from deployments.jobs.job import JobState
from deployments.jobs.video import Video
from deployments.messages import ChunkEncoded, FileStarted, StageRetried

FINAL_KINDS = frozenset(state.value for state in JobState if state.is_final)
"""Kinds of :class:`VideoEnded`."""

DELETED = "deleted"
"""Kind of the last event of a video that was deleted under its followers."""


@dataclass(frozen=True)
class JobStarted(Event):
    """A runner has begun the job, for the ``attempt``-th time."""

    KIND = "started"
    attempt: int = 1


@dataclass(frozen=True)
class VideoEnded(Event):
    """The last event: ``video`` is completed or has failed. ``outcome`` is one of :data:`FINAL_KINDS`."""

    video: Video
    outcome: str = field(metadata=INTERNAL)

    @property
    def kind(self) -> str:
        """The outcome."""
        return self.outcome


@dataclass(frozen=True)
class OtherEvent(Event):
    """An event of a kind ``name`` that this version does not know."""

    name: str = field(metadata=INTERNAL)

    @property
    def kind(self) -> str:
        """The name."""
        return self.name


VideoEvent = (
    QueuePosition
    | JobStarted
    | StepDone
    | PreviewReady
    | PreviewsOff
    | FileStarted
    | ChunkEncoded
    | StageRetried
    | VideoEnded
    | OtherEvent
)
"""What a client may see of a video, discriminated by ``kind``."""

_ADAPTERS: Mapping[str, TypeAdapter[Any]] = {
    event.KIND: TypeAdapter(event) for event in get_args(VideoEvent) if event.KIND
}
# JSON has no bytes: an image goes as base64, under another name.
_IMAGE, _BASE64 = "image", "b64_json"


def event_as_json(event: Event) -> dict[str, Any]:
    """Return an event's JSON values, without internal fields."""
    if isinstance(event, VideoEnded):
        return event.video.as_json()
    data: dict[str, Any] = {name: getattr(event, name) for name in public_names(type(event))}
    if _IMAGE in data:
        data[_BASE64] = base64.b64encode(data.pop(_IMAGE)).decode()
    return data


def event_of_json(kind: str, data: Mapping[str, Any], seq: int | None = None) -> VideoEvent:
    """Return the event of a kind and its JSON values without unknown keys; raise ValueError for wrong values."""
    if kind in FINAL_KINDS:
        return VideoEnded(Video.model_validate(data), kind, seq=seq, data=data)
    if (adapter := _ADAPTERS.get(kind)) is None:
        return OtherEvent(kind, seq=seq, data=data)
    values = {**data, "seq": seq, "data": data}
    if _BASE64 in data:
        values[_IMAGE] = base64.b64decode(data[_BASE64])
    event: VideoEvent = adapter.validate_python(values)
    return event
