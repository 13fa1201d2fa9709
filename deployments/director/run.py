"""A claimed job in its runner's hands, and why it is stopped."""

from __future__ import annotations

import asyncio
import logging
import time
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.errors import ShuttingDown
from deployments.director.saved_states import SavedStates
from deployments.errors import JobCancelled, JobsError, LeaseLost
from deployments.jobs.job import Job

logger = logging.getLogger("ray.serve")

RESTART_S = 30.0
"""What a restart of the app takes, about."""


class Stop(StrEnum):
    """Why a run is stopped, in words that its caller may read."""

    LOST = "it was deleted, or another runner has it"
    AWAY = "the database of jobs cannot be used"
    GIVEN_BACK = "given back"
    SHUT_DOWN = "the app is being stopped"
    LEFT = "its caller has left"
    CANCELLED = "cancelled by its owner"


@dataclass(eq=False)
class Run:
    """See the module.

    Attributes:
        job: as it was claimed; its ``media_id`` is of the file that an earlier run has begun.
        task: that runs it.
        begun_s: by the monotonic clock.
        is_walking: whether it may be interrupted: its begin and its end may not.
        stopped: why, from outside; None while it goes on by itself.
        trouble: what kept it from being written down, if anything did.
        checkpoints: of its states.
        media_id: of the file that this run has begun; "" before.
    """

    job: Job
    task: asyncio.Task[None] | None = None
    begun_s: float = field(default_factory=time.monotonic)
    is_walking: bool = False
    stopped: Stop | None = None
    trouble: JobsError | None = None
    checkpoints: SavedStates | None = None
    media_id: str = ""

    def stop(self, reason: Stop, trouble: JobsError | None = None) -> None:
        """Stop it, unless it is being stopped already, or at its end."""
        if self.stopped is None:
            self.stopped, self.trouble = reason, trouble
            if self.is_walking and self.task is not None:
                self.task.cancel()

    def cannot_be_written(self, error: JobsError) -> None:
        """Stop it: nothing can be written down of it any more."""
        if isinstance(error, LeaseLost):
            self.stop(Stop.LOST)
        else:
            logger.error("%s is given up: %s", self.job.job_id, error)
            self.stop(Stop.AWAY, error)

    @property
    def is_out_of_hand(self) -> bool:
        """Whether nothing can be written down of it any more."""
        return self.stopped in (Stop.LOST, Stop.AWAY)

    def why(self) -> Exception:
        """What the caller of a job that was stopped is told."""
        if self.stopped is Stop.SHUT_DOWN:
            return ShuttingDown(RESTART_S)
        if self.stopped is Stop.AWAY:
            return JobsError(f"{self.job.job_id} was given up: {self.trouble or self.stopped}")
        return JobCancelled(self.job.job_id, self.stopped or "its pipeline ended without a result")
