"""What is told of a video while it is made, as values: one type a kind of event, however the app is reached."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from pydantic import TypeAdapter, ValidationError

from deployments.clients.errors import AnswerError
from deployments.clients.video import Video


@dataclass(frozen=True)
class RawEvent:
    """An event as it came.

    Attributes:
        seq: its number in the video's history, from 1; None for what is told in passing.
        kind: its name.
        data: plain JSON values.
    """

    seq: int | None
    kind: str
    data: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class VideoEvent:
    """Something was told; see :class:`RawEvent`. Of a kind that this version does not know it is this and no more."""

    seq: int | None
    kind: str
    data: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Queued(VideoEvent):
    """It waits, ``position`` others are before it; its last step comes in some ``eta_s`` seconds, if that is known."""

    position: int
    eta_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Started(VideoEvent):
    """It is being made, for the ``attempt``-th time."""

    attempt: int = 1


@dataclass(frozen=True, kw_only=True)
class Step(VideoEvent):
    """Step ``step`` of ``num_steps`` is done, counted from 1.

    Attributes:
        sigma: noise level that is left, by the word of the rank that did it, whose process is ``pid``.
        step_s: seconds that the step took.
        eta_s: seconds until the last one.
    """

    step: int
    num_steps: int
    sigma: float
    step_s: float | None = None
    eta_s: float | None = None
    pid: int | None = None


@dataclass(frozen=True, kw_only=True)
class Preview(VideoEvent):
    """What the pictures will be, as far as ``step`` steps tell: ``image`` is a whole small file of ``media_type``."""

    step: int
    sigma: float
    media_type: str
    image: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class PreviewsOff(VideoEvent):
    """There will be no previews, or no more, though they were asked for."""

    reason: str


@dataclass(frozen=True, kw_only=True)
class FileBegun(VideoEvent):
    """The file grows: it can be read over HTTP from now on. Comes again where it has to be made anew."""

    media_type: str | None = None


@dataclass(frozen=True, kw_only=True)
class Decoding(VideoEvent):
    """Chunk ``chunk`` of the frames is in the file."""

    chunk: int
    num_frames: int


@dataclass(frozen=True, kw_only=True)
class Retried(VideoEvent):
    """A stage failed and is tried again; denoising goes on after ``from_step`` steps."""

    stage: str
    attempt: int | None = None
    from_step: int = 0


@dataclass(frozen=True, kw_only=True)
class Ended(VideoEvent):
    """The last event: ``video`` is completed or has failed."""

    video: Video


FINAL = frozenset({"completed", "failed", "cancelled"})
"""Kinds of :class:`Ended`."""

DELETED = "deleted"
"""Kind of the last event of a video that is gone; a follower gets NotFound."""

KINDS: Mapping[str, type[VideoEvent]] = MappingProxyType(
    {
        "queued": Queued,
        "started": Started,
        "step": Step,
        "preview": Preview,
        "previews_off": PreviewsOff,
        "file": FileBegun,
        "decoding": Decoding,
        "retried": Retried,
        **dict.fromkeys(FINAL, Ended),
    }
)
"""Name -> type. More may come."""

_ADAPTERS = {kind: TypeAdapter(kind) for kind in KINDS.values()}


def event_of(raw: RawEvent) -> VideoEvent:
    """An event of its type.

    Raises:
        AnswerError: it does not hold what its kind does.
    """
    kind = KINDS.get(raw.kind)
    if kind is None:
        return VideoEvent(seq=raw.seq, kind=raw.kind, data=raw.data)
    try:
        held: dict[str, Any] = dict(raw.data)
        if kind is Preview:
            held["image"] = base64.b64decode(held["b64_json"])
        elif kind is Ended:
            held = {"video": Video.of(held)}
        return _ADAPTERS[kind].validate_python({**held, "seq": raw.seq, "kind": raw.kind, "data": raw.data})
    except (ValidationError, ValueError, TypeError, KeyError):
        raise AnswerError(
            200, f"the app tells of {raw.kind!r}, but not as this API does; is it a cosmos3 app?"
        ) from None
