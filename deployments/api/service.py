"""Service: everything that the HTTP API's routes work with."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from cosmos3_core.checkpoint.layout import CheckpointLayout
from deployments.api.auth import Authenticator, Caller, check_keys, list_host_names, requires_key
from deployments.api.bodies import BodyRules
from deployments.api.body_reader import MemoryBudget
from deployments.api.remote_media import FetchFile, RemoteMediaFetcher
from deployments.api_model import Model
from deployments.config import AppConfig, HttpConfig
from deployments.jobs.service import JobService
from deployments.observability.metrics import metrics_text

FindMissing = Callable[[], Awaitable[list[str]]]
"""Returns the stages that have no running replica."""


@dataclass
class Service:
    """Everything that the routes of one replica share.

    Attributes:
        rules: for bodies of callers that may name every class.
        director, streaming: the Director's handle, for answers in one piece and for streams.
        metrics_text: returns the metrics for Prometheus, and their content type.
        hosts: allowed in the Host header; None: any.
        auth: None where no key is needed.
        fetch_file: None where URLs are not fetched.
        body_memory: memory for bodies.
    """

    model: Model
    http: HttpConfig
    rules: BodyRules
    jobs: JobService
    director: Any
    streaming: Any
    find_missing_stages: FindMissing
    metrics_text: Callable[[], Awaitable[tuple[str, str]]]
    hosts: frozenset[str] | None = None
    auth: Authenticator | None = None
    fetch_file: FetchFile | None = None
    body_memory: MemoryBudget = field(init=False)
    is_draining: bool = False

    def __post_init__(self) -> None:
        self.body_memory = MemoryBudget(self.http.max_bodies_bytes)

    @classmethod
    def open(cls, config: AppConfig, director: Any, find_missing_stages: FindMissing, host: str) -> Self:
        """Open the service of an ingress whose Serve listens at ``host``.

        Raises NoKeys if a key is needed and none exists; CheckpointError, JobsError, MediaStoreError.
        """
        checkpoint = CheckpointLayout.open(config.checkpoint)
        model = Model.of(checkpoint, config.model_name, is_sound_offered=config.audio.decodes_sound(checkpoint))
        jobs = JobService.open(config)
        keys = jobs.store.keys
        needs_keys = requires_key(config.auth.enabled, host)
        if needs_keys:
            check_keys(keys, host)
        has_guardrails = config.guardrails.adapter is not None
        return cls(
            model=model,
            http=config.http,
            rules=BodyRules(
                model_names=tuple(dict.fromkeys((model.id, *config.model_aliases, *checkpoint.model_names))),
                classes=tuple(config.jobs.classes),
                has_guardrails=has_guardrails,
                may_disable_guardrails=config.guardrails.clients_may_disable or not has_guardrails,
            ),
            jobs=jobs,
            director=director,
            # Made once: every handle with other options has a router of its own.
            streaming=director.options(stream=True),
            find_missing_stages=find_missing_stages,
            metrics_text=metrics_text,
            hosts=list_host_names(host, config.http.allowed_hosts, needs_keys=needs_keys),
            auth=Authenticator(keys) if needs_keys else None,
            fetch_file=RemoteMediaFetcher(config.remote_media).fetch if config.remote_media.enabled else None,
        )

    def rules_for(self, caller: Caller) -> BodyRules:
        """Return the rules for a caller's bodies."""
        classes = tuple(it for it in self.rules.classes if caller.classes is None or it in caller.classes)
        return replace(self.rules, classes=classes, default_class=caller.service_class)
