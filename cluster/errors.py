"""Errors between processes.

    Cosmos3Error
    └── ClusterError
        ├── GangFailed        a rank of a gang died, hung or failed; the gang is rebuilt, the request may be retried
        │   └── GangLost      the same, for a request that the gang was not working on
        ├── OutOfMemory       a request does not fit into a device's memory; not tried again
        ├── StepAbandoned          a step was left between two layers; the state before it is valid
        ├── PreviewFailed     a preview could not be made; the request continues without previews
        ├── StreamClosed      the other end of a clip's stream gave up
        ├── OverloadedError   a bound was reached; try again later
        ├── ShuttingDown      the app finishes what it has and takes no more
        ├── DeadlineExceeded  the request took longer than it may
        ├── StageFailed       a stage failed for good: its attempts are used up
        └── AppNotFound       no app runs at the place that was given

All of them cross process boundaries whole: their arguments are all they hold.
"""

from __future__ import annotations

from cosmos3_core.errors import Cosmos3Error


class ClusterError(Cosmos3Error):
    """Root of the errors between processes."""


class GangFailed(ClusterError):
    """A gang of ranks failed as a whole.

    Args:
        phase: what it was doing: "place", "start", "meet", "load", "warm up" or "idle"; transformers also "begin" and
            "step", VAEs "decode", "encode" and "previews"; "call" is the leader's own bug.
        reason: what happened.
        rank: the rank that failed; None if unknown, or no rank did.
    """

    def __init__(self, phase: str, reason: str, rank: int | None = None) -> None:
        self.phase, self.reason, self.rank = phase, reason, rank
        super().__init__(phase, reason, rank)

    def __str__(self) -> str:
        where = "" if self.rank is None else f", rank {self.rank}"
        return f"the gang failed during {self.phase!r}{where}: {self.reason}"


class GangLost(GangFailed):
    """A gang failed while it worked on another request; retrying this one does not count as an attempt."""

    @classmethod
    def of(cls, failure: GangFailed) -> GangLost:
        """Return a failure as the other requests see it."""
        return cls(failure.phase, failure.reason, failure.rank)


class OutOfMemory(ClusterError):
    """A request needs more memory than a device has left; ``what`` is the allocator's message."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(what)

    def __str__(self) -> str:
        return f"the request does not fit into a device's memory; ask for fewer frames or a smaller size: {self.what}"


class StepAbandoned(ClusterError):
    """A denoising step was left before its layer number ``layer``, counted over all its forward passes."""

    def __init__(self, layer: int) -> None:
        self.layer = layer
        super().__init__(layer)

    def __str__(self) -> str:
        return f"the step was left before layer {self.layer}"


class PreviewFailed(ClusterError):
    """A request continues without previews."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(reason)

    def __str__(self) -> str:
        return f"no previews: {self.reason}"


class StreamClosed(ClusterError):
    """A clip's stream was closed before its end."""

    def __init__(self, stream_id: str, reason: str) -> None:
        self.stream_id, self.reason = stream_id, reason
        super().__init__(stream_id, reason)

    def __str__(self) -> str:
        return f"the stream {self.stream_id} was closed: {self.reason}"


class OverloadedError(ClusterError):
    """The bound ``what`` of a queue is reached; a place is likely to be free in ``retry_after_s``."""

    def __init__(self, what: str, limit: int, retry_after_s: float) -> None:
        self.what, self.limit, self.retry_after_s = what, limit, retry_after_s
        super().__init__(what, limit, retry_after_s)

    def __str__(self) -> str:
        return f"{self.what}: all {self.limit} places are taken; try again in {self.retry_after_s:.0f} s"


class ShuttingDown(ClusterError):
    """The app is being stopped: it finishes its requests and takes no more. Another may run in ``retry_after_s``."""

    def __init__(self, retry_after_s: float) -> None:
        self.retry_after_s = retry_after_s
        super().__init__(retry_after_s)

    def __str__(self) -> str:
        return f"the app is being stopped and takes no new request; try again in {self.retry_after_s:.0f} s"


class DeadlineExceeded(ClusterError):
    """A request ran past its deadline of ``limit_s`` seconds; it was in ``stage``."""

    def __init__(self, stage: str, limit_s: float) -> None:
        self.stage, self.limit_s = stage, limit_s
        super().__init__(stage, limit_s)

    def __str__(self) -> str:
        return f"the request was not done within {self.limit_s:.0f} s; it was in the stage {self.stage!r}"


class StageFailed(ClusterError):
    """A stage has used up its ``attempts``; ``reason`` is the last failure."""

    def __init__(self, stage: str, attempts: int, reason: str) -> None:
        self.stage, self.attempts, self.reason = stage, attempts, reason
        super().__init__(stage, attempts, reason)

    def __str__(self) -> str:
        return f"the stage {self.stage!r} failed {self.attempts} times; last: {self.reason}"


class AppNotFound(ClusterError):
    """No app runs at the given place; the message says what to do."""
