"""Service: what the HTTP API works with, in one place."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, Self

from starlette.datastructures import Headers

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.api.auth import Authenticator, Caller, auth_required, check_keys, names_of
from deployments.api.bodies import BodyRules
from deployments.api.media_fields import RemoteFiles
from deployments.api.memory_budget import MemoryBudget
from deployments.api.remote_media import RemoteMediaFetcher
from deployments.config import AppConfig, HttpConfig
from deployments.jobs.service import JobService
from deployments.observability.metrics import metrics_text
from deployments.served_model import Model, offers_sound


class ReadinessCheck(Protocol):
    """Readiness of the stages, :class:`deployments.api.readiness.Readiness`."""

    async def waiting_for(self) -> list[str]:
        """Return the names of stages that do not run yet."""
        ...


@dataclass
class Service:
    """Service that the routes work with; one a replica.

    Attributes:
        model: that is served.
        http: the configuration's section.
        classes: names of the queue's classes.
        may_disable_guardrails: whether a request may say that it does without.
        jobs: what can be done with them.
        director: its handle, for answers in one piece.
        streaming: the same, for streams.
        ready: tells which stages do not run yet.
        metrics_text: what Prometheus is told, and its content type.
        has_guardrails: whether anything is looked at.
        hosts: names that it may be called by; None: any.
        auth: checks API keys; None where everybody may call.
        remote_media: fetches files of other servers; None where that is off.
        room: for bodies.
        is_draining: the app is being stopped.
    """

    model: Model
    http: HttpConfig
    classes: tuple[str, ...]
    may_disable_guardrails: bool
    jobs: JobService
    director: Any
    streaming: Any
    ready: ReadinessCheck
    metrics_text: Callable[[], Awaitable[tuple[str, str]]]
    has_guardrails: bool = False
    hosts: frozenset[str] | None = None
    auth: Authenticator | None = None
    remote_media: RemoteFiles | None = None
    room: MemoryBudget = field(init=False)
    is_draining: bool = False

    def __post_init__(self) -> None:
        self.room = MemoryBudget(self.http.max_bodies_bytes)

    @classmethod
    def open(cls, config: AppConfig, director: Any, ready: ReadinessCheck, host: str) -> Self:
        """Open what an ingress works with.

        Args:
            config: of the app.
            director: the Director's handle.
            ready: tells which stages do not run yet.
            host: that Serve listens at.

        Raises:
            CheckpointError, JobsError, MediaStoreError: the checkpoint, the database or the files cannot be used.
            NoKeys: requests need a key, and there is none.
        """
        layout = CheckpointLayout.open(config.checkpoint)
        jobs = JobService.open(config)
        keys = jobs.store.keys
        needs_keys = auth_required(config.auth.enabled, host)
        if needs_keys:
            check_keys(keys, host)
        has_guardrails = config.guardrails.adapter is not None
        return cls(
            model=Model.of(layout, config.model_name, is_sound_offered=offers_sound(config.audio, layout)),
            http=config.http,
            classes=tuple(config.jobs.classes),
            has_guardrails=has_guardrails,
            hosts=names_of(host, config.http.allowed_hosts, needs_keys=needs_keys),
            may_disable_guardrails=config.guardrails.clients_may_disable or not has_guardrails,
            jobs=jobs,
            director=director,
            # Configured once: every differently configured handle has a router of its own.
            streaming=director.options(stream=True),
            ready=ready,
            metrics_text=metrics_text,
            auth=Authenticator(keys) if needs_keys else None,
            remote_media=RemoteMediaFetcher(config.remote_media) if config.remote_media.enabled else None,
        )

    async def caller(self, headers: Headers) -> Caller:
        """Return who sends a request.

        Raises:
            ApiError: 401, it needs a key and has none that is valid.
        """
        return Caller() if self.auth is None else await self.auth.caller(headers)

    def rules(self, caller: Caller) -> BodyRules:
        """Return the rules for a caller's bodies."""
        allowed = self.classes if caller.classes is None else caller.classes
        classes = tuple(name for name in self.classes if name in allowed)
        return BodyRules(
            model_name=self.model.id,
            classes=classes,
            default_class=caller.service_class,
            has_guardrails=self.has_guardrails,
            may_disable_guardrails=self.may_disable_guardrails,
        )
