"""SavedStates: the denoising states that a running job saves, so that another runner can resume it."""

from __future__ import annotations

import asyncio
import logging
import time

import numpy as np

from cluster.envelope import TensorEnvelope
from cosmos3_core.errors import MediaError
from deployments.media.job_files import JobFiles
from deployments.threads import run_in_thread, start_task

logger = logging.getLogger("ray.serve")

SAVED_STATE = "checkpoint"
"""Name of a job's saved state among its files."""

# Longest wait for a write: the disk or the archive may hang.
_SETTLE_S = 60.0


class SavedStates:
    """The saved states of one job, written one at a time in the background, at least ``period_s`` apart."""

    def __init__(self, files: JobFiles, job_id: str, period_s: float) -> None:
        self._files, self._job_id, self._period_s = files, job_id, period_s
        self._written_s = time.monotonic()
        self._last: tuple[int, TensorEnvelope] | None = None
        self._written_step = 0
        self._writing: asyncio.Task[None] | None = None
        # The job has ended: remove the state that is still being written.
        self._is_too_late = False

    def offer(self, step: int, state: TensorEnvelope) -> None:
        """Save a state, if it is time for one."""
        self._last = step, state
        if self._writing is None and time.monotonic() - self._written_s >= self._period_s:
            self._begin_writing(step, state)

    def read(self) -> TensorEnvelope | None:
        """Return the last saved state; None if there is none or it is damaged: the job starts from the beginning."""
        try:
            if not self._files.exists(self._job_id, SAVED_STATE):
                return None
            return TensorEnvelope.of_array(np.frombuffer(self._files.get(self._job_id, SAVED_STATE), np.uint8))
        except MediaError:
            logger.exception("the saved state of %s cannot be used; it starts from the beginning", self._job_id)
            return None

    async def settle(self) -> None:
        """Wait for the state that is being written: its file must not appear after the job's files were removed.

        A state that takes longer than a minute is removed as soon as it is written.
        """
        if self._writing is None:
            return
        try:
            async with asyncio.timeout(_SETTLE_S):
                await asyncio.shield(self._writing)
        except TimeoutError:
            self._is_too_late = True
            logger.error("the state of %s is not saved after %g s", self._job_id, _SETTLE_S)

    async def write_last(self) -> None:
        """Save the newest state now: the next runner resumes the job from it."""
        await self.settle()
        if self._last is not None and self._writing is None and self._last[0] > self._written_step:
            self._begin_writing(*self._last)
            await self.settle()

    def _begin_writing(self, step: int, state: TensorEnvelope) -> None:
        self._writing = start_task(self._write(step, state))

    async def _write(self, step: int, state: TensorEnvelope) -> None:
        try:
            await run_in_thread(self._files.put, self._job_id, SAVED_STATE, state.data.data)
            self._written_s, self._written_step = time.monotonic(), step
            if self._is_too_late:
                await run_in_thread(self._files.remove, self._job_id, SAVED_STATE)
        except MediaError:  # the job goes on; if its runner dies, it resumes from an earlier state
            logger.exception("the state of %s could not be saved, or not removed again", self._job_id)
        finally:
            self._writing = None
