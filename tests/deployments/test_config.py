"""The configuration: files load, keys are frozen, faults are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from deployments.config import AppConfig, ConfigError

CONFIGS = Path(__file__).parents[2] / "cluster" / "configs"

STAGE = {
    "num_cpus",
    "num_gpus",
    "num_replicas",
    "autoscaling",
    "max_ongoing_requests",
    "max_queued_requests",
    "graceful_shutdown_timeout_s",
    "health_check_period_s",
    "health_check_timeout_s",
}
DEVICE = {"device", "dtype", "num_threads"}
KEYS = {
    "": {
        "checkpoint",
        "name",
        "model_name",
        "http",
        "ingress",
        "director",
        "tokenizer",
        "transformer",
        "vae",
        "encoder",
    },
    "http": {"host", "port", "max_body_bytes", "request_timeout_s", "drain_timeout_s"},
    "ingress": STAGE,
    "director": STAGE | {"max_requests", "max_attempts", "chunk_window"},
    "tokenizer": STAGE,
    "transformer": STAGE
    | DEVICE
    | {
        "tp",
        "cfg",
        "sp",
        "cpus_per_rank",
        "gpus_per_rank",
        "placement_strategy",
        "max_jobs",
        "max_held_bytes",
        "first_step_timeout_s",
        "quantum_timeout_s",
        "save_period_s",
        "start_timeout_s",
        "text_cache_bytes",
    },
    "vae": STAGE | DEVICE | {"chunk_latents"},
    "encoder": STAGE,
}


def test_the_keys_are_these_and_no_others() -> None:
    assert set(AppConfig.model_fields) == KEYS[""]
    for name in KEYS.keys() - {""}:
        model = AppConfig.model_fields[name].annotation
        assert isinstance(model, type)
        assert issubclass(model, BaseModel)
        assert set(model.model_fields) == KEYS[name], name


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_every_file_loads_and_builds(path: Path, tiny_nano: Path) -> None:
    from deployments.app import build_app

    config = AppConfig.read(path, {"checkpoint": str(tiny_nano)})
    assert build_app(config) is not None


def test_the_laptop_fits_two_cores() -> None:
    config = AppConfig.read(CONFIGS / "laptop.yaml")
    stages = (config.ingress, config.director, config.tokenizer, config.transformer, config.vae, config.encoder)
    assert sum(stage.num_cpus for stage in stages) + config.transformer.cpus_per_rank <= 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"transformr": {}}, "transformr: no such key; did you mean transformer?"),
        ({"vae": {"chunk_latent": 2}}, "vae.chunk_latent: no such key; did you mean chunk_latents?"),
        ({"http": {"port": 70000}}, "http.port: "),
        ({"vae": {"num_threads": 0}}, "vae.num_threads: "),
        ({"vae": {"autoscaling": {"min_replicas": 3, "max_replicas": 2}}}, "max_replicas=2 is below min_replicas=3"),
        ({"name": "two words"}, "name: "),
        ({"transformer": {"placement_strategy": "TOGETHER"}}, "transformer.placement_strategy: "),
    ],
)
def test_faults_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse({"checkpoint": "x", **change})
    assert said in str(caught.value)


def test_every_fault_is_listed_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        AppConfig.parse({"nam": "x", "http": {"port": -1}})
    for part in ("checkpoint", "nam: no such key; did you mean name?", "http.port"):
        assert part in str(caught.value)


def test_overrides_and_unreadable_files(tmp_path: Path) -> None:
    config = AppConfig.read(CONFIGS / "laptop.yaml", {"http.port": 9000, "vae.dtype": "bfloat16", "name": None})
    assert (config.http.port, config.vae.dtype, config.name) == (9000, "bfloat16", "cosmos3")
    with pytest.raises(ConfigError, match="cannot be read"):
        AppConfig.read(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("[1, 2]")
    with pytest.raises(ConfigError, match="no mapping"):
        AppConfig.read(tmp_path / "list.yaml")
    (tmp_path / "broken.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        AppConfig.read(tmp_path / "broken.yaml")
