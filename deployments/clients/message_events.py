"""What a Director tells whoever waits for a request -> the events of the HTTP API.

A follower of the job reads the same, but for those it is told of only here or only there: over handles nobody hears
that a job is begun, and chunks come as they are encoded.
"""

from __future__ import annotations

import base64
from typing import Any

from deployments.clients.events import RawEvent
from deployments.messages import (
    ChunkEncoded,
    Event,
    FileStarted,
    PreviewReady,
    PreviewsOff,
    QueuePosition,
    StageRetried,
    StepDone,
)


def raw_event(event: Event) -> RawEvent | None:
    """The event; None for one that is between stages. The last one, of the finished video, is not made here."""
    match event:
        case QueuePosition():
            return RawEvent(None, "queued", {"position": event.position, "eta_s": event.eta_s})
        case StepDone():
            told: dict[str, Any] = {"step": event.step, "num_steps": event.num_steps, "sigma": event.sigma}
            return RawEvent(None, "step", {**told, "step_s": event.seconds, "eta_s": None, "pid": event.pid})
        case PreviewReady():
            told = {"step": event.step, "sigma": event.sigma, "media_type": event.media_type}
            return RawEvent(None, "preview", {**told, "b64_json": base64.b64encode(event.data).decode()})
        case PreviewsOff():
            return RawEvent(None, "previews_off", {"reason": event.reason})
        case FileStarted():
            return RawEvent(None, "file", {"media_type": event.media_type})
        case ChunkEncoded():
            return RawEvent(None, "decoding", {"chunk": event.index, "num_frames": event.num_frames})
        case StageRetried():
            told = {"stage": event.stage, "attempt": event.attempt, "from_step": event.from_step}
            return RawEvent(None, "retried", told)
        case _:
            return None
