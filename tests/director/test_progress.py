"""Stages that do not go on are named, and slow ones are not."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from cluster.events import Event, QueuePosition, StepDone
from deployments.director.progress import JobProgress, StageDeadlines, find_late_stages, find_lost_jobs
from deployments.messages import (
    ChunkDecoded,
    ChunkEncoded,
    ClipEncoded,
    FileStarted,
    LatentsReady,
    PictureEncoded,
    SoundDecoded,
    StageFull,
    StageRetried,
    Tokenized,
)

DEADLINES = StageDeadlines((60, 60), (300, 60), (600, 300), (300, 300))
TOKENIZED, PICTURE = Tokenized(1, 1, "none", 1), PictureEncoded(1.0, 1, 1)
LATENTS, FILE = LatentsReady(1.0, ("video",), 1, (2,)), FileStarted("a", "video/mp4", 1)
ENCODED = ClipEncoded("a", "", 1, 1, 1.0, 1)


def step(number: int) -> StepDone:
    return StepDone(number, 50, 0.5)


@dataclass
class Run:
    """A job on a clock of its own."""

    has_picture: bool = False
    now_s: float = 1000.0
    progress: JobProgress = field(init=False)

    def __post_init__(self) -> None:
        self.progress = JobProgress(has_picture=self.has_picture, clock=lambda: self.now_s)

    def note(self, *events: Event, every_s: float = 1.0) -> Run:
        for event in events:
            self.now_s += every_s
            self.progress.note(event)
        return self

    def late_after(self, seconds: float) -> dict[str, float]:
        self.now_s += seconds
        return find_late_stages([self.progress], DEADLINES)

    def find_lost_after(self, seconds: float) -> list[str]:
        self.now_s += seconds
        return [job.stage for job in find_lost_jobs([self.progress], DEADLINES)]


@pytest.mark.parametrize(
    ("events", "limit_s", "stage"),
    [
        ([], 30, "PromptTokenizer"),
        ([TOKENIZED], 150, "Transformer"),
        ([TOKENIZED, QueuePosition(0)], 150, "Transformer"),
        ([TOKENIZED, QueuePosition(2), QueuePosition(0)], 150, "Transformer"),
        ([TOKENIZED, step(1)], 30, "Transformer"),
        ([TOKENIZED, QueuePosition(2), step(1)], 30, "Transformer"),
        ([TOKENIZED, step(1), LATENTS], 150, "Mp4Encoder"),
        ([TOKENIZED, step(1), LATENTS, FILE], 300, "VideoVAE"),
        ([TOKENIZED, LATENTS, FILE, ChunkDecoded(0, 0.0, 1)], 150, "Mp4Encoder"),
        ([TOKENIZED, LATENTS, FILE, ChunkDecoded(0, 0.0, 1), ChunkEncoded(0, 1)], 150, "VideoVAE"),
        ([TOKENIZED, step(1), StageRetried("denoise", 2)], 30, "Transformer"),
    ],
)
def test_a_stage_is_late_after_half_of_its_deadline(events: list[Event], limit_s: float, stage: str) -> None:
    assert Run().note(*events).late_after(limit_s - 0.5) == {}
    assert Run().note(*events).late_after(limit_s + 0.5) == {stage: limit_s + 0.5}
    assert Run().note(*events).find_lost_after(4 * limit_s - 0.5) == []
    assert Run().note(*events).find_lost_after(4 * limit_s + 0.5) == [stage]


@pytest.mark.parametrize("events", [[TOKENIZED, QueuePosition(3)], [TOKENIZED, LATENTS, FILE, ENCODED]])
def test_a_job_that_waits_for_others_or_is_done_names_no_stage(events: list[Event]) -> None:
    assert Run().note(*events).late_after(1e6) == {}


def test_a_picture_is_encoded_before_the_first_step() -> None:
    assert Run(has_picture=True).note(TOKENIZED).late_after(301) == {"VideoVAE": 301}
    assert Run(has_picture=True).note(TOKENIZED, PICTURE).late_after(151) == {"Transformer": 151}


def test_a_slow_stage_is_not_late() -> None:
    """Steps of 100 s: ten times as long without one is."""
    run = Run().note(TOKENIZED, step(1), every_s=100.0)
    assert run.late_after(900.0) == {}
    assert run.late_after(200.0) == {"Transformer": 1100.0}


def test_one_job_that_goes_on_clears_the_stage() -> None:
    silent, going = Run().note(TOKENIZED, step(1)), Run().note(TOKENIZED, step(1))
    silent.now_s += 40
    assert find_late_stages([silent.progress, going.progress], DEADLINES) == {}
    going.now_s += 50
    assert find_late_stages([silent.progress, going.progress], DEADLINES) == {"Transformer": 40.0}


def test_an_encoder_that_begins_anew_counts_from_there() -> None:
    run = Run().note(TOKENIZED, LATENTS, FILE, ChunkDecoded(0, 0.0, 1), FILE)
    assert run.late_after(301) == {"VideoVAE": 301}


def test_a_stage_that_is_full_is_not_late() -> None:
    run = Run().note(TOKENIZED, LATENTS)
    for _ in range(20):
        assert run.late_after(100) == {}
        run.note(StageFull("encode"))


def test_sound_is_progress() -> None:
    run = Run().note(TOKENIZED, LATENTS, FILE)
    for index in range(20):
        assert run.late_after(100) == {}
        run.note(SoundDecoded(index, 0.0, 1))


def test_jobs_that_wait_while_the_encoders_make_other_files_are_not_late() -> None:
    waiting, running = Run().note(TOKENIZED, LATENTS), Run().note(TOKENIZED, LATENTS, FILE)
    waiting.now_s += 200
    running.now_s += 200
    both = [waiting.progress, running.progress]
    assert find_late_stages(both, DEADLINES) == {}
    running.now_s += 200
    assert find_late_stages(both, DEADLINES) == {"Mp4Encoder": 200, "VideoVAE": 400}
    running.note(ChunkDecoded(0, 0.0, 1), ChunkEncoded(0, 1))
    assert find_late_stages(both, DEADLINES) == {}
    waiting.now_s += 1000
    running.now_s += 1
    assert find_lost_jobs(both, DEADLINES) == []
    running.note(ENCODED)
    assert find_late_stages(both, DEADLINES) == {"Mp4Encoder": 1200}
    assert find_lost_jobs(both, DEADLINES) == [waiting.progress]
