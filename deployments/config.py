"""The app's configuration: one pydantic model at the edge, a YAML file a deployment. Every flag is a key here."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, Self, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cosmos3_core.errors import Cosmos3Error

DEFAULT_CONFIG = Path(__file__).parents[1] / "cluster" / "configs" / "laptop.yaml"


class ConfigError(Cosmos3Error):
    """A configuration file or key is wrong; the message lists every fault."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Autoscaling(_Strict):
    """Bounds between which Serve scales a stage by its ongoing requests."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(2, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        return self


class Stage(_Strict):
    """What every deployment has: resources, bounds, scaling."""

    num_cpus: float = Field(1, ge=0, description="of one replica")
    num_gpus: float = Field(0, ge=0, description="of one replica; fractions share a card")
    num_replicas: int = Field(1, ge=1, description="fixed number; not together with autoscaling")
    autoscaling: Autoscaling | None = None
    max_ongoing_requests: int = Field(16, ge=1, description="per replica")
    max_queued_requests: int = Field(64, ge=0, description="per caller; beyond it callers get 429")
    graceful_shutdown_timeout_s: float = Field(120, gt=0, description="a stopping replica may finish its requests")
    health_check_period_s: float = Field(5, gt=0)
    health_check_timeout_s: float = Field(30, gt=0)


class Device(_Strict):
    """Where weights live and in what."""

    device: str = Field("cpu", description="torch device string")
    dtype: str | None = Field(None, description="float32, bfloat16 or float16; null keeps what is stored")
    num_threads: int = Field(1, ge=1, description="torch's CPU threads in each process")


class TransformerStage(Stage, Device):
    """One replica = one gang: a leader and its ranks in one placement group."""

    tp: int = Field(1, ge=1, description="ranks that share every layer's heads and FFN columns")
    cfg: int = Field(1, ge=1, le=2, description="2 runs the guidance branches side by side")
    sp: int = Field(1, ge=1, description="ranks that share the generated tokens")
    cpus_per_rank: float = Field(1, ge=0)
    gpus_per_rank: float = Field(0, ge=0)
    placement_strategy: str = Field("STRICT_PACK", pattern="^(STRICT_PACK|PACK|STRICT_SPREAD|SPREAD)$")
    max_jobs: int = Field(8, ge=1, description="images, and as many videos, that one gang takes at once")
    max_held_bytes: int = Field(8 * 2**30, ge=1, description="state and prompts of begun requests, per rank")
    start_timeout_s: float = Field(1800, gt=0, description="for each phase of a gang's bring-up, loading among them")
    first_step_timeout_s: float = Field(300, gt=0, description="for beginning a request, compiling for it included")
    quantum_timeout_s: float = Field(60, gt=0, description="then a silent gang counts as hung; more if it is slow")
    save_period_s: float = Field(5, gt=0, description="between saved states of a running request")
    text_cache_bytes: int = Field(4 * 2**30, ge=0, description="keys and values of kept prompts, per rank")

    @model_validator(mode="after")
    def _no_queue_in_front(self) -> Self:
        # The leader refuses what is too much, class by class. In Serve's router an image would wait behind videos.
        most = 2 * self.max_jobs
        if self.max_ongoing_requests <= most:
            raise ValueError(f"max_ongoing_requests={self.max_ongoing_requests} must exceed 2 * max_jobs = {most}")
        return self


class VideoVAEStage(Stage, Device):
    """The decoder."""

    chunk_latents: int = Field(1, ge=1, description="latent frames per decoded chunk")


class DirectorStage(Stage):
    """The walk through the stages."""

    max_requests: int = Field(16, ge=1, description="per replica; one more gets 429")
    max_attempts: int = Field(3, ge=1, description="tries of a stage whose process died")
    chunk_window: int = Field(2, ge=1, description="decoded chunks of a clip that may exist before they are encoded")


class Http(_Strict):
    """The HTTP side."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_body_bytes: int = Field(1 << 20, ge=1, description="of a request")
    request_timeout_s: float = Field(3600, gt=0, description="from acceptance to the last byte")
    drain_timeout_s: float = Field(120, ge=0, description="for the requests in hand when the app is told to stop")


class AppConfig(_Strict):
    """The whole app."""

    checkpoint: Path = Field(description="directory in the published layout, the same path on every node")
    name: str = Field("cosmos3", pattern="^[A-Za-z0-9_.-]+$", description="of the Serve application")
    model_name: str | None = Field(None, description="what clients call the model; null = the checkpoint's name")
    http: Http = Http()
    ingress: Stage = Stage(num_cpus=0.1, max_ongoing_requests=256)
    director: DirectorStage = DirectorStage(num_cpus=0.1, max_ongoing_requests=128)
    tokenizer: Stage = Stage(num_cpus=0.1)
    transformer: TransformerStage = TransformerStage(num_cpus=0.1, max_ongoing_requests=32)
    vae: VideoVAEStage = VideoVAEStage(num_cpus=1, max_ongoing_requests=2)
    encoder: Stage = Stage(num_cpus=1, max_ongoing_requests=2)

    @classmethod
    def parse(cls, values: dict[str, Any]) -> AppConfig:
        """The config from plain values.

        Raises:
            ConfigError: unknown keys (with the nearest known one), missing ones, values out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [_fault(fault, cls) for fault in error.errors()]
            raise ConfigError("the configuration is wrong: " + "; ".join(faults)) from None

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any] | None = None) -> AppConfig:
        """The config in a YAML file, with some keys replaced.

        Args:
            path: the file.
            overrides: dotted key -> value, as command-line flags give them; None values are skipped.

        Raises:
            ConfigError: the file cannot be read, or see :meth:`parse`.
        """
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds no mapping of keys")
        for dotted, value in (overrides or {}).items():
            if value is not None:
                _set(values, dotted.split("."), value)
        return cls.parse(values)


def _set(values: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, key in enumerate(path[:-1], start=1):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(path)}: no such key; {'.'.join(path[:depth])} is a single value")
    values[path[-1]] = value


def _fault(fault: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']}"
    model: Any = root
    for part in fault["loc"][:-1]:
        annotation = model.model_fields[part].annotation
        # Of `Autoscaling | None` the model.
        model = next(iter(kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    near = difflib.get_close_matches(str(fault["loc"][-1]), model.model_fields, n=1)
    return f"{where}: no such key" + (
        f"; did you mean {near[0]}?" if near else f"; known are {sorted(model.model_fields)}"
    )
