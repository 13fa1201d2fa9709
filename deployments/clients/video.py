"""What an app says of its videos, as values. The names are those of the job object of the HTTP API."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

from pydantic import TypeAdapter, ValidationError

from cosmos3_core.actions import GeneratedActions
from deployments.clients.errors import AnswerError

COMPLETED, FAILED = "completed", "failed"

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class VideoError:
    """Why a video came to nothing; ``code`` is "cancelled" for one that was stopped."""

    code: str
    message: str


@dataclass(frozen=True, kw_only=True)
class Video:
    """A job and what has come of it, at one moment. What is not known yet, or does not apply, is None.

    Attributes:
        id: names it for every other call.
        status: "queued", "in_progress", "completed" or "failed"; one that was cancelled has failed too.
        progress: 0 to 100; 100 when it is completed and not before.
        model, mode, prompt, seed: what it is made with.
        size: "WIDTHxHEIGHT" in pixels.
        seconds: duration, as text; ``duration_s`` is the number.
        fps, num_frames: of the clip.
        quality: "high" or "lossless".
        created_at, completed_at, expires_at: seconds since 1970; the last is when its file goes.
        error: of a failed one.
        media_type, file_name: of its file; None where there is none, only actions.
        inference_time_s: from the start to the whole file.
        stage_durations: stage -> seconds.
        metrics: further figures.
        peak_memory_mb: not measured here.
        action: generated actions as JSON; :attr:`actions` has the numbers.
        remixed_from_video_id: whose request this one took over.
        service_class: that it waits in.
        stage: that it is in.
        attempts: how often it was begun.
        step, num_steps: denoising steps that are done, and all.
        sigma: noise level that is left after the last one.
        eta_s: seconds that denoising will still take.
        queue_position: how many are before it.
        frames_sha256: hash of the frames.
        negative_prompt_origin: where the negative prompt came from.
        notes: what was changed on the way.
        warnings: fields that were accepted without effect.
    """

    id: str
    status: Literal["queued", "in_progress", "completed", "failed"]
    progress: int
    created_at: int
    model: str | None = None
    mode: str | None = None
    prompt: str | None = None
    seed: int | None = None
    size: str | None = None
    seconds: str | None = None
    duration_s: float | None = None
    fps: float | None = None
    num_frames: int | None = None
    quality: str | None = None
    completed_at: int | None = None
    expires_at: int | None = None
    error: VideoError | None = None
    media_type: str | None = None
    file_name: str | None = None
    inference_time_s: float | None = None
    stage_durations: Mapping[str, float] | None = None
    metrics: Mapping[str, Any] | None = None
    peak_memory_mb: float | None = None
    action: Mapping[str, Any] | None = field(default=None, repr=False)
    remixed_from_video_id: str | None = None
    service_class: str | None = None
    stage: str | None = None
    attempts: int | None = None
    step: int | None = None
    num_steps: int | None = None
    sigma: float | None = None
    eta_s: float | None = None
    queue_position: int | None = None
    frames_sha256: str | None = None
    negative_prompt_origin: str | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @classmethod
    def of(cls, job: Mapping[str, Any]) -> Video:
        """Of a job object; keys that this version does not know are left out.

        Raises:
            AnswerError: it is none.
        """
        return _checked(_VIDEO, job)

    @property
    def has_ended(self) -> bool:
        """Whether nothing more will come."""
        return self.status in (COMPLETED, FAILED)

    @property
    def has_file(self) -> bool:
        """Whether there is a file to be had."""
        return self.status == COMPLETED and bool(self.media_type)

    @property
    def actions(self) -> GeneratedActions | None:
        """The generated actions, where there are such.

        Raises:
            AnswerError: they are not what they should be.
        """
        if self.action is None:
            return None
        try:
            return GeneratedActions.from_json(dict(self.action))
        except (ValueError, TypeError, KeyError):
            raise _foreign(self.id) from None


@dataclass(frozen=True)
class VideoPage:
    """Some of the videos.

    Attributes:
        videos: in the order that was asked for.
        has_more: whether there are others behind them; the next page is ``after`` the last one's id.
    """

    videos: tuple[Video, ...]
    has_more: bool

    @classmethod
    def of(cls, page: Mapping[str, Any]) -> VideoPage:
        """Of a page as the HTTP API has it.

        Raises:
            AnswerError: it is none.
        """
        return _checked(_PAGE, {"videos": page.get("data"), "has_more": page.get("has_more")})


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model that the app serves, and the modes that it can do."""

    id: str
    created: int | None = None
    owned_by: str | None = None
    family: str | None = None
    modes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """A finished request in one piece.

    Attributes:
        media: its file; empty where there is none, only actions.
        video: what is known of it.
    """

    media: bytes = field(repr=False)
    video: Video


_VIDEO = TypeAdapter(Video)
_PAGE = TypeAdapter(VideoPage)
_MODELS = TypeAdapter(tuple[Model, ...])


def models_of(data: Sequence[Mapping[str, Any]]) -> tuple[Model, ...]:
    """Of the list that ``/v1/models`` has.

    Raises:
        AnswerError: it is none.
    """
    return _checked(_MODELS, data)


def _checked(kind: TypeAdapter[_T], value: Any) -> _T:
    try:
        return kind.validate_python(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise _foreign(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None


def _foreign(what: str) -> AnswerError:
    return AnswerError(200, f"the app answers, but not as this API does ({what}); is it a cosmos3 app?")
