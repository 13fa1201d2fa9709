"""What a bring-up works with, without Ray: what an app needs, reasons in one line, processes that must not stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deployments.capacity import missing, needed
from deployments.config import DEFAULT_CONFIG, AppConfig
from deployments.processes import no_leftovers
from deployments.ray_session import LostError, in_time, reason


def config(checkpoint: Path, **overrides: object) -> AppConfig:
    dotted = {key.replace("__", "."): value for key, value in overrides.items()}
    return AppConfig.read(DEFAULT_CONFIG, {"checkpoint": str(checkpoint), **dotted})


def test_the_laptop_configuration_fits_two_cores(tiny_nano: Path) -> None:
    assert needed(config(tiny_nano)) == pytest.approx({"CPU": 1.9, "GPU": 0})
    assert missing(needed(config(tiny_nano)), {"CPU": 2.0}) == ""


def test_replicas_gangs_and_autoscaling_count(tiny_nano: Path) -> None:
    gangs = config(tiny_nano, transformer__num_replicas=3, transformer__gpus_per_rank=1)
    assert needed(gangs) == pytest.approx({"CPU": 1.9 + 2 * 0.6, "GPU": 3})
    scaled = config(tiny_nano, vae__autoscaling={"min_replicas": 2, "max_replicas": 9}, vae__num_gpus=0.5)
    assert needed(scaled) == pytest.approx({"CPU": 2.4, "GPU": 1})


def test_what_is_missing_is_said_in_numbers() -> None:
    needs = {"CPU": 1.9, "GPU": 2.0}
    assert missing(needs, {"CPU": 1.0}) == (
        "0.9 CPU and 2 GPU missing: the app needs 1.9 CPU and 2 GPU, Ray has 1 CPU and 0 GPU for it."
    )
    # Ray counts in ten-thousandths; sums of tenths are not exact.
    assert missing({"CPU": 0.1 + 0.2, "GPU": 0.0}, {"CPU": 0.3}) == ""


def test_a_reason_is_what_the_innermost_traceback_ends_with() -> None:
    text = (
        "The deployment failed to start 3 times in a row. Error:\n\x1b[36mray::Replica.init()\x1b[39m (pid=1)\n"
        "RuntimeError: Traceback (most recent call last):\n  File 'a.py', line 1\n"
        "ray.exceptions.RayTaskError(CorruptFileError): \x1b[36mray::Rank.load()\x1b[39m (pid=2)\n"
        "cosmos3_core.errors.CorruptFileError: /tmp/a: truncated:\n  1000 bytes."
    )
    assert reason(text) == "CorruptFileError: /tmp/a: truncated: 1000 bytes."
    assert reason(ValueError("plain\nand simple")) == "plain and simple"
    assert len(reason("x" * 10_000)) < 1000


def test_a_call_that_hangs_is_given_up() -> None:
    start_s = time.monotonic()
    with pytest.raises(LostError, match="has not answered for 0.2 s"), in_time(0.2):
        time.sleep(60)
    assert time.monotonic() - start_s < 10
    with in_time(60):
        pass
    with pytest.raises(KeyboardInterrupt), in_time(60):
        raise KeyboardInterrupt


def test_no_process_outlives_the_block(tmp_path: Path) -> None:
    """Not even one whose parent is gone and that is in a session of its own."""
    pid_file = tmp_path / "pid"
    child = (
        "import os, subprocess, sys\n"
        "sleeper = subprocess.Popen(['sleep', '600'], start_new_session=True)\n"
        f"open({str(pid_file)!r}, 'w').write(str(sleeper.pid))"
    )
    bystander = subprocess.Popen(["sleep", "600"])
    try:
        with no_leftovers(os.environ):
            subprocess.run([sys.executable, "-c", child], check=True, timeout=60)
            pid = int(pid_file.read_text())
            assert is_running(pid)
        assert not is_running(pid)
        assert bystander.poll() is None
        assert not [name for name in os.environ if name.startswith("COSMOS3_STARTED")]
    finally:
        bystander.kill()
        bystander.wait()


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
