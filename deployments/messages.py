"""Messages between the stages: frozen values. Tensors travel as ``cluster.envelope.TensorEnvelope``."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cluster.envelope import TensorEnvelope
from cluster.errors import DeadlineExceeded
from cluster.events import Event, internal
from cosmos3_core.actions import GeneratedActions
from cosmos3_core.media.pixels import Frames


@dataclass(frozen=True)
class RequestContext:
    """Ids and deadline of one run; the first argument of every stage method.

    Attributes:
        request_id: the caller's name for the request, in every stage's logs. Callers may use one twice.
        job_id: our own, unique name for it.
        run_id: names this run of the job; another run begins when the Director of this one dies.
        deadline_s: by this process' ``time.monotonic``; it travels as seconds that are left, as nodes' clocks differ.
        limit_s: seconds it had in all, for messages.
        attempt: number of this attempt of the stage, from 1.
    """

    request_id: str
    job_id: str
    run_id: str
    deadline_s: float
    limit_s: float
    attempt: int = 1

    @classmethod
    def new(cls, request_id: str | None, limit_s: float, job_id: str = "") -> RequestContext:
        """Return the context of a run that begins now; a request without an id gets one."""
        run_id = uuid.uuid4().hex
        return cls(request_id or run_id, job_id or run_id, run_id, time.monotonic() + limit_s, limit_s)

    @property
    def try_id(self) -> str:
        """Unique name of this attempt of a stage."""
        return f"{self.run_id}/{self.attempt}"

    def remaining_s(self, stage: str) -> float:
        """Return the seconds that are left; raise DeadlineExceeded, which names ``stage``, if there are none."""
        left = self.deadline_s - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(stage, self.limit_s)
        return left

    def next_attempt(self) -> RequestContext:
        """Return the context of the next attempt."""
        return replace(self, attempt=self.attempt + 1)

    def __reduce__(self) -> tuple[Any, ...]:
        left_s = self.deadline_s - time.monotonic()
        return _unpickle, (self.request_id, self.job_id, self.run_id, left_s, self.limit_s, self.attempt)


def _unpickle(request_id: str, job_id: str, run_id: str, left_s: float, limit_s: float, attempt: int) -> RequestContext:
    return RequestContext(request_id, job_id, run_id, time.monotonic() + left_s, limit_s, attempt)


@dataclass(frozen=True)
class TokenizedPair:
    """Token ids of the conditional and the unconditional prompt.

    ``negative_origin`` is "given", "empty", "checkpoint" or "built-in".
    """

    text_ids: tuple[int, ...]
    negative_text_ids: tuple[int, ...]
    negative_origin: str
    pid: int


@dataclass(frozen=True)
class SoundChunk:
    """Decoded samples, float32 [channels, n] in [-1, 1], on their way from audio VAE to encoder, by reference."""

    index: int
    samples: TensorEnvelope
    pid: int


@dataclass(frozen=True)
class FrameChunk:
    """Decoded frames on their way from the VAE to the encoder, by reference.

    Attributes:
        strips: one from each rank of the VAE's gang, uint8 RGB [F, Y, X, 3].
        axis: along which the strips lie side by side, 1 (rows) or 2 (columns).
    """

    index: int
    strips: tuple[TensorEnvelope, ...]
    axis: int
    pid: int

    def frames(self) -> Frames:
        """Return uint8 RGB [F, Y, X, 3]; a single strip is not copied."""
        arrays = [strip.array() for strip in self.strips]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays, self.axis)


@dataclass(frozen=True)
class TextChecked:
    """The guardrail passed a prompt."""

    pid: int


@dataclass(frozen=True)
class FramesChecked:
    """The guardrail passed the chunk of frames that is the item before."""

    index: int
    pid: int


# Events of a request, in order, with those of :mod:`cluster.events`. ``pid`` is of the process that an event is about.


@dataclass(frozen=True)
class Accepted(Event):
    """The request was checked and is queued as ``job_id``. ``notes`` name changes to it, such as of the clip length."""

    request_id: str
    job_id: str
    num_steps: int
    num_frames: int
    seed: int
    notes: tuple[str, ...]
    pid: int


@dataclass(frozen=True)
class Tokenized(Event):
    """The prompts are tokenized; ``negative_origin`` is that of :class:`TokenizedPair`."""

    num_text_tokens: int
    num_negative_tokens: int
    negative_origin: str
    pid: int


@dataclass(frozen=True)
class StateSaved(Event):
    """The denoising state after ``step`` steps is saved; if the gang dies, another one resumes there.

    Between stages the next item of the stream is the state's envelope. ``pid`` is the leader's.
    """

    step: int
    num_bytes: int
    pid: int


@dataclass(frozen=True)
class PictureEncoded(Event):
    """The given image or clip is encoded. Between stages the next item of the stream is the latents' envelope."""

    seconds: float
    num_latent_frames: int
    pid: int


@dataclass(frozen=True)
class LatentsReady(Event):
    """Denoising is done. Between stages the next items of the stream are the latents' envelopes, one a modality.

    ``pid`` is the leader's, ``rank_pids`` the ranks'.
    """

    seconds: float
    modalities: tuple[str, ...]
    pid: int
    rank_pids: tuple[int, ...]


@dataclass(frozen=True)
class FileStarted(Event):
    """An encoder has begun the clip's file, which grows in the media store and can be read over HTTP.

    If the encoder dies, its file is lost and the event comes again with another id.
    """

    KIND = "file"
    media_id: str = internal("")
    media_type: str = ""
    pid: int = internal(0)


@dataclass(frozen=True)
class ChunkDecoded(Event):
    """The VAE's gang made the chunk of frames that is the item before; ``pid`` is the leader's."""

    index: int
    at_s: float
    pid: int


@dataclass(frozen=True)
class SoundDecoded(Event):
    """The audio VAE made the chunk of samples that is the item before."""

    index: int
    at_s: float
    pid: int


@dataclass(frozen=True)
class ChunkEncoded(Event):
    """Chunk ``chunk`` of the frames is in the file. The gang's rank ``decoded_by`` and its neighbours made it."""

    KIND = "decoding"
    chunk: int
    num_frames: int
    decoded_by: int = internal(0)
    at_s: float = internal(0.0)
    pid: int = internal(0)


@dataclass(frozen=True)
class StageRetried(Event):
    """A stage failed and is tried again; denoising resumes after ``from_step`` steps."""

    KIND = "retried"
    stage: str
    attempt: int | None = None
    reason: str = internal("")
    from_step: int = 0


@dataclass(frozen=True)
class StageFull(Event):
    """A stage is full; the request waits for a place in it."""

    stage: str


@dataclass(frozen=True)
class ClipEncoded(Event):
    """The file is complete."""

    media_id: str
    frames_sha256: str
    num_frames: int
    num_bytes: int
    seconds: float
    pid: int


@dataclass(frozen=True)
class Finished(Event):
    """The request is done.

    Attributes:
        media_id, media_type, num_bytes: of its file; "", "" and 0 without one.
        stage_seconds: of tokenize, condition (a given image or clip), denoise, decode_encode (side by side), encode
            (from the encoder's side), total.
    """

    request_id: str
    job_id: str
    mode: str
    media_id: str
    media_type: str
    num_bytes: int
    num_frames: int
    fps: float
    height: int
    width: int
    seed: int
    frames_sha256: str
    negative_origin: str
    notes: tuple[str, ...]
    stage_seconds: dict[str, float]
    actions: GeneratedActions | None = None


@dataclass(frozen=True)
class Generated:
    """A finished request as ``generate`` returns it. ``media`` is empty if there is no file."""

    media: bytes
    info: Finished


def round_seconds(stage_seconds: Mapping[str, float]) -> dict[str, float]:
    """Round stage -> seconds for an answer."""
    return {name: round(seconds, 4) for name, seconds in stage_seconds.items()}
