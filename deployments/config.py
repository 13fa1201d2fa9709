"""The app's configuration: one pydantic model at the edge, a YAML file a deployment. Every flag is a key here."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cosmos3_core.errors import Cosmos3Error

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


# Of processes that mostly wait.
_LIGHT_CPUS = 0.1
# Processes use one card at most; Ray would give out several, whole ones only.
_ShareOfCard = Annotated[float, AfterValidator(_check_share)]
_Name = Annotated[str, StringConstraints(pattern="^[a-z][a-z0-9_-]{0,31}$")]
# As in the header Host: IPv6 addresses in brackets.
_Host = Annotated[str, StringConstraints(pattern=r"^([A-Za-z0-9_.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])$")]
DEFAULT_CLASS = "standard"


class ConfigError(Cosmos3Error):
    """A configuration file or key is wrong; the message lists every fault."""


class Strict(BaseModel):
    """Base of every section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HttpConfig(Strict):
    """The HTTP side: where it listens, and the bounds of its requests."""

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
    def _check_room(self) -> Self:
        if self.max_bodies_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_bodies_bytes={self.max_bodies_bytes} is below max_body_bytes={self.max_body_bytes}: "
                "the largest body could never be read"
            )
        return self


class MediaConfig(Strict):
    """The media store: where files lie, and for how long."""

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
    def _check_classes(self) -> Self:
        if DEFAULT_CLASS not in self.classes:
            raise ValueError(f"classes needs {DEFAULT_CLASS!r}, the class of requests that name none")
        if unfit := {name: weight for name, weight in self.classes.items() if not weight > 0}:
            raise ValueError(f"shares of classes must be above 0 (got {unfit})")
        return self

    @model_validator(mode="after")
    def _check_keep_time(self) -> Self:
        if self.keep_s < self.run_timeout_s:
            raise ValueError(f"keep_s={self.keep_s:g} is below run_timeout_s={self.run_timeout_s:g}")
        return self


class LoggingConfig(Strict):
    """Logs of replicas in Serve's log files; ranks always write JSON."""

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
    def _check_hosts(self) -> Self:
        if self.enabled and not self.hosts:
            raise ValueError("enabled needs hosts, the names that may be fetched from")
        if unfit := sorted(set(self.schemes) - {"http", "https"}):
            raise ValueError(f"schemes must be http or https (got {unfit})")
        return self


class GuardrailsConfig(Strict):
    """Checks of prompts before a request is accepted, and of pictures before they are in a file."""

    adapter: str | None = Field(
        None, description="cosmos-guardrail (NVIDIA's package), or module:Class; null: nothing is looked at"
    )
    options: dict[str, str | int | float | bool] = Field(
        default_factory=dict, description="keyword arguments of the adapter"
    )
    clients_may_disable: bool = Field(False, description="whether a request may say guardrails: false")
    text_timeout_s: float = Field(60, gt=0)
    frames_timeout_s: float = Field(300, gt=0, description="for one chunk")


class Autoscaling(Strict):
    """Bounds between which Serve scales a stage by its ongoing requests, those that wait for it included."""

    min_replicas: int = Field(1, ge=1)
    max_replicas: int = Field(1, ge=1)
    target_ongoing_requests: float = Field(2, gt=0, description="per replica, averaged over look_back_period_s")
    upscale_delay_s: float = Field(30, ge=0, description="how long there has to be too much to do")
    downscale_delay_s: float = Field(600, ge=0, description="how long there has to be too little to do")
    look_back_period_s: float = Field(30, gt=0)
    metrics_interval_s: float = Field(10, gt=0, description="between two counts")

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.max_replicas < self.min_replicas:
            raise ValueError(f"max_replicas={self.max_replicas} is below min_replicas={self.min_replicas}")
        if self.look_back_period_s < self.metrics_interval_s:
            raise ValueError(
                f"look_back_period_s={self.look_back_period_s:g} is below metrics_interval_s="
                f"{self.metrics_interval_s:g}: there would be nothing to average over"
            )
        return self


class Stage(Strict):
    """Base of every deployment's section: resources, bounds, scaling."""

    num_cpus: float = Field(1, ge=0, description="of one replica")
    num_gpus: _ShareOfCard = Field(0, description="of one replica; what is left of a card goes to other processes")
    node_labels: dict[_LabelKey, _LabelSelector] = Field(
        default_factory=dict, description="what nodes must carry: label -> 'H200', '!H200', 'in(H100,H200)'"
    )
    num_replicas: int = Field(1, ge=1, description="fixed number; not together with autoscaling")
    autoscaling: Autoscaling | None = None
    max_ongoing_requests: int = Field(16, ge=1, description="per replica")
    max_queued_requests: int = Field(64, ge=1, description="per caller; beyond it callers get 429")
    graceful_shutdown_timeout_s: float = Field(120, gt=0, description="a stopping replica may finish its requests")
    health_check_period_s: float = Field(5, gt=0)
    health_check_timeout_s: float = Field(30, gt=0)

    @model_validator(mode="after")
    def _check_scaling(self) -> Self:
        if self.autoscaling is not None and self.num_replicas != 1:
            raise ValueError(f"num_replicas={self.num_replicas} and autoscaling exclude each other")
        return self


class Device(Strict):
    """The device of a stage's weights, and their dtype."""

    device: str = Field("cpu", description="torch device string")
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(None, description="null keeps what is stored")
    num_threads: int = Field(1, ge=1, description="torch's CPU threads in each process")


class GangStage(Stage, Device):
    """One replica = one gang: a leader and its ranks in one placement group."""

    num_cpus: float = Field(_LIGHT_CPUS, ge=0, description="of the leader")
    cpus_per_rank: float = Field(1, ge=0)
    gpus_per_rank: _ShareOfCard = Field(0, description="below 1, the rest of the card is for other processes")
    placement_strategy: str = Field(
        "STRICT_PACK",
        pattern="^(STRICT_PACK|PACK|STRICT_SPREAD|SPREAD)$",
        description="of a gang's ranks: all on one node, on few, each on another node, on many",
    )
    start_timeout_s: float = Field(1800, gt=0, description="for each phase of a gang's bring-up, loading among them")

    @property
    def num_ranks(self) -> int:
        """Ranks in a gang."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _check_leader(self) -> Self:
        if self.num_gpus:
            raise ValueError(f"num_gpus={self.num_gpus:g}: the leader of a gang uses no GPU; set gpus_per_rank instead")
        if _is_on_gpu(self) and ":" in self.device:
            raise ValueError(
                f"device={self.device}: Ray decides which card a rank gets; say {self.device.split(':')[0]}"
            )
        return self

    def _check_shares(self) -> None:
        """Check that every rank has a card, and no two ranks of a gang the same one."""
        if not _is_on_gpu(self):
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

    max_ongoing_requests: int = Field(64, ge=1, description="per gang; all of them wait with the leader")
    tp: int = Field(1, ge=1, description="ranks that share every layer's heads and FFN columns")
    cfg: Annotated[int, AfterValidator(_check_branches)] = Field(
        1, description="2 runs the guidance branches side by side"
    )
    sp: int = Field(1, ge=1, description="ranks that share the generated tokens")
    max_jobs: int = Field(16, ge=1, description="images, and as many videos, that one gang takes at once")
    max_held_bytes: int = Field(8 * 2**30, ge=1, description="state and prompts of begun requests, per rank")
    first_step_timeout_s: float = Field(300, gt=0, description="for beginning a request, compiling for it included")
    quantum_timeout_s: float = Field(60, gt=0, description="then a silent gang counts as hung; more if it is slow")
    save_period_s: float = Field(5, gt=0, description="between saved states of a running request")
    text_cache_bytes: int = Field(4 * 2**30, ge=0, description="keys and values of kept prompts, per rank")

    @property
    def num_ranks(self) -> int:
        """Ranks in a gang."""
        return self.tp * self.cfg * self.sp

    @model_validator(mode="after")
    def _check_queue(self) -> Self:
        # The leader refuses what is too much, class by class. In Serve's router an image would wait behind videos.
        most = 2 * self.max_jobs
        if self.max_ongoing_requests <= most:
            raise ValueError(f"max_ongoing_requests={self.max_ongoing_requests} must exceed 2 * max_jobs = {most}")
        return self

    @model_validator(mode="after")
    def _check_cards(self) -> Self:
        self._check_shares()
        return self


class VideoVAEStage(GangStage):
    """Decoder of frames and encoder of given pictures."""

    max_ongoing_requests: int = Field(2, ge=1, description="clips that one replica works on side by side")
    ranks: int = Field(1, ge=1, le=64, description="of a gang; they split every frame between them")
    beside_transformer: bool = Field(
        False, description="rank i takes card i of its node, whoever else works there, and none of Ray's shares"
    )
    chunk_latents: int | None = Field(
        None, ge=1, description="latent frames per decoded chunk; null: 1 on a CPU, on a GPU more of small frames"
    )
    preview_cache_dir: Path | None = Field(
        None, description="where a node keeps fitted maps of previews; null: each start of the app fits its own"
    )
    first_chunk_timeout_s: float = Field(600, gt=0, description="for a clip's first two chunks, compiling included")
    chunk_timeout_s: float = Field(300, gt=0, description="for any other chunk; then a silent gang counts as hung")

    @property
    def num_ranks(self) -> int:
        """Ranks in a gang."""
        return self.ranks

    @model_validator(mode="after")
    def _check_cards(self) -> Self:
        if not self.beside_transformer:
            self._check_shares()
            return self
        if not _is_on_gpu(self) or self.gpus_per_rank:
            raise ValueError(
                f"beside_transformer needs device=cuda and gpus_per_rank=0 (got {self.device} and "
                f"{self.gpus_per_rank:g})"
            )
        if self.placement_strategy != "STRICT_PACK":
            raise ValueError(f"beside_transformer needs STRICT_PACK, one node (got {self.placement_strategy})")
        return self


class AudioVAEStage(Stage, Device):
    """The decoder of sound, of apps whose checkpoint makes sound."""

    enabled: bool | None = Field(None, description="null: if the checkpoint makes sound")
    max_ongoing_requests: int = Field(2, ge=1, description="clips whose sound one replica decodes side by side")

    @model_validator(mode="after")
    def _check_cards(self) -> Self:
        if _is_on_gpu(self) and not self.num_gpus:
            raise ValueError(f"device={self.device} needs a GPU: set num_gpus, 1 for a whole card")
        return self


def _is_on_gpu(stage: Device) -> bool:
    return stage.device.partition(":")[0] == "cuda"


class EncoderStage(Stage):
    """The mp4 encoder."""

    max_ongoing_requests: int = Field(2, ge=1, description="clips that one replica encodes side by side")


class GuardrailStage(Stage):
    """Runs the adapter of ``guardrails``; there where one is configured."""

    max_ongoing_requests: int = Field(8, ge=1, description="prompts and chunks that one replica looks at at once")


class IngressStage(Stage):
    """The HTTP side."""

    num_cpus: float = Field(_LIGHT_CPUS, ge=0, description="of one replica")
    max_ongoing_requests: int = Field(256, ge=1, description="per replica")


class TokenizerStage(Stage):
    """Prompts to token ids."""

    num_cpus: float = Field(_LIGHT_CPUS, ge=0, description="of one replica")


class DirectorStage(Stage):
    """The Director: admission, queue and the pipeline of requests."""

    num_cpus: float = Field(_LIGHT_CPUS, ge=0, description="of one replica")
    max_ongoing_requests: int = Field(512, ge=1, description="per replica, those that wait for their turn included")
    max_attempts: int = Field(3, ge=1, description="tries of a stage whose process died")
    chunk_window: int = Field(2, ge=1, description="decoded chunks of a clip that may exist before they are encoded")


class AppConfig(Strict):
    """The whole app."""

    checkpoint: Path = Field(description="directory in the published layout, the same path on every node")
    name: str = Field("cosmos3", pattern="^[A-Za-z0-9_.-]+$", description="of the Serve application")
    model_name: str | None = Field(None, description="what clients call the model; null = the checkpoint's name")
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
        None, description="gangs for requests without guidance; with cfg=2 half of a gang would wait for them"
    )
    vae: VideoVAEStage = VideoVAEStage()
    audio: AudioVAEStage = AudioVAEStage()
    encoder: EncoderStage = EncoderStage()
    guardrail: GuardrailStage = GuardrailStage()

    @model_validator(mode="after")
    def _check_gangs(self) -> Self:
        # A request may be begun by one kind of gang and go on with the other; a seed gives one file.
        kinds = [(stage.device, stage.dtype) for stage in (self.transformer, self.unguided) if stage is not None]
        if len(set(kinds)) > 1:
            raise ValueError(f"transformer and unguided must have the same device and dtype (got {kinds})")
        return self

    @model_validator(mode="after")
    def _check_file_times(self) -> Self:
        # A file is begun before there is a decoder for it, which may be as long as its request has.
        longest = {
            "http.request_timeout_s": self.http.request_timeout_s,
            "jobs.run_timeout_s": self.jobs.run_timeout_s,
        }
        for name, limit_s in longest.items():
            if self.media.keep_s < limit_s:
                raise ValueError(
                    f"media.keep_s={self.media.keep_s:g} is below {name}={limit_s:g}: the file of a request that waits "
                    "for a decoder would count as given up"
                )
        return self

    @classmethod
    def parse(cls, values: dict[str, Any]) -> AppConfig:
        """Return the configuration of plain values.

        Raises:
            ConfigError: unknown keys (with the nearest known one), missing ones, values out of range.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            faults = [_describe_fault(fault, cls) for fault in error.errors()]
            raise ConfigError("the configuration is wrong: " + "; ".join(faults)) from None

    @classmethod
    def read(cls, path: Path, overrides: dict[str, Any] | None = None) -> AppConfig:
        """Read the configuration in a YAML file, with some keys replaced.

        Args:
            path: the file; see :func:`config_file`.
            overrides: dotted key -> value, as command-line flags give them.

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
            _set_key(values, dotted.split("."), value)
        return cls.parse(values)


def config_file(name: str) -> Path:
    """Return the configuration file at a path, or the packaged one of a bare name.

    Raises:
        ConfigError: there is none; lists the packaged ones.
    """
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
    if fault["type"] == "value_error":  # one of ours, which names what it is about
        return f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"])
    if fault["type"] == "string_pattern_mismatch" and "node_labels" in fault["loc"]:
        text = fault["input"]
        return f"{where}: {text!r} is no label of a node, such as H200, or for values also !H200 or in(H100,H200)"
    if fault["type"] != "extra_forbidden":
        return f"{where}{_show_given(fault)}: {fault['msg']}"
    model: Any = root
    for part in fault["loc"][:-1]:
        annotation = model.model_fields[part].annotation
        # Of `Autoscaling | None` the model.
        model = next(iter(kind for kind in get_args(annotation) if kind is not type(None)), annotation)
    near = difflib.get_close_matches(str(fault["loc"][-1]), model.model_fields, n=1)
    return f"{where}: no such key" + (
        f"; did you mean {near[0]}?" if near else f"; known are {sorted(model.model_fields)}"
    )


def _show_given(fault: Any) -> str:
    """Return "=" and the given value, unless it is no plain value, or may be a URL with a password."""
    given = fault["input"]
    is_plain = given is None or isinstance(given, str | int | float)
    if fault["type"] == "missing" or not is_plain or fault["loc"] in _URLS or "://" in str(given):
        return ""
    return f"={given!r}"
