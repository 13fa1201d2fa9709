"""Which stages do not go on.

A stage is *late* when it has been silent for half of its deadline: /ready names it. It is *lost* when it has been
silent for twice its deadline: a process that hangs has been replaced by then, so there is none, and its jobs go back to
the queue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from cluster.events import Event, QueuePosition, StepDone
from deployments.config import AppConfig
from deployments.messages import (
    ChunkDecoded,
    ChunkEncoded,
    ClipEncoded,
    FileStarted,
    Finished,
    LatentsReady,
    PictureEncoded,
    SoundDecoded,
    StageFull,
    StageRetried,
    Tokenized,
)

# A stage is late after this share of its own deadline, and after so many times its longest pause before.
_LATE_SHARE, _LATE_FACTOR = 0.5, 10.0
# A stage is lost after this many times the silence that makes it late.
_LOST_FACTOR = 4.0
_TOKENIZE_S = 60.0


@dataclass(frozen=True)
class StageDeadlines:
    """Seconds that stages may be silent for: a hung one is replaced, or given up, after them.

    The first of each pair is for the first event in a stage.
    """

    tokenizer: tuple[float, float]
    transformer: tuple[float, float]
    video_vae: tuple[float, float]
    encoder: tuple[float, float]

    @classmethod
    def of(cls, config: AppConfig) -> StageDeadlines:
        """Return those of a configuration."""
        vae, transformer = config.vae, config.transformer
        tokenize_s = max(_TOKENIZE_S, config.guardrails.text_timeout_s)
        return cls(
            (tokenize_s, tokenize_s),
            (transformer.first_step_timeout_s, transformer.quantum_timeout_s),
            (vae.first_chunk_timeout_s, vae.chunk_timeout_s),
            (config.encoder.chunk_timeout_s, config.encoder.chunk_timeout_s),
        )


class JobProgress:
    """The stage that a running job is in, and since when nothing has come from it.

    Attributes:
        stage: "" if the job waits for others. The decoder of sound counts as VideoVAE.
        waits_for_file: its latents are done, and no encoder has begun its file.
        has_file: its file is being made.
    """

    _longest_s: float | None  # between two events of the stage; None before the second

    def __init__(self, *, has_picture: bool, clock: Callable[[], float] = time.monotonic) -> None:
        self._has_picture, self._clock = has_picture, clock
        self._num_decoded = self._num_encoded = 0
        self._enter("PromptTokenizer")

    def note(self, event: Event) -> None:
        """Note what a job's pipeline has yielded."""
        match event:
            case Tokenized():
                self._enter("VideoVAE" if self._has_picture else "Transformer")
            case PictureEncoded():
                self._enter("Transformer")
            case QueuePosition():
                # The first in the queue is the gang's next or running one; others wait for it.
                self._enter("Transformer" if event.position == 0 else "")
            case StepDone():
                self._stay("Transformer")
            case LatentsReady():
                self._enter("Mp4Encoder")
                self.waits_for_file = True
            case FileStarted():
                self._num_decoded = self._num_encoded = 0
                self._enter("VideoVAE")
                self.has_file = True
            case ChunkDecoded():
                self._num_decoded += 1
                self._stay(self._slower_of_both)
            case ChunkEncoded():
                self._num_encoded += 1
                self._stay(self._slower_of_both)
            case SoundDecoded():
                self._stay(self._slower_of_both)
            case ClipEncoded() | Finished():
                self._enter("")
            case StageRetried() | StageFull():
                self._since_s = self._clock()
            case _:
                pass

    @property
    def _slower_of_both(self) -> str:
        return "Mp4Encoder" if self._num_decoded > self._num_encoded else "VideoVAE"

    def _enter(self, stage: str) -> None:
        self.stage, self._since_s = stage, self._clock()
        self._longest_s = None
        self.waits_for_file = self.has_file = False

    def _stay(self, stage: str) -> None:
        now_s = self._clock()
        self._longest_s = max(self._longest_s or 0.0, now_s - self._since_s)
        self.stage, self._since_s = stage, now_s

    def silent_s(self, deadlines: StageDeadlines, factor: float = 1.0) -> float:
        """Return for how many seconds the stage has been silent, 0 if that is less than ``factor`` times late."""
        silent_s = self._clock() - self._since_s
        first_s, later_s = {
            "PromptTokenizer": deadlines.tokenizer,
            "Transformer": deadlines.transformer,
            "VideoVAE": deadlines.video_vae,
            "Mp4Encoder": deadlines.encoder,
        }.get(self.stage, (float("inf"), float("inf")))
        limit_s = _LATE_SHARE * first_s
        if self._longest_s is not None:
            limit_s = max(_LATE_SHARE * later_s, _LATE_FACTOR * self._longest_s)
        return silent_s if silent_s > factor * limit_s else 0.0


def find_late_stages(jobs: Iterable[JobProgress], deadlines: StageDeadlines) -> dict[str, float]:
    """Return the stages that none of the jobs in them gets an answer from -> the shortest silence, in seconds."""
    silent = _find_silent(jobs, deadlines)
    return {stage: min(job.silent_s(deadlines) for job in waiting) for stage, waiting in sorted(silent.items())}


def find_lost_jobs(jobs: Iterable[JobProgress], deadlines: StageDeadlines) -> list[JobProgress]:
    """Return the jobs in late stages from which no answer is to be expected any more."""
    return [job for waiting in _find_silent(jobs, deadlines, _LOST_FACTOR).values() for job in waiting]


def _find_silent(
    jobs: Iterable[JobProgress], deadlines: StageDeadlines, factor: float = 1.0
) -> dict[str, list[JobProgress]]:
    """Return the stages without an answer for any of their jobs -> those jobs."""
    jobs = list(jobs)
    is_file_made = any(job.has_file and not job.silent_s(deadlines, factor) for job in jobs)
    by_stage: dict[str, list[JobProgress]] = {}
    for job in jobs:
        if job.stage and not (job.waits_for_file and is_file_made):  # the encoders may be busy with other files
            by_stage.setdefault(job.stage, []).append(job)
    return {
        stage: waiting for stage, waiting in by_stage.items() if all(job.silent_s(deadlines, factor) for job in waiting)
    }
