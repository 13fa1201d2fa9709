"""The app's configuration: a pydantic model, read from a YAML file. Every flag of the command line is a key here."""

from __future__ import annotations

import difflib
from abc import abstractmethod
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cosmos3_core.errors import CapabilityError, Cosmos3Error

if TYPE_CHECKING:
    from cosmos3_core.checkpoint.layout import CheckpointLayout

_PACKAGED = Path(__file__).parents[1] / "cluster" / "configs"
DEFAULT_CONFIG = _PACKAGED / "laptop.yaml"
# Keys whose values may hold passwords.
_URLS = (("jobs", "database"), ("media", "archive"))

# Ray's grammar of labels; a selector is a label, "in(a,b)", or either with a "!" before it. Ray also takes "in(a, b)",
# and then finds no node for b.
_LABEL = "[a-zA-Z0-9]([a-zA-Z0-9_.-]{0,61}[a-zA-Z0-9])?"
_LabelKey = Annotated[str, StringConstraints(pattern=f"^([a-z0-9]([a-z0-9.-]{{0,251}}[a-z0-9])?/)?{_LABEL}$")]
_LabelSelector = Annotated[str, StringConstraints(pattern=rf"^!?({_LABEL}|in\({_LABEL}(,{_LABEL})*\))$")]


def _check_share(share: float) -> float:
    if not 0 <= share <= 1:
        raise ValueError(f"must be 0 to 1, a card or a share of one (got {share:g})")
    return share


def _check_branches(cfg: int) -> int:
    if cfg not in (1, 2):
        raise ValueError(f"must be 1 or 2, as there are two guidance branches (got {cfg})")
    return cfg


# CPUs of a process that mostly waits.
_LIGHT_CPUS = 0.1
# A process uses one card at most; beyond 1 Ray would give it several whole ones.
_ShareOfCard = Annotated[float, AfterValidator(_check_share)]
_Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_-]{0,31}$")]
# A name or address as in the header Host: IPv6 addresses in brackets.
_Host = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])$")]
DEFAULT_CLASS = "standard"


class ConfigError(Cosmos3Error):
    """A configuration file or key is wrong; the message lists every fault."""


class Strict(BaseModel):
    """Base of every section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def _check_order(section: Strict, larger: str, smaller: str, reason: str = "") -> None:
    """Check that a key's value is not below another's."""
    high, low = attrgetter(larger, smaller)(section)
    if high < low:
        raise ValueError(f"{larger}={high:.15g} is below {smaller}={low:.15g}{reason}")


class HttpConfig(Strict):
    """The HTTP side: where it listens, and the bounds of its requests."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    max_body_bytes: int = Field(96 * 2**20, ge=1, description="per request; the largest file takes 86 MiB in base64")
    max_bodies_bytes: int = Field(384 * 2**20, ge=1, description="bodies in the memory of one ingress replica")
    request_timeout_s: float = Field(3600, gt=0, description="from acceptance to the file, while the caller waits")
    drain_timeout_s: float = Field(120, ge=0, description="for running requests when the app is stopped")
    cors_origins: tuple[str, ...] = Field((), description="origins of pages that may call the API")
    allowed_hosts: tuple[_Host, ...] = Field(
        (), description="names, without a port, that a local app without keys has besides localhost, such as a proxy's"
    )

    @model_validator(mode="after")
    def _check_room(self) -> Self:
        _check_order(self, "max_bodies_bytes", "max_body_bytes", ": the largest body could never be read")
        return self


class MediaConfig(Strict):
    """The media store: where files lie, and for how long."""

    directory: Path | None = Field(None, description="shared by all nodes, at the same path; null: this user's own")
    archive: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="fsspec URL, such as s3://bucket/prefix, for files that must outlive the directory",
    )
    max_bytes: int = Field(
        20 * 2**30, ge=1, description="beyond it the oldest finished jobs lose their files, each minute"
    )
    keep_s: float = Field(86_400, gt=0, description="how long files of a completed job stay")


class JobsConfig(Strict):
    """Accepted requests: where they are stored, how many may wait, and in which order they run."""

    database: str | None = Field(
        None,
        repr=False,  # it may hold a password
        description="SQLAlchemy URL: sqlite:///FILE or postgresql+psycopg://...; null: a file beside the media",
    )
    max_running_images: int = Field(16, ge=1, description="per Director")
    max_running_videos: int = Field(16, ge=1, description="per Director")
    max_queued: int = Field(256, ge=1, description="of all keys and classes together")
    max_queued_per_key: int = Field(64, ge=1, description="bound of a key that sets none")
    max_running_per_key: int | None = Field(None, ge=1, description="per lane, of a key that sets none; null: no bound")
    classes: dict[_Name, float] = Field(
        default_factory=lambda: {"interactive": 8.0, DEFAULT_CLASS: 4.0, "batch": 1.0},
        description="class -> its share of the work while other classes wait as well",
    )
    keep_s: float = Field(7 * 86_400, gt=0, description="lifetime of an ended job's record")
    max_kept: int = Field(20_000, ge=1, description="records of ended jobs; beyond it the oldest are deleted")
    run_timeout_s: float = Field(7200, gt=0, description="for running a job that no caller waits for")
    lease_s: float = Field(20, gt=0, description="a runner that is silent for so long counts as dead")
    max_attempts: int = Field(3, ge=1, description="runs that a job may lose while other jobs are completed")
    max_fault_wait_s: float | None = Field(
        None, gt=0, description="how long a job may wait for its surroundings, such as a full disk; null: no bound"
    )
    checkpoint_period_s: float = Field(30, gt=0, description="between two saved states of a running job")
    poll_s: float = Field(0.5, gt=0, description="between two looks for jobs that other Directors accepted")
    max_followers: int = Field(512, ge=1, description="open streams of events at one ingress replica")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if DEFAULT_CLASS not in self.classes:
            raise ValueError(f"classes needs {DEFAULT_CLASS!r}, the class of requests that name none")
        if unfit := {name: weight for name, weight in self.classes.items() if not weight > 0}:
            raise ValueError(f"shares of classes must be above 0 (got {unfit})")
        _check_order(self, "keep_s", "run_timeout_s")
        return self


class LoggingConfig(Strict):
    """Logs of replicas in Serve's log files; ranks always write JSON."""

    encoding: Literal["JSON", "TEXT"] = "JSON"
    level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field("INFO", description="INFO writes two lines a stage")


class AuthConfig(Strict):
    """API keys, which `cosmos3 keys` makes."""

    enabled: bool | None = Field(None, description="null: required if other machines reach the port")


class RemoteMediaConfig(Strict):
    """Fetching of media from URLs in requests; off by default."""

    enabled: bool = False
    hosts: tuple[str, ...] = Field((), description="names to fetch from; *.example.com for all below one")
    schemes: tuple[str, ...] = ("https",)
    max_bytes: int = Field(64 * 2**20, ge=1, description="per file")
    timeout_s: float = Field(30, gt=0, description="per file, redirects included")
    max_redirects: int = Field(3, ge=0)

    @model_validator(mode="after")
    def _check_hosts(self) -> Self:
        if self.enabled and not self.hosts:
            raise ValueError("enabled needs hosts, the names that may be fetched from")
        if unfit := sorted(set(self.schemes) - {"http", "https"}):
            raise ValueError(f"schemes must be http or https (got {unfit})")
        return self


class GuardrailsConfig(Strict):
    """Checks of prompts before a request is accepted, and of pictures before they are in a file."""

    adapter: str | None = Field(None, description="cosmos-guardrail (NVIDIA's), or module:Class; null: no checks")
    options: dict[str, str | int | float | bool] = Field(default_factory=dict, description="the adapter's arguments")
    clients_may_disable: bool = Field(False, description="whether a request may say guardrails: false")
    text_timeout_s: float = Field(60, gt=0)
    frames_timeout_s: float = Field(300, gt=0, description="for one chunk")


class Autoscaling(Strict):
    """Bounds between which Serve scales a stage by its ongoing and waiting requests."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(2, gt=0, description="per replica, averaged over look_back_period_s")
    upscale_delay_s: float = Field(30, ge=0, description="how long the load must exceed the target")
    downscale_delay_s: float = Field(600, ge=0, description="how long the load must be below the target")
    look_back_period_s: float = Field(30, gt=0)
    metrics_interval_s: float = Field(10, gt=0, description="between two counts")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_order(self, "max_replicas", "min_replicas")
        _check_order(self, "look_back_period_s", "metrics_interval_s", ": there would be nothing to average over")
        return self


class Stage(Strict):
    """Base of every deployment's section: resources, bounds, scaling."""

    num_cpus: float = Field(1, ge=0, description="per replica")
    num_gpus: _ShareOfCard = Field(0, description="per replica; other processes use the rest of a card")
    node_labels: dict[_LabelKey, _LabelSelector] = Field(
        default_factory=dict, description="labels that a node must have: label -> 'H200', '!H200', 'in(H100,H200)'"
    )
    num_replicas: int = Field(1, ge=1, description="fixed number; not together with autoscaling")
    autoscaling: Autoscaling | None = None
    max_ongoing_requests: int = Field(16, ge=1, description="per replica")
    max_queued_requests: int = Field(64, ge=1, description="per caller; beyond it callers get 429")
    graceful_shutdown_timeout_s: float = Field(120, gt=0, description="for the requests of a replica that stops")
    health_check_period_s: float = Field(2, gt=0)
    health_check_timeout_s: float = Field(10, gt=0, description="a replica that fails three checks is replaced")

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError(f"num_replicas={self.num_replicas} and autoscaling exclude each other")
        return self


class LightStage(Stage):
    """Base of stages whose processes mostly wait."""

    health_check_period_s: float = Field(1, gt=0)
    health_check_timeout_s: float = Field(5, gt=0, description="a replica that fails three checks is replaced")
    num_cpus: float = Field(_LIGHT_CPUS, ge=0, description="per replica")


class TorchSection(Strict):
    """The device of a stage's weights, and their dtype."""

    device: str = Field("cpu", description="torch device string")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="null: as stored")
    num_threads: int = Field(1, ge=1, description="torch's CPU threads in each process")

    @property
    def is_on_gpu(self) -> bool:
        """Whether its weights lie on a card."""
        return self.device.partition(":")[0] == "cuda"


class GangStage(Stage, TorchSection):
    """Base of stages whose replica is a gang: a leader and its ranks in one placement group."""

    num_cpus: float = Field(_LIGHT_CPUS, ge=0, description="for the leader")
    cpus_per_rank: float = Field(1, ge=0)
    gpus_per_rank: _ShareOfCard = Field(0, description="other processes use the rest of a card")
    placement_strategy: str = Field(
        "STRICT_PACK",
        pattern="^(STRICT_PACK|PACK|STRICT_SPREAD|SPREAD)$",
        description="a gang's ranks: all on one node, on few, each on another node, on many",
    )
    start_timeout_s: float = Field(1800, gt=0, description="per phase of a gang's bring-up, such as loading")

    @property
    @abstractmethod
    def num_ranks(self) -> int:
        """Ranks in a gang."""

    @model_validator(mode="after")
    def _check_gang(self) -> Self:
        if self.num_gpus:
            raise ValueError(f"num_gpus={self.num_gpus:g}: the leader of a gang uses no GPU; set gpus_per_rank instead")
        if self.is_on_gpu and ":" in self.device:
            raise ValueError(f"device={self.device}: Ray decides which card a rank gets; say cuda")
        self._check_cards()
        return self

    def _check_cards(self) -> None:
        """Check that every rank has a card, and no two ranks of a gang the same one."""
        if not self.is_on_gpu:
            return
        if not self.gpus_per_rank:
            raise ValueError(f"device={self.device} needs a GPU: set gpus_per_rank, 1 for a card a rank")
        # Ray puts several ranks on one card where they fit.
        if self.num_ranks > 1 and self.gpus_per_rank <= 0.5:
            raise ValueError(
                f"gpus_per_rank={self.gpus_per_rank:g}: ranks of a gang cannot share a card, which NCCL refuses; "
                "set more than 0.5"
            )


class TransformerStage(GangStage):
    """Denoising."""

    max_ongoing_requests: int = Field(64, ge=1, description="per gang; they queue at its leader")
    tp: int = Field(1, ge=1, description="ranks that share every layer's heads and FFN columns")
    cfg: Annotated[int, AfterValidator(_check_branches)] = Field(1, description="2: guidance branches side by side")
    sp: int = Field(1, ge=1, description="ranks that share the generated tokens")
    max_jobs: int = Field(16, ge=1, description="images, and as many videos, that one gang takes at once")
    max_held_bytes: int = Field(8 * 2**30, ge=1, description="states and prompts of running requests, per rank")
    first_step_timeout_s: float = Field(300, gt=0, description="for the start of a request, compiling included")
    quantum_timeout_s: float = Field(60, gt=0, description="a gang silent for longer is hung; a slow one gets more")
    save_period_s: float = Field(5, gt=0, description="between saved states of a running request")
    text_cache_bytes: int = Field(4 * 2**30, ge=0, description="keys and values of cached prompts, per rank")

    @property
    def num_ranks(self) -> int:
        return self.tp * self.cfg * self.sp

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        # Requests queue at the leader, class by class. In Serve's router an image would wait behind videos.
        most = 2 * self.max_jobs
        if self.max_ongoing_requests <= most:
            raise ValueError(f"max_ongoing_requests={self.max_ongoing_requests} must exceed 2 * max_jobs = {most}")
        return self


class VideoVAEStage(GangStage):
    """Decoder of frames and encoder of given pictures."""

    max_ongoing_requests: int = Field(2, ge=1, description="clips at once per replica")
    ranks: int = Field(1, ge=1, le=64, description="per gang; they split every frame")
    beside_transformer: bool = Field(False, description="rank i uses card i of its node, with no share of Ray's")
    chunk_latents: int | None = Field(
        None, ge=1, description="latent frames per decoded chunk; null: 1 on a CPU, on a GPU more of small frames"
    )
    preview_cache_dir: Path | None = Field(None, description="of previews' fitted maps; null: each start fits its own")
    first_chunk_timeout_s: float = Field(600, gt=0, description="for a clip's first two chunks, compiling included")
    chunk_timeout_s: float = Field(300, gt=0, description="for any other chunk; a gang silent for longer is hung")

    @property
    def num_ranks(self) -> int:
        return self.ranks

    def _check_cards(self) -> None:
        if not self.beside_transformer:
            super()._check_cards()
        elif not self.is_on_gpu or self.gpus_per_rank:
            raise ValueError(
                f"beside_transformer needs device=cuda and gpus_per_rank=0 (got {self.device} and "
                f"{self.gpus_per_rank:g})"
            )
        elif self.placement_strategy != "STRICT_PACK":
            raise ValueError(f"beside_transformer needs STRICT_PACK, one node (got {self.placement_strategy})")


class AudioVAEStage(Stage, TorchSection):
    """The decoder of sound, of apps whose checkpoint makes sound."""

    enabled: bool | None = Field(None, description="null: if the checkpoint makes sound")
    max_ongoing_requests: int = Field(2, ge=1, description="clips at once per replica")
    chunk_timeout_s: float = Field(300, gt=0, description="for one chunk; a replica silent for longer is hung")

    def decodes_sound(self, checkpoint: CheckpointLayout) -> bool:
        """Whether the app decodes sound; raise CapabilityError if it is enabled and the checkpoint makes none."""
        if self.enabled and not checkpoint.has_sound:
            raise CapabilityError("audio.enabled", True, "null or false", f"{checkpoint.name} makes no sound.")
        return checkpoint.has_sound if self.enabled is None else self.enabled

    @model_validator(mode="after")
    def _check_card(self) -> Self:
        if self.is_on_gpu and not self.num_gpus:
            raise ValueError(f"device={self.device} needs a GPU: set num_gpus, 1 for a whole card")
        return self


class EncoderStage(Stage):
    """The mp4 encoder."""

    max_ongoing_requests: int = Field(2, ge=1, description="clips at once per replica")
    chunk_timeout_s: float = Field(300, gt=0, description="for one chunk; a replica silent for longer is hung")


class GuardrailStage(Stage):
    """Runs the adapter of ``guardrails``; deployed if one is configured."""

    max_ongoing_requests: int = Field(8, ge=1, description="prompts and chunks at once per replica")


class IngressStage(LightStage):
    """The HTTP side."""

    max_ongoing_requests: int = Field(256, ge=1, description="per replica")


class TokenizerStage(LightStage):
    """Prompts to token ids."""


class DirectorStage(LightStage):
    """The Director: admission, queue and the pipeline of requests."""

    max_ongoing_requests: int = Field(512, ge=1, description="per replica, queued requests included")
    max_attempts: int = Field(3, ge=1, description="tries of a stage whose process died")
    chunk_window: int = Field(2, ge=1, description="decoded chunks of a clip that may wait for the encoder")


class AppConfig(Strict):
    """The whole app."""

    checkpoint: Path = Field(description="directory in the published layout, at the same path on every node")
    name: str = Field("cosmos3", pattern="^[A-Za-z0-9_.-]+$", description="of the Serve application")
    model_name: str | None = Field(None, description="the model's name for clients; null: the checkpoint's")
    model_aliases: tuple[str, ...] = Field((), description="more names that requests may give for it")
    http: HttpConfig = HttpConfig()
    media: MediaConfig = MediaConfig()
    jobs: JobsConfig = JobsConfig()
    logging: LoggingConfig = LoggingConfig()
    auth: AuthConfig = AuthConfig()
    remote_media: RemoteMediaConfig = RemoteMediaConfig()
    guardrails: GuardrailsConfig = GuardrailsConfig()
    ingress: IngressStage = IngressStage()
    director: DirectorStage = DirectorStage()
    tokenizer: TokenizerStage = TokenizerStage()
    transformer: TransformerStage = TransformerStage()
    unguided: TransformerStage | None = Field(
        None, description="gangs for requests without guidance, which with cfg=2 leave half of a gang idle"
    )
    vae: VideoVAEStage = VideoVAEStage()
    audio: AudioVAEStage = AudioVAEStage()
    encoder: EncoderStage = EncoderStage()
    guardrail: GuardrailStage = GuardrailStage()

    @model_validator(mode="after")
    def _check_gangs(self) -> Self:
        # A request may resume on the other kind of gang, and its seed must still give the same file.
        kinds = [(stage.device, stage.dtype) for stage in (self.transformer, self.unguided) if stage is not None]
        if len(set(kinds)) > 1:
            raise ValueError(f"transformer and unguided must have the same device and dtype (got {kinds})")
        return self

    @model_validator(mode="after")
    def _check_file_times(self) -> Self:
        # A file begins before a decoder is free for it, and may wait as long as its request.
        reason = ": the file of a request that waits for a decoder would count as given up"
        for name in ("http.request_timeout_s", "jobs.run_timeout_s"):
            _check_order(self, "media.keep_s", name, reason)
        return self

    @classmethod
    def parse(cls, values: dict[str, Any]) -> AppConfig:
        """Validate plain values; raise ConfigError for missing, bad and unknown keys, with the nearest known one."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [_describe_fault(fault, cls) for fault in error.errors()]
            raise ConfigError("the configuration is wrong: " + "; ".join(faults)) from None

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any] | None = None) -> AppConfig:
        """Read a YAML file with ``overrides`` (dotted key -> value) over its keys; raise as :meth:`parse`."""
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"{path}: cannot be read as YAML: {error}") from None
        if not isinstance(values, dict):
            raise ConfigError(f"{path}: holds no mapping of keys")
        for dotted, value in (overrides or {}).items():
            _set_key(values, dotted.split("."), value)
        return cls.parse(values)


def find_config_file(name: str) -> Path:
    """Return the file at a path, or the packaged one of a bare name; if there is none, raise ConfigError."""
    packaged = {path.stem: path for path in sorted(_PACKAGED.glob("*.yaml"))}
    if not Path(name).is_file() and name in packaged:
        return packaged[name]
    if not Path(name).exists():
        raise ConfigError(f"{name}: no such file, nor one of the packaged {', '.join(packaged)}")
    return Path(name)


def _set_key(values: dict[str, Any], path: list[str], value: Any) -> None:
    for depth, key in enumerate(path[:-1], start=1):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{'.'.join(path)}: no such key; {'.'.join(path[:depth])} is a single value")
    values[path[-1]] = value


def _describe_fault(fault: Any, root: type[BaseModel]) -> str:
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "value_error":  # one of ours, which names its key
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    if fault["type"] == "string_pattern_mismatch" and "node_labels" in fault["loc"]:
        hint = "is no label of a node, such as H200, or for values also !H200 or in(H100,H200)"
        return f"{where}: {fault['input']!r} {hint}"
    if fault["type"] != "extra_forbidden":
        return f"{where}{_show_given(fault)}: {fault['msg']}"
    model: Any = root
    for part in fault["loc"][:-1]:
        annotation = model.model_fields[part].annotation
        # The model of `Autoscaling | None`.
        model = next((kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    near = difflib.get_close_matches(str(fault["loc"][-1]), model.model_fields, n=1)
    hint = f"did you mean {near[0]}?" if near else f"known are {sorted(model.model_fields)}"
    return f"{where}: no such key; {hint}"


def _show_given(fault: Any) -> str:
    """Return "=" and the given value; "" for one that is not plain, or may be a URL with a password."""
    given = fault["input"]
    is_plain = given is None or isinstance(given, str | int | float)
    if fault["type"] == "missing" or not is_plain or fault["loc"] in _URLS or "://" in str(given):
        return ""
    return f"={given!r}"
