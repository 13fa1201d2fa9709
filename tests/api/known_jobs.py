"""Jobs of every kind, which tests ask about: whoever deletes one finds another in its place."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import PIL.Image

from cosmos3_core.media.writer import ClipFormat, open_writer
from deployments.jobs.job import Job, JobState, Lane, Outcome, Progress
from deployments.media_store import new_media_id
from tests.api.accepting_api import AcceptingApi
from tests.api.fake_service import CLASSES, MODEL, lease_of
from tests.mode_inputs import CLIP, IMAGE

UNKNOWN = "video_gen_" + "0" * 32
_ACTIONS = {
    "data": [[0.0, 1.0]],
    "shape": [1, 2],
    "dtype": "float32",
    "raw_action_dim": 2,
    "domain_id": 1,
    "domain_name": "av",
    "is_normalised": False,
}


def png() -> bytes:
    """A small picture."""
    stream = io.BytesIO()
    PIL.Image.fromarray(IMAGE).save(stream, "png")
    return stream.getvalue()


def mp4() -> bytes:
    """A small clip."""
    stream = io.BytesIO()
    num_frames, height, width, _ = CLIP.shape
    with open_writer(stream, ClipFormat("mp4", height=height, width=width, fps=24)) as writer:
        writer.write(CLIP[:num_frames])
        writer.close()
    return stream.getvalue()


class KnownJobs:
    """See the module.

    Args:
        api: that has them.
    """

    def __init__(self, api: AcceptingApi) -> None:
        self._api = api
        self._mp4, self._png = mp4(), png()
        self._makers: dict[str, Callable[[], Job]] = {
            "queued": self._queued,
            "running": lambda: self._run(self._queued()),
            "live": self._live,
            "completed": lambda: self._completed("video/mp4", self._mp4),
            "image": lambda: self._completed("image/png", self._png, num_frames=1, output="png"),
            "actions": lambda: self._completed("", None, actions=_ACTIONS),
            "expired": self._expired,
            "failed": lambda: self._ended(JobState.FAILED, "stage_failed"),
            "cancelled": lambda: self._ended(JobState.CANCELLED, "cancelled"),
        }
        self._ids: dict[str, str] = {}
        self.kinds = (*self._makers, "unknown")

    def id_of(self, kind: str) -> str:
        """Of the job of a kind that there is now."""
        if kind == "unknown":
            return UNKNOWN
        job = self._api.store.get(self._ids.get(kind, UNKNOWN))
        # A queued one may have been cancelled, say.
        if job is None or _kind_of(job) != _kind_of(self._known[kind]):
            job = self._known[kind] = self._makers[kind]()
            self._ids[kind] = job.job_id
        return job.job_id
