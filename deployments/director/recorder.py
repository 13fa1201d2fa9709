"""What a running job tells, written down: its progress, and the events that others follow.

Steps of a small request come a hundred a second: what comes while one writing is under way goes with the next. Nobody
waits for it but the end, which comes when everything before it is in the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from cluster.events import Event, PreviewsOff, QueuePosition, StepDone
from deployments.errors import IllegalTransition, JobsError, LeaseLost
from deployments.jobs.events import event_as_json
from deployments.jobs.job import Job, Outcome, Progress
from deployments.jobs.store import JobStore, Lease
from deployments.messages import FileStarted, Finished, LatentsReady, PictureEncoded, Tokenized
from deployments.threads import run_in_thread

# Between two writings: what a follower is behind, and what a database has to bear.
_PAUSE_S = 0.05
_PAUSE_WITHOUT_FOLLOWERS_S = 1.0
# Between two tries where a database is away for a moment.
_TRY_PAUSE_S = 1.0
# Of the newest interval in the average that the time left is reckoned from.
_NEWEST_SHARE = 0.2


# Event -> what the job is in from then on.
_STAGES: Mapping[type[Event], str] = {
    Tokenized: "tokenized",
    PictureEncoded: "conditioned",
    QueuePosition: "waiting for a gang",
    LatentsReady: "decoding",
}


class Recorder:
    """The writer of one claimed job. Used inside one event loop.

    Args:
        store: where it writes.
        job: that was claimed.
        lost: called once with the reason, when nothing can be written any more: what the runner does is to be stopped.
        patience_s: how long a database may be away.
    """

    def __init__(self, store: JobStore, job: Job, lost: Callable[[JobsError], None], patience_s: float) -> None:
        self._store = store
        self._patience_s = patience_s
        self._job, self._lease = job, Lease(job.job_id, job.lease)
        # Who waits for a job is told its steps as they come: they are not history.
        self._has_followers = job.attached_to is None
        self._lost = lost
        self._progress = Progress()
        self._events: list[tuple[str, Mapping[str, Any]]] = []
        self._step_at_s: float | None = None
        self._interval_s: float | None = None
        self._writing: asyncio.Task[None] | None = None
        self._is_ending = False
        self._hurry = asyncio.Event()
        self._failure: JobsError | None = None

    def note(self, event: Event) -> None:
        """Enter an event; returns at once."""
        progress: dict[str, Any] = {}
        match event:
            case StepDone():
                progress = {"stage": "denoising", "step": event.step, "sigma": event.sigma, "step_s": event.step_s}
                event = replace(event, step_s=round(event.step_s or 0.0, 6), eta_s=self._eta_s(event))
            case PreviewsOff():
                # The reason is about the inside, and in the log.
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
        """Write down how the job ended, behind all that was noted.

        Returns:
            The job as it is now.

        Raises:
            LeaseLost: it is not this runner's any more.
            JobsError: the database cannot be used.
        """
        self._is_ending = True
        self._hurry.set()
        if self._writing is not None:
            await asyncio.shield(self._writing)
        await self._write()
        if self._failure is not None:
            raise self._failure
        tries = Tries(self._patience_s)
        try:
            ended: Job = await tries.of(lambda: self._store.finish(self._lease, outcome, keep_media_s=keep_media_s))
        except LeaseLost:
            # Of a try that seemed to fail only the answer may have been lost.
            found = await tries.of(lambda: self._store.get(self._job.job_id)) if tries.num_failed else None
            if found is None or not self._is_own_end(found, outcome):
                raise
            return found
        return ended

    def _is_own_end(self, found: Job, outcome: Outcome) -> bool:
        """Whether a job has ended as it was to, and not by another runner."""
        claim = self._job.runner, self._job.attempts
        return found.state is outcome.state and (found.runner, found.attempts) == claim

    def _add(self, event: Event | None, progress: Mapping[str, Any]) -> None:
        if event is not None and self._has_followers:
            self._events.append((event.kind, event_as_json(event)))
        self._progress = replace(self._progress, **progress)
        if "media_id" in progress:  # whoever has the job's id may ask for its file now
            self._hurry.set()
        if self._writing is None and self._failure is None:
            # A context of its own: a call made inside a request would be cancelled with that request.
            loop = asyncio.get_running_loop()
            self._writing = loop.create_task(self._write_soon(), context=contextvars.Context())

    def _eta_s(self, event: StepDone) -> float | None:
        """Seconds until the last step, by the pace of the last ones: other requests' turns are in it."""
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
            await Tries(self._patience_s).of(lambda: self._store.record(self._lease, progress, events))
        except JobsError as error:
            self._failure = error
            self._lost(error)


class Tries:
    """Writes, again and again where the database cannot be used just now.

    Args:
        patience_s: for so long.

    Attributes:
        num_failed: tries that did.
    """

    def __init__(self, patience_s: float) -> None:
        self._until_s = time.monotonic() + patience_s
        self.num_failed = 0

    async def of(self, write: Callable[[], Any]) -> Any:
        """What is written returns.

        Raises:
            LeaseLost, IllegalTransition: the job is another runner's, or gone; it must not be written.
            JobsError: the database is away for longer.
        """
        while True:
            try:
                return await run_in_thread(write)
            except (LeaseLost, IllegalTransition):
                raise
            except JobsError:
                self.num_failed += 1
                if time.monotonic() + _TRY_PAUSE_S > self._until_s:
                    raise
            await asyncio.sleep(_TRY_PAUSE_S)


def result_of(finished: Finished) -> dict[str, Any]:
    """Return what is kept of a finished request beside its job: plain JSON values."""
    stage_durations = {name: round(seconds, 4) for name, seconds in finished.stage_seconds.items()}
    return {
        "media_type": finished.media_type,
        "num_bytes": finished.num_bytes,
        "num_frames": finished.num_frames,
        "fps": finished.fps,
        "height": finished.height,
        "width": finished.width,
        "seed": finished.seed,
        "frames_sha256": finished.frames_sha256,
        "notes": list(finished.notes),
        "negative_prompt_origin": finished.negative_origin,
        "stage_durations": stage_durations,
        "inference_time_s": stage_durations["total"],
        "actions": None if finished.actions is None else finished.actions.as_json(),
    }
