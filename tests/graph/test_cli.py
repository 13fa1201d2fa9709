"""The ``cosmos3`` command's own words; that it serves, generates and checks is shown by README's test."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(600)]


def cosmos3(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deployments.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_help_loads_neither_torch_nor_ray() -> None:
    code = """
import sys
from deployments.cli import main
try:
    main(["--help"])
except SystemExit as done:
    assert done.code == 0
assert not {"torch", "ray"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    for name in ("generate", "serve", "check", "demo", "tiny-checkpoint", "bench"):
        assert name in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--checkpoint", "no-such-folder"), "local path"),
        (("serve", "--config", "no-such-file.yaml"), "cannot be read"),
        (("generate", "--prompt", "a car", "--url", "http://127.0.0.1:9"), "127.0.0.1:9"),
        (("check", "--url", "http://127.0.0.1:9", "--timeout", "2"), "127.0.0.1:9"),
    ],
    ids=["checkpoint", "config", "generate", "check"],
)
def test_what_cannot_be_is_one_line_and_exit_2(arguments: tuple[str, ...], said: str) -> None:
    done = cosmos3(*arguments)
    assert done.returncode in (1, 2)
    assert said in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_a_wrong_key_names_the_nearest_one(tmp_path: Path) -> None:
    config = tmp_path / "typo.yaml"
    config.write_text("checkpoint: x\nvae: {chunk_latent: 2}\n")
    done = cosmos3("serve", "--config", str(config))
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: the configuration is wrong: vae.chunk_latent: no such key; did you mean chunk_latents?"
    ]


def test_a_layout_that_cannot_be_is_refused_before_anything_starts(tiny_nano: Path, tmp_path: Path) -> None:
    config = tmp_path / "tp3.yaml"
    config.write_text(f"checkpoint: {tiny_nano}\ntransformer: {{tp: 3}}\n")
    done = cosmos3("serve", "--config", str(config))
    assert done.returncode == 2
    assert "tp=3: allowed is one of 1, 2, 4" in done.stderr
