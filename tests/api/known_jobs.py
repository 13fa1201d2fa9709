"""Jobs of every kind for generated cases; a deleted one is replaced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cosmos3_core.request import GenerationRequest
from deployments.jobs.job import Job, JobState, Outcome, Progress, SubmitOptions, new_job_id
from deployments.jobs.queue import ClaimRequest
from deployments.media.layout import new_media_id
from tests.api.fake_service import MODEL, UNKNOWN
from tests.api.hostile.byte_api import LIMITS, ByteApi
from tests.jobs.making import make_lease
from tests.mode_inputs import mp4, png

_ACTIONS = {
    "data": [[0.0, 1.0]],
    "shape": [1, 2],
    "dtype": "float32",
    "raw_action_dim": 2,
    "domain_id": 1,
    "domain_name": "av",
    "is_normalised": False,
}
_SMALL = {"prompt": "a cat", "height": 32, "width": 32, "num_inference_steps": 2}


class KnownJobs:
    """Jobs of an API by kind.

    Args:
        api: holds the jobs.

    Attributes:
        kinds: available kinds.
    """

    def __init__(self, api: ByteApi) -> None:
        self._api = api
        self._mp4, self._png = mp4(), png()
        self._makers: Mapping[str, Callable[[], Job]] = {
            "queued": lambda: self._accept(None),
            "running": self._run,
            "live": self._run_live,
            "completed": lambda: self._complete(".mp4", self._mp4),
            "image": lambda: self._complete(".png", self._png),
            "actions": lambda: self._complete("", b""),
            "expired": self._expire,
            "failed": lambda: self._end(JobState.FAILED, "stage_failed"),
            "cancelled": lambda: self._end(JobState.CANCELLED, "cancelled"),
        }
        self._jobs: dict[str, Job] = {}
        self.kinds = (*self._makers, "unknown")

    def find_id(self, kind: str) -> str:
        """Return the id of a job of this kind; create one if none is left."""
        if kind == "unknown":
            return UNKNOWN
        made = self._jobs.get(kind)
        now = None if made is None else self._api.store.get(made.job_id)
        if made is None or now is None or now.state is not made.state:
            made = self._jobs[kind] = self._makers[kind]()
            self._api.kept_ids = {job.job_id for job in self._jobs.values()}
        return made.job_id

    def _accept(self, attached_to: str | None, **fields: Any) -> Job:
        request = GenerationRequest(**{**_SMALL, "num_frames": 5, **fields})
        job: Job = self._api.run(self._api.director._submit(request, SubmitOptions(), attached_to))
        return job

    def _run(self, **fields: Any) -> Job:
        runner = new_job_id()  # its own, so that the runner claims this job and no other
        job = self._accept(runner, **fields)
        store = self._api.store
        claimed = store.claim(ClaimRequest(runner, MODEL, job.lane, LIMITS, only_attached=True))
        assert claimed is not None
        assert claimed.job_id == job.job_id
        step = {"step": 1, "num_steps": 2, "sigma": 0.5, "eta_s": 1.0, "step_s": 0.1, "pid": 7}
        store.record(make_lease(claimed), Progress(step=1, sigma=0.5, step_s=0.1, stage="denoising"), [("step", step)])
        return claimed

    def _run_live(self) -> Job:
        job = self._run()
        entry = self._api.begin_file(job)
        assert entry.live_path is not None
        entry.live_path.write_bytes(self._mp4)
        return job

    def _complete(self, suffix: str, data: bytes) -> Job:
        fields: dict[str, Any] = {"num_frames": 1, "mode": "text_to_image"} if suffix == ".png" else {}
        job, media = self._run(**fields), self._api.media
        if data:
            media_id, media_type = new_media_id(job.job_id), "image/png" if suffix == ".png" else "video/mp4"
            entry = media.create(media_id, media_type, suffix, is_live=False)
            self._api.store.record(make_lease(job), Progress(media_id=media_id), [])
            entry.path.write_bytes(data)
            entry.finish()
        result = {
            "num_bytes": len(data),
            "num_frames": job.num_frames,
            "frames_sha256": "b" * 64,
            "stage_durations": {"denoise": 1.0, "total": 2.0},
            "inference_time_s": 2.0,
            "actions": None if data else _ACTIONS,
        }
        return self._api.store.finish(make_lease(job), Outcome(JobState.COMPLETED, result), keep_media_s=100.0)

    def _expire(self) -> Job:
        job = self._complete(".mp4", self._mp4)
        self._api.media.remove(job.media_id)
        return job

    def _end(self, state: JobState, code: str) -> Job:
        outcome = Outcome(state, error_code=code, error_message="it broke")
        return self._api.store.finish(make_lease(self._run()), outcome, keep_media_s=100.0)
