"""What a runner is told: how it works, and how a job is walked through the stages."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

from cluster.envelope import TensorEnvelope
from cosmos3_core.request import ResolvedRequest
from deployments.jobs.job import Job, Lane
from deployments.jobs.store import QueueLimits
from deployments.messages import Event, RequestContext


class RunsRequest(Protocol):
    """A request on its way through the stages, as :class:`deployments.director.pipeline.Pipeline` is."""

    def events(self) -> AsyncIterator[Event]:
        """Every event, the last one :class:`Finished`."""
        ...


class MakePipeline(Protocol):
    """Makes a job's pipeline.

    Args:
        request: with every field decided.
        context: of this run.
        job: as it was claimed.
        begin_from: state to go on from, if any.
        on_saved: takes states that are to be kept.
    """

    def __call__(
        self,
        request: ResolvedRequest,
        context: RequestContext,
        job: Job,
        begin_from: TensorEnvelope | None,
        on_saved: Callable[[int, TensorEnvelope], None],
    ) -> RunsRequest: ...


class DescribeFailure(Protocol):
    """An error -> its code and message, as a caller may read them."""

    def __call__(self, error: BaseException) -> tuple[str, str]: ...


@dataclass(frozen=True)
class RunnerSpec:
    """How a runner works.

    Attributes:
        model: name of the served model; jobs of others are left to others.
        max_running: per lane.
        limits: of the queue.
        run_timeout_s: of a job that nobody waits for.
        lease_s: a runner that is silent for so long has died.
        max_attempts: runners that a job may have.
        checkpoint_period_s: between two states that a job leaves in the media store.
        poll_s: between two looks for jobs that others accepted.
        keep_media_s: how long files of jobs stay.
    """

    model: str
    max_running: Mapping[Lane, int]
    limits: QueueLimits
    run_timeout_s: float
    lease_s: float
    max_attempts: int
    checkpoint_period_s: float
    poll_s: float
    keep_media_s: float
