"""The configuration's sections about the service: HTTP, files, jobs, keys, what may be fetched, guardrails."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

_Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_-]{0,31}$")]
# As in the header Host: IPv6 addresses in brackets.
_Host = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])$")]
DEFAULT_CLASS = "standard"


class Strict(BaseModel):
    """Base of every section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HttpConfig(Strict):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_body_bytes: int = Field(96 * 2**20, ge=1, description="of a request; base64 of the largest file takes 86 MiB")
    max_bodies_bytes: int = Field(384 * 2**20, ge=1, description="of all that an ingress replica has in memory at once")
    request_timeout_s: float = Field(3600, gt=0, description="of one whose caller waits: from acceptance to the file")
    drain_timeout_s: float = Field(120, ge=0, description="for the requests in hand when the app is told to stop")
    cors_origins: tuple[str, ...] = Field((), description="origins whose pages may call the API; none by default")
    allowed_hosts: tuple[_Host, ...] = Field(
        (),
        description="names, without a port, that an app of this machine that asks for no keys is called by besides "
        "localhost and its address: that of a reverse proxy say",
    )

    @model_validator(mode="after")
    def _room_for_one(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes={self.max_bodies_bytes} is below max_body_bytes={self.max_body_bytes}: "
                "the largest body could never be read"
            )
        return self


class MediaConfig(Strict):
    """The media store: where files are made and read."""

    directory: Path | None = Field(
        None, description="the same on every node, of a file system that they share; null: one of this user's own"
    )
    archive: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="fsspec URL, s3://bucket/prefix say, for files that have to outlive the directory",
    )
    max_bytes: int = Field(
        20 * 2**30, ge=1, description="beyond it the longest finished files go; looked at once a minute"
    )
    keep_s: float = Field(
        86_400, gt=0, description="how long a file stays; one that does not grow for so long is given up"
    )


class JobsConfig(Strict):
    """Accepted requests: where they are kept, how many may wait, in what order they are run."""

    database: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="SQLAlchemy URL: sqlite:///FILE or postgresql+psycopg://...; null: a file beside the media",
    )
    max_running_images: int = Field(16, ge=1, description="per Director")
    max_running_videos: int = Field(16, ge=1, description="per Director")
    max_queued: int = Field(256, ge=1, description="that wait, of all keys and classes together")
    max_queued_per_key: int = Field(64, ge=1, description="that wait, of one key that says nothing else")
    max_running_per_key: int | None = Field(None, ge=1, description="of one key by default, per lane; null: any")
    classes: dict[_Name, float] = Field(
        default_factory=lambda: {"interactive": 8.0, DEFAULT_CLASS: 4.0, "batch": 1.0},
        description="class -> its share of the work while others wait as well",
    )
    keep_s: float = Field(7 * 86_400, gt=0, description="how long what is known of an ended job stays")
    max_kept: int = Field(20_000, ge=1, description="ended jobs that are known, beyond it the oldest are forgotten")
    run_timeout_s: float = Field(7200, gt=0, description="for running a job that nobody waits for")
    lease_s: float = Field(20, gt=0, description="a runner that is silent for so long has died")
    max_attempts: int = Field(3, ge=1, description="runners that a job may have, one after the other's death")
    checkpoint_period_s: float = Field(30, gt=0, description="between two states that a running job leaves")
    poll_s: float = Field(0.5, gt=0, description="between two looks for jobs that other Directors accepted")
    max_followers: int = Field(512, ge=1, description="who follow events of jobs at one ingress replica")

    @model_validator(mode="after")
    def _has_classes(self) -> Self:
        if DEFAULT_CLASS not in self.classes:
            raise ValueError(f"classes needs {DEFAULT_CLASS!r}, which requests have that name none")
        if unfit := {name: weight for name, weight in self.classes.items() if not weight > 0}:
            raise ValueError(f"classes need a share above 0; given are {unfit}")
        return self

    @model_validator(mode="after")
    def _kept_longer_than_it_runs(self) -> Self:
        if self.keep_s < self.run_timeout_s:
            raise ValueError(f"keep_s={self.keep_s:g} is below run_timeout_s={self.run_timeout_s:g}")
        return self


class LoggingConfig(Strict):
    """What replicas write to Serve's log files; ranks always write JSON."""

    encoding: Literal["JSON", "TEXT"] = "JSON"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="INFO has two lines a stage")


class AuthConfig(Strict):
    """API keys, which `cosmos3 keys` makes."""

    enabled: bool | None = Field(
        None, description="null: where others than this machine reach the port; they are then needed to start"
    )


class RemoteMediaConfig(Strict):
    """URLs of other servers in requests; none is fetched unless this says so."""

    enabled: bool = False
    hosts: tuple[str, ...] = Field((), description="names that may be fetched from; *.example.com for all below one")
    schemes: tuple[str, ...] = ("https",)
    max_bytes: int = Field(64 * 2**20, ge=1, description="of a file")
    timeout_s: float = Field(30, gt=0, description="for a file, redirects included")
    max_redirects: int = Field(3, ge=0)

    @model_validator(mode="after")
    def _has_hosts(self) -> Self:
        if self.enabled and not self.hosts:
            raise ValueError("enabled needs hosts, the names that may be fetched from")
        if unfit := sorted(set(self.schemes) - {"http", "https"}):
            raise ValueError(f"schemes are http and https; given are {unfit}")
        return self


class GuardrailsConfig(Strict):
    """What is looked at before a request is accepted, and before its pictures are in a file."""

    adapter: str | None = Field(
        None, description="cosmos-guardrail (NVIDIA's package), or module:Class; null: nothing is looked at"
    )
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="keyword arguments of the adapter"
    )
    clients_may_disable: bool = Field(False, description="whether a request may say guardrails: false")
    text_timeout_s: float = Field(60, gt=0)
    frames_timeout_s: float = Field(300, gt=0, description="for one chunk")
