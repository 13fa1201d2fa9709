"""The jobs that a runner has claimed: why one is stopped, and the renewal of their leases."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import StrEnum

from cluster.errors import ShuttingDown, StageFailed
from deployments.director.progress import JobProgress
from deployments.director.recorder import SavedStates
from deployments.errors import JobCancelled, JobsError, LeaseLost
from deployments.jobs.job import Job
from deployments.jobs.store import JobStore, Lease

logger = logging.getLogger("ray.serve")

RESTART_S = 30.0
"""About how long a restart of the app takes."""

# Renewals per lease while no job runs.
_RENEWALS_PER_LEASE = 4
# Lease periods after which a runner that cannot renew stops its jobs. Stopping sooner would cost work and gain nothing:
# if two runners have one job for a while, only one can record its end.
_PATIENCE_LEASES = 2
# Between two renewals while jobs run: this is how an owner's cancellation is noticed.
_CANCEL_POLL_S = 0.5


class StopReason(StrEnum):
    """Why a claimed job is stopped, as its caller reads it."""

    LOST = "it was deleted, or another runner has it"
    DATABASE_AWAY = "the database of jobs cannot be used"
    UNRECORDABLE = "nothing more about it can be recorded"
    STAGE_LOST = "a stage does not answer"
    GIVEN_BACK = "given back"
    SHUT_DOWN = "the app is being stopped"
    CALLER_LEFT = "its caller has left"
    CANCELLED = "cancelled by its owner"


@dataclass(eq=False)
class ClaimedJob:
    """A job that a runner has claimed and runs.

    Attributes:
        job: as claimed; its ``media_id`` is that of an earlier run.
        is_interruptible: whether stopping cancels the task; its begin and its end run to completion.
        fault: the error behind ``StopReason.UNRECORDABLE`` or ``STAGE_LOST``.
        media_id: of the file that this run writes; "" before.
        progress: of its pipeline, once that has begun.
    """

    job: Job
    task: asyncio.Task[None] | None = None
    claimed_s: float = field(default_factory=lambda: time.monotonic())
    is_interruptible: bool = False
    stop_reason: StopReason | None = None
    fault: JobsError | StageFailed | None = None
    saved_states: SavedStates | None = None
    media_id: str = ""
    progress: JobProgress | None = None

    def stop(self, reason: StopReason, fault: JobsError | StageFailed | None = None) -> None:
        """Stop it, unless it is being stopped already."""
        if self.stop_reason is None:
            self.stop_reason, self.fault = reason, fault
            if self.is_interruptible and self.task is not None:
                self.task.cancel()

    def give_up(self, error: JobsError) -> None:
        """Stop it because nothing about it can be recorded any more."""
        if isinstance(error, LeaseLost):
            self.stop(StopReason.LOST)
        else:
            self.stop(StopReason.UNRECORDABLE, error)

    @property
    def stop_error(self) -> Exception:
        """The error that the caller of a stopped job gets."""
        if self.stop_reason is StopReason.SHUT_DOWN:
            return ShuttingDown(RESTART_S)
        if self.stop_reason is StopReason.DATABASE_AWAY:
            return JobsError(f"{self.job.job_id}: {self.stop_reason}")
        if self.fault is not None:
            return self.fault
        return JobCancelled(self.job.job_id, self.stop_reason or "its pipeline ended without a result")


class LeaseKeeper:
    """Renews the leases of a runner's jobs, and stops the jobs that were lost or cancelled.

    Args:
        claimed: the runner's jobs by id; the runner adds and removes them.
        on_failure: called whenever the leases cannot be renewed.
    """

    def __init__(
        self,
        store: JobStore,
        runner_id: str,
        lease_s: float,
        claimed: Mapping[str, ClaimedJob],
        on_failure: Callable[[Exception], None],
    ) -> None:
        self._store, self._runner_id, self._lease_s, self._claimed = store, runner_id, lease_s, claimed
        self._on_failure = on_failure
        # How long a job keeps running while the database is away.
        self._patience_s = _PATIENCE_LEASES * lease_s
        # A thread of its own: renewals must not wait behind file writes.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="leases")

    async def renew_forever(self) -> None:
        """Renew the leases until this task is cancelled."""
        renewed_s = time.monotonic()
        while True:
            period_s = self._lease_s / _RENEWALS_PER_LEASE
            await asyncio.sleep(min(period_s, _CANCEL_POLL_S if self._claimed else self._lease_s))
            claimed = dict(self._claimed)
            start_s = time.monotonic()
            try:
                lost, cancelling = await self._renew(list(claimed.values()), renewed_s)
            except Exception as error:  # noqa: BLE001 - an error of the database: the runner reports it
                self._on_failure(error)
                self._give_up_expired(renewed_s)
                continue
            renewed_s = start_s
            for job_id in lost:
                claimed[job_id].stop(StopReason.LOST)
            for job_id in cancelling:
                claimed[job_id].stop(StopReason.CANCELLED)

    async def _renew(self, claimed: Sequence[ClaimedJob], renewed_s: float) -> tuple[set[str], set[str]]:
        """Return the ids of jobs that are lost, and of those that were cancelled.

        Waits for the database however long it takes, as another try would wait behind this one; stops jobs meanwhile.
        """
        leases = [Lease(each.job.job_id, each.job.lease) for each in claimed]
        loop = asyncio.get_running_loop()
        renewing = loop.run_in_executor(self._thread, self._store.renew, self._runner_id, leases, self._lease_s)
        wait_s = max(renewed_s + self._patience_s - time.monotonic(), _CANCEL_POLL_S)
        while not (await asyncio.wait({renewing}, timeout=wait_s))[0]:
            self._on_failure(TimeoutError())
            self._give_up_expired(renewed_s)
            wait_s = self._patience_s
        return renewing.result()

    def _give_up_expired(self, renewed_s: float) -> None:
        """Stop jobs that another runner may have taken over: they must not run twice for long."""
        for each in list(self._claimed.values()):
            if time.monotonic() - max(renewed_s, each.claimed_s) > self._patience_s:
                each.stop(StopReason.DATABASE_AWAY)
