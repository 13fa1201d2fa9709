"""The configuration: shipped files load, the set of keys is frozen, errors are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deployments.config import AppConfig, Autoscaling, ConfigError, MediaConfig, find_config_file
from deployments.media.store import MediaStore
from deployments.stages.handles import StageHandles

CONFIGS = Path(__file__).parents[2] / "cluster" / "configs"

STAGE = {
    "num_cpus",
    "num_gpus",
    "node_labels",
    "num_replicas",
    "autoscaling",
    "max_ongoing_requests",
    "max_queued_requests",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
}
AUTOSCALING = {
    "min_replicas",
    "max_replicas",
    "target_ongoing_requests",
    "upscale_delay_s",
    "downscale_delay_s",
    "look_back_period_s",
    "metrics_interval_s",
}
DEVICE = {"device", "dtype", "num_threads"}
GANG = STAGE | DEVICE | {"cpus_per_rank", "gpus_per_rank", "placement_strategy", "start_timeout_s"}
KEYS = {
    "": {
        "checkpoint",
        "name",
        "model_name",
        "model_aliases",
        "http",
        "media",
        "jobs",
        "logging",
        "auth",
        "remote_media",
        "guardrails",
        "ingress",
        "director",
        "tokenizer",
        "transformer",
        "unguided",
        "vae",
        "audio",
        "encoder",
        "guardrail",
    },
    "http": {
        "host",
        "port",
        "max_body_bytes",
        "max_bodies_bytes",
        "request_timeout_s",
        "drain_timeout_s",
        "cors_origins",
        "allowed_hosts",
    },
    "media": {"directory", "archive", "max_bytes", "keep_s"},
    "jobs": {
        "database",
        "max_running_images",
        "max_running_videos",
        "max_queued",
        "max_queued_per_key",
        "max_running_per_key",
        "classes",
        "keep_s",
        "max_kept",
        "run_timeout_s",
        "lease_s",
        "max_attempts",
        "max_fault_wait_s",
        "checkpoint_period_s",
        "poll_s",
        "max_followers",
    },
    "logging": {"encoding", "level"},
    "auth": {"enabled"},
    "remote_media": {"enabled", "hosts", "schemes", "max_bytes", "timeout_s", "max_redirects"},
    "guardrails": {"adapter", "options", "clients_may_disable", "text_timeout_s", "frames_timeout_s"},
    "guardrail": STAGE,
    "ingress": STAGE,
    "director": STAGE | {"max_attempts", "chunk_window"},
    "tokenizer": STAGE,
    "transformer": GANG
    | {
        "tp",
        "cfg",
        "sp",
        "max_jobs",
        "max_held_bytes",
        "first_step_timeout_s",
        "quantum_timeout_s",
        "save_period_s",
        "text_cache_bytes",
    },
    "audio": STAGE | DEVICE | {"enabled", "chunk_timeout_s"},
    "vae": GANG
    | {
        "ranks",
        "beside_transformer",
        "chunk_latents",
        "preview_cache_dir",
        "first_chunk_timeout_s",
        "chunk_timeout_s",
    },
    "encoder": STAGE | {"chunk_timeout_s"},
}


def test_the_set_of_keys_is_frozen() -> None:
    assert set(AppConfig.model_fields) == KEYS[""]
    for name in KEYS.keys() - {""}:
        model = AppConfig.model_fields[name].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        assert set(model.model_fields) == KEYS[name], name
    assert set(Autoscaling.model_fields) == AUTOSCALING


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_loads_and_builds(path: Path, tiny_nano: Path) -> None:
    from deployments.app import build_app

    config = AppConfig.read(path, {"checkpoint": str(tiny_nano)})
    assert build_app(config) is not None


def test_the_laptop_fits_two_cores() -> None:
    config = AppConfig.read(CONFIGS / "laptop.yaml")
    stages = (
        config.ingress,
        config.director,
        config.tokenizer,
        config.transformer,
        config.vae,
        config.encoder,
        config.audio,
    )
    ranks = config.transformer.cpus_per_rank + config.vae.cpus_per_rank
    assert sum(stage.num_cpus for stage in stages) + ranks <= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformr": {}}, "transformr: no such key; did you mean transformer?"),
        ({"vae": {"chunk_latent": 2}}, "vae.chunk_latent: no such key; did you mean chunk_latents?"),
        ({"http": {"port": 70000}}, "http.port="),
        ({"http": {"max_bodies_bytes": 1}}, "http: max_bodies_bytes=1 is below max_body_bytes=100663296"),
        ({"vae": {"num_threads": 0}}, "vae.num_threads="),
        ({"vae": {"dtype": "fp16"}}, "vae.dtype='fp16': Input should be 'float32', 'bfloat16' or 'float16'"),
        ({"encoder": {"max_queued_requests": 0}}, "encoder.max_queued_requests="),
        ({"http": {"request_timeout_s": float("inf")}}, "http.request_timeout_s="),
        ({"media": {"max_bytes": 0}}, "media.max_bytes="),
        ({"media": {"path": "x"}}, "media.path: no such key"),
        ({"media": {"keep_s": 600}}, "media.keep_s=600 is below http.request_timeout_s=3600: the file of a request"),
        ({"http": {"request_timeout_s": 86401}}, "media.keep_s=86400 is below http.request_timeout_s=86401"),
        ({"media": {"keep_s": 7199}}, "media.keep_s=7199 is below jobs.run_timeout_s=7200"),
        ({"jobs": {"classes": {"batch": 1}}}, "classes needs 'standard'"),
        ({"jobs": {"classes": {"standard": 0}}}, "shares of classes must be above 0"),
        ({"jobs": {"keep_s": 60}}, "keep_s=60 is below run_timeout_s=7200"),
        ({"remote_media": {"enabled": True}}, "enabled needs hosts"),
        ({"remote_media": {"schemes": ["file"]}}, "schemes must be http or https (got ['file'])"),
        ({"http": {"allowed_hosts": ["a:80"]}}, "http.allowed_hosts.0='a:80': String should match pattern"),
        ({"http": {"allowed_hosts": ["*"]}}, "http.allowed_hosts.0='*': String should match pattern"),
        ({"transformer": {"max_jobs": 32}}, "max_ongoing_requests=64 must exceed 2 * max_jobs = 64"),
        ({"unguided": {"dtype": "float16"}}, "transformer and unguided must have the same device and dtype"),
        ({"transformer": {"device": "cuda:1", "gpus_per_rank": 1}}, "Ray decides which card a rank gets; say cuda"),
        ({"unguided": {"num_gpus": 1}}, "the leader of a gang uses no GPU"),
        ({"vae": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "max_replicas=2 is below min_replicas=3"),
        ({"name": "two words"}, "name="),
        ({"transformer": {"placement_strategy": "TOGETHER"}}, "transformer.placement_strategy="),
        ({"transformer": {"cfg": 3}}, "cfg: must be 1 or 2, as there are two guidance branches (got 3)"),
        ({"transformer": {"gpus_per_rank": 1.5}}, "transformer.gpus_per_rank: must be 0 to 1, a card or a share of"),
        ({"transformer": {"num_gpus": 1}}, "num_gpus=1: the leader of a gang uses no GPU; set gpus_per_rank instead"),
        ({"transformer": {"device": "cuda"}}, "transformer: device=cuda needs a GPU: set gpus_per_rank, 1 for a card"),
        (
            {"transformer": {"device": "cuda", "gpus_per_rank": 0.5, "tp": 2}},
            "gpus_per_rank=0.5: ranks of a gang cannot share a card, which NCCL refuses; set more than 0.5",
        ),
        ({"vae": {"num_gpus": 2}}, "vae.num_gpus: must be 0 to 1, a card or a share of one (got 2)"),
        ({"vae": {"num_gpus": 1}}, "vae: num_gpus=1: the leader of a gang uses no GPU; set gpus_per_rank instead"),
        ({"vae": {"device": "cuda:0"}}, "vae: device=cuda:0: Ray decides which card a rank gets; say cuda"),
        ({"vae": {"device": "cuda"}}, "vae: device=cuda needs a GPU: set gpus_per_rank, 1 for a card a rank"),
        (
            {"vae": {"device": "cuda", "gpus_per_rank": 0.4, "ranks": 2}},
            "vae: gpus_per_rank=0.4: ranks of a gang cannot share a card, which NCCL refuses; set more than 0.5",
        ),
        (
            {"vae": {"beside_transformer": True}},
            "beside_transformer needs device=cuda and gpus_per_rank=0 (got cpu",
        ),
        (
            {"vae": {"beside_transformer": True, "device": "cuda", "gpus_per_rank": 0.1}},
            "beside_transformer needs device=cuda and gpus_per_rank=0 (got cuda and 0.1)",
        ),
        (
            {"vae": {"beside_transformer": True, "device": "cuda", "placement_strategy": "PACK"}},
            "beside_transformer needs STRICT_PACK, one node (got PACK)",
        ),
        ({"audio": {"device": "cuda"}}, "audio: device=cuda needs a GPU: set num_gpus, 1 for a whole card"),
        ({"vae": {"node_labels": {"zone": "a b"}}}, "vae.node_labels.zone: 'a b' is no label of a node, such as H200"),
        ({"vae": {"node_labels": {"gpu": "in(H100, H200)"}}}, "vae.node_labels.gpu: 'in(H100, H200)' is no label of a"),
        ({"vae": {"node_labels": {"a b": "c"}}}, "vae.node_labels.a b.[key]: 'a b' is no label of a node"),
        (
            {"vae": {"num_replicas": 2, "autoscaling": {"max_replicas": 2}}},
            "vae: num_replicas=2 and autoscaling exclude each other",
        ),
        (
            {"vae": {"autoscaling": {"look_back_period_s": 5}}},
            "vae.autoscaling: look_back_period_s=5 is below metrics_interval_s=10: there would be nothing to average",
        ),
    ],
)
def test_errors_name_key_and_value(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse({"checkpoint": "x", **change})
    assert said in str(caught.value)


URL = "postgresql+psycopg://user:hush@host/jobs"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"jobs": {"database": URL}}, "checkpoint: Field required"),
        ({"checkpoint": "x", "jobs": {"database": [URL]}}, "jobs.database: Input should be a valid string"),
        ({"checkpoint": "x", "jobs": {"database": 5}}, "jobs.database: Input should be a valid string"),
        ({"checkpoint": "x", "media": {"archive": {"url": URL}}}, "media.archive: Input should be a valid string"),
        ({"checkpoint": "x", "jobs": URL}, "jobs: Input should be a valid dictionary"),
        ({"checkpoint": "x", "jobs": [URL]}, "jobs: Input should be a valid dictionary"),
        ({"checkpoint": "x", "jobs": {"max_queued": URL}}, "jobs.max_queued: Input should be a valid integer"),
        (
            {"checkpoint": "x", "jobs": {"max_queued": {"password": "hush"}}},
            "jobs.max_queued: Input should be a valid integer",
        ),
        ({"checkpoint": "x", "jobs": {"database": URL, "keep_s": 1}}, "jobs: keep_s=1 is below run_timeout_s=7200"),
        ({"checkpoint": "x", "jobs": {"databse": URL}}, "jobs.databse: no such key; did you mean database?"),
        ({"checkpoint": "x", "jobs": {"database": URL, "poll_s": 0}}, "jobs.poll_s=0: Input should be greater than 0"),
    ],
)
def test_errors_show_no_passwords(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse(values)
    assert said in str(caught.value)
    assert "hush" not in str(caught.value)


def test_a_configuration_shows_no_passwords() -> None:
    config = AppConfig.parse({"checkpoint": "x", "jobs": {"database": URL}, "media": {"archive": "s3://me:hush@a/b"}})
    assert "hush" not in f"{config!r} {config}"
    assert config.jobs.database == config.model_dump()["jobs"]["database"] == URL


@pytest.mark.parametrize("selector", ["H200", "!H200", "in(H100,H200)", "!in(H100)"])
def test_labels_follow_rays_rules(selector: str) -> None:
    from ray.util.placement_group import validate_placement_group

    labels = {"ray.io/accelerator-type": selector}
    config = AppConfig.parse({"checkpoint": "x", "transformer": {"node_labels": labels}})
    assert config.transformer.node_labels == labels
    validate_placement_group([{"CPU": 1}], bundle_label_selector=[labels])


def test_a_stages_labels_and_a_gangs_shares_reach_serve(tiny_nano: Path) -> None:
    from deployments.app import build_app

    config = AppConfig.read(
        find_config_file("four-gpus"),
        {"checkpoint": str(tiny_nano), "vae.node_labels": {"zone": "a"}, "transformer.node_labels": {"zone": "!a"}},
    )
    options = {}
    for stage in _deployments(build_app(config)):
        options[stage.name] = (stage.ray_actor_options, stage._replica_config)
    gang, replica = options["Transformer"]
    assert gang == {"num_cpus": 0.1, "num_gpus": 0.0}
    assert replica.placement_group_strategy == "STRICT_PACK"
    assert replica.placement_group_bundles == [{"CPU": 1.1, "GPU": 0.8}, *[{"CPU": 1.0, "GPU": 0.8}] * 3]
    assert replica.placement_group_bundle_label_selector == [{"zone": "!a"}] * 4
    vae, replica = options["VideoVAE"]
    assert vae == {"num_cpus": 0.1, "num_gpus": 0.0}
    assert replica.placement_group_bundles == [{"CPU": 1.1}, *[{"CPU": 1.0}] * 3]
    assert replica.placement_group_bundle_label_selector == [{"zone": "a"}] * 4
    assert options["AudioVAE"][0] == {"num_cpus": 1.0, "num_gpus": 0.05}
    assert "label_selector" not in options["Mp4Encoder"][0]


def _deployments(application: Any) -> list[Any]:
    """List every deployment of an application, including bound ones."""
    bound = application._bound_deployment
    found = [bound]
    for argument in bound.init_args:
        for handle in vars(argument).values() if isinstance(argument, StageHandles) else [argument]:
            if hasattr(handle, "_bound_deployment"):
                found += _deployments(handle)
    return found


def test_every_process_opens_the_store_itself(tiny_nano: Path, tmp_path: Path) -> None:
    from deployments.app import build_app

    media = {"directory": str(tmp_path / "media"), "max_bytes": 7, "keep_s": 7200}
    app = build_app(AppConfig.parse({"checkpoint": tiny_nano, "media": media}))
    bound = {}
    for deployment in _deployments(app):
        sections = [getattr(argument, "media", argument) for argument in deployment.init_args]
        bound[deployment.name] = [section for section in sections if isinstance(section, MediaConfig)]
    directory = tmp_path / "media"
    section = MediaConfig(directory=directory, max_bytes=7, keep_s=7200)
    expected = {name: [section] for name in ("Ingress", "Director", "Mp4Encoder")}
    assert {name: sections for name, sections in bound.items() if sections} == expected
    assert not directory.exists(), "where they run, not where they are started from"
    assert MediaStore.of(section).directory == directory
    assert AppConfig.parse({"checkpoint": "x"}).media.directory is None


def test_a_packaged_file_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_config_file("four-gpus") == CONFIGS / "four-gpus.yaml"
    with pytest.raises(ConfigError, match="one of the packaged autoscaling, four-gpus, laptop, one-gpu"):
        find_config_file("five-gpus")
    Path("laptop").write_text("checkpoint: mine\n")
    assert AppConfig.read(find_config_file("laptop")).checkpoint == Path("mine")


def test_all_errors_are_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse({"nam": "x", "http": {"port": -1}})
    for part in ("checkpoint", "nam: no such key; did you mean name?", "http.port"):
        assert part in str(caught.value)


def test_overrides_apply_and_unreadable_files_are_named(tmp_path: Path) -> None:
    config = AppConfig.read(CONFIGS / "laptop.yaml", {"http.port": 9000, "vae.dtype": None})
    assert (config.http.port, config.vae.dtype, config.name) == (9000, None, "cosmos3")
    with pytest.raises(ConfigError, match="cannot be read"):
        AppConfig.read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no mapping"):
        AppConfig.read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        AppConfig.read(tmp_path / "broken.yaml")
