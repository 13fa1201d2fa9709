"""Persist a running job: its progress and events in the database, its denoising states among its files."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from cluster.envelope import TensorEnvelope
from cluster.events import Event, PreviewsOff, QueuePosition, StepDone
from cosmos3_core.errors import MediaError
from deployments.config import JobsConfig
from deployments.errors import IllegalTransition, JobsError, LeaseLost, TooManyEvents
from deployments.jobs.events import event_as_json
from deployments.jobs.job import Job, Outcome, Progress
from deployments.jobs.queue import Fault
from deployments.jobs.store import JobStore, Lease
from deployments.media.job_files import JobFiles
from deployments.messages import FileStarted, Finished, LatentsReady, PictureEncoded, Tokenized, round_seconds
from deployments.threads import run_in_thread, start_task

logger = logging.getLogger("ray.serve")

SAVED_STATE = "checkpoint"
"""Name of a job's saved state among its files."""

# Between two writes: bounds the lag of followers and the load of the database.
_PAUSE_S = 0.05
_PAUSE_WITHOUT_FOLLOWERS_S = 1.0
# Between two tries while the database is away.
_TRY_PAUSE_S = 1.0
# Weight of the newest interval in the moving average that the remaining time is computed from.
_NEWEST_SHARE = 0.2
# Longest wait for the write of a state: the disk or the archive may hang.
_WRITE_S = 60.0

# Event -> the job's stage from then on.
_STAGES: Mapping[type[Event], str] = {
    Tokenized: "tokenized",
    PictureEncoded: "conditioned",
    QueuePosition: "waiting for a gang",
    LatentsReady: "decoding",
}


class Recorder:
    """Writes the progress and events of one claimed job, within one event loop.

    A small request makes a hundred steps a second: events that come during one write go with the next. Only the job's
    end waits for the writes before it.

    Args:
        on_lost: called once, with the reason, when nothing more can be written: the runner must stop the job. While the
            database is away, what is to be written waits.
    """

    def __init__(self, store: JobStore, job: Job, on_lost: Callable[[JobsError], None]) -> None:
        self._store = store
        self._job, self._lease = job, Lease(job.job_id, job.lease)
        # The caller of an attached job gets its events directly.
        self._has_followers = job.attached_to is None
        self._on_lost = on_lost
        self._progress = Progress()
        self._events: list[tuple[str, Mapping[str, Any]]] = []
        self._step_at_s: float | None = None
        self._interval_s: float | None = None
        self._writing: asyncio.Task[None] | None = None
        self._is_ending = False
        self._hurry = asyncio.Event()
        self._failure: JobsError | None = None

    def note(self, event: Event) -> None:
        """Note an event, to be written soon."""
        progress: dict[str, Any] = {}
        match event:
            case StepDone():
                progress = {"stage": "denoising", "step": event.step, "sigma": event.sigma, "step_s": event.step_s}
                event = replace(event, step_s=round(event.step_s or 0.0, 6), eta_s=self._eta_s(event))
            case PreviewsOff():
                # The reason is internal, and in the log.
                event = replace(event, reason="there are no previews, or no more")
            case FileStarted():
                progress = {"media_id": event.media_id}
            case _ if type(event) in _STAGES:
                progress = {"stage": _STAGES[type(event)]}
            case _:
                pass
        is_history = bool(event.kind) and not isinstance(event, QueuePosition)
        if is_history or progress:
            self._add(event if is_history else None, progress)

    async def end(self, outcome: Outcome, *, keep_media_s: float) -> Job:
        """Write the job's end after all noted events; return the ended job.

        Raise LeaseLost if the job is no longer this runner's.
        """
        await self._finish_writes()
        retrier = Retrier()
        try:
            ended: Job = await retrier.run(lambda: self._store.finish(self._lease, outcome, keep_media_s=keep_media_s))
        except LeaseLost:
            # A try that seemed to fail may have succeeded, and only its answer was lost.
            found = await retrier.run(lambda: self._store.get(self._job.job_id)) if retrier.num_failed else None
            own_end = outcome.state, self._job.runner, self._job.attempts
            if found is None or (found.state, found.runner, found.attempts) != own_end:
                raise
            return found
        return ended

    async def postpone(self, fault: Fault, config: JobsConfig) -> Job:
        """Put the job back after a fault, after all noted events; return it, which has ended if it must not wait.

        Raise LeaseLost if the job is no longer this runner's.
        """
        await self._finish_writes()
        job: Job = await Retrier().run(lambda: self._store.postpone(self._lease, fault, config))
        return job

    async def _finish_writes(self) -> None:
        self._is_ending = True
        self._hurry.set()
        if self._writing is not None:
            await asyncio.shield(self._writing)
        await self._write()
        if isinstance(self._failure, LeaseLost):
            raise self._failure

    def _add(self, event: Event | None, progress: Mapping[str, Any]) -> None:
        if event is not None and self._has_followers:
            self._events.append((event.kind, event_as_json(event)))
        self._progress = replace(self._progress, **progress)
        if "media_id" in progress:  # clients may request the job's file now
            self._hurry.set()
        if self._writing is None and self._failure is None:
            self._writing = start_task(self._write_soon())

    def _eta_s(self, event: StepDone) -> float | None:
        """Return the seconds until the last step, from the pace of the last ones, other requests' turns included."""
        now_s = time.monotonic()
        if self._step_at_s is not None:
            interval_s = now_s - self._step_at_s
            if self._interval_s is not None:
                interval_s = _NEWEST_SHARE * interval_s + (1 - _NEWEST_SHARE) * self._interval_s
            self._interval_s = interval_s
        self._step_at_s = now_s
        pace_s = self._interval_s if self._interval_s is not None else event.step_s or 0.0
        return round((event.num_steps - event.step) * pace_s, 3)

    async def _write_soon(self) -> None:
        try:
            while self._failure is None and (self._events or self._progress != Progress()):
                self._hurry.clear()
                await self._write()
                if self._is_ending:
                    break
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_PAUSE_S if self._has_followers else _PAUSE_WITHOUT_FOLLOWERS_S):
                        await self._hurry.wait()
        finally:
            self._writing = None

    async def _write(self) -> None:
        progress, events = self._progress, self._events
        if self._failure is not None or not (events or progress != Progress()):
            return
        self._progress, self._events = Progress(), []
        try:
            await Retrier().run(lambda: self._store.record(self._lease, progress, events))
        except JobsError as error:
            self._failure = error
            self._on_lost(error)


class Retrier:
    """Repeats writes while the database is away, for as long as it takes; ``num_failed`` tries have failed."""

    def __init__(self) -> None:
        self.num_failed = 0

    async def run(self, write: Callable[[], Any]) -> Any:
        """Run ``write`` until it succeeds, and return its result; raise what another try would not change."""
        while True:
            try:
                return await run_in_thread(write)
            except (LeaseLost, IllegalTransition, TooManyEvents):
                raise
            except JobsError:
                self.num_failed += 1
            await asyncio.sleep(_TRY_PAUSE_S)


class SavedStates:
    """The saved states of one job, written one at a time in the background, at least ``period_s`` apart."""

    def __init__(self, files: JobFiles, job_id: str, period_s: float) -> None:
        self._files, self._job_id, self._period_s = files, job_id, period_s
        self._written_s = time.monotonic()
        self._last: tuple[int, TensorEnvelope] | None = None
        self._written_step = 0
        self._writing: asyncio.Task[None] | None = None
        # The job has ended: remove the state that is still being written.
        self._must_remove = False

    def save_if_due(self, step: int, state: TensorEnvelope) -> None:
        """Save a state, if it is time for one."""
        self._last = step, state
        if self._writing is None and time.monotonic() - self._written_s >= self._period_s:
            self._writing = start_task(self._write(step, state))

    def read(self) -> TensorEnvelope | None:
        """Return the last saved state; None if there is none or it is damaged: the job starts from the beginning.

        Raise MediaError if files cannot be read at all just now.
        """
        try:
            if not self._files.exists(self._job_id, SAVED_STATE):
                return None
            return TensorEnvelope.of_array(np.frombuffer(self._files.get(self._job_id, SAVED_STATE), np.uint8))
        except MediaError as error:
            if isinstance(error.__cause__, OSError):
                raise
            logger.exception("the saved state of %s cannot be used; it starts from the beginning", self._job_id)
            return None

    async def finish_write(self) -> None:
        """Wait for the state that is being written: its file must not appear after the job's files were removed.

        A state that takes longer than a minute is removed as soon as it is written.
        """
        if self._writing is None:
            return
        try:
            async with asyncio.timeout(_WRITE_S):
                await asyncio.shield(self._writing)
        except TimeoutError:
            self._must_remove = True
            logger.error("the state of %s is not saved after %g s", self._job_id, _WRITE_S)

    async def write_last(self) -> None:
        """Save the newest state now: the next runner resumes the job from it."""
        await self.finish_write()
        if self._last is not None and self._writing is None and self._last[0] > self._written_step:
            self._writing = start_task(self._write(*self._last))
            await self.finish_write()

    async def _write(self, step: int, state: TensorEnvelope) -> None:
        try:
            await run_in_thread(self._files.put, self._job_id, SAVED_STATE, state.data.data)
            self._written_s, self._written_step = time.monotonic(), step
            if self._must_remove:
                await run_in_thread(self._files.remove, self._job_id, SAVED_STATE)
        except MediaError:  # the job goes on; if its runner dies, it resumes from an earlier state
            logger.exception("the state of %s could not be saved, or not removed again", self._job_id)
        finally:
            self._writing = None


def result_of(finished: Finished) -> dict[str, Any]:
    """Return a finished request's JSON values for :attr:`deployments.jobs.job.Job.result`."""
    stage_durations = round_seconds(finished.stage_seconds)
    same = ("media_type", "num_bytes", "num_frames", "fps", "height", "width", "seed", "frames_sha256")
    return {
        **{name: getattr(finished, name) for name in same},
        "notes": list(finished.notes),
        "negative_prompt_origin": finished.negative_origin,
        "stage_durations": stage_durations,
        "inference_time_s": stage_durations["total"],
        "actions": None if finished.actions is None else finished.actions.as_json(),
    }
