"""Refused command lines and their messages: the command runs in this process and starts nothing."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from ray.serve._private import constants

from deployments.api import proxy_guard
from deployments.launch import cli
from deployments.launch.cli import main
from tests.graph.serving import environment

REQUEST = [
    *("--prompt", "A red car.", "--num-frames", "9", "--height", "64", "--width", "96"),
    *("--steps", "3", "--seed", "5"),
]


@dataclass(frozen=True)
class Ended:
    """Exit status of a command, and its standard error."""

    returncode: int
    stderr: str


Run = Callable[..., Ended]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in an empty directory, which is the user's home as well; leave nothing in the environment."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("RAY_AUTH_MODE", raising=False)
    for name, value in (cli._RAY_ENVIRONMENT | cli._LOCAL_RAY_ENVIRONMENT).items():
        monkeypatch.setenv(name, value)

    def run(*arguments: str) -> Ended:
        try:
            status = main(arguments)
        except SystemExit as left:
            status = left.code if isinstance(left.code, int) else 1
        return Ended(status, capsys.readouterr().err)

    return run


def only_line(text: str) -> str:
    (line,) = text.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["serve", "--checkpoint", "nowhere"],
            "error: nowhere: no such directory, nor such a repository in the hub's local cache. `cosmos3",
        ),
        (
            ["serve", "--config", "no-such-file.yaml"],
            "error: no-such-file.yaml: no such file, nor one of the packaged",
        ),
        (["serve", "--checkpoint", "x", "--set", "transfomer.device=cpu"], "did you mean transformer?"),
        (
            ["serve", "--checkpoint", "x", "--set", "vae.num_thread=2"],
            "vae.num_thread: no such key; did you mean num_threads?",
        ),
        (
            ["serve", "--checkpoint", "x", "--set", "vae.autoscaling.max_replica=2"],
            "vae.autoscaling.max_replica: no such key; did you mean max_replicas?",
        ),
        (
            ["serve", "--checkpoint", "x", "--set", "http.port.x=2"],
            "http.port.x: no such key; http.port is a single value",
        ),
        (["serve", "--checkpoint", "x", "--set", "vae"], "vae.num_threads=4 (got 'vae')"),
        (["serve", "--checkpoint", "x", "--cfg", "3"], "transformer.cfg: must be 1 or 2, as there are two guidance"),
        (["serve", "--checkpoint", "x", "--tp", "two"], "transformer.tp='two': Input should be a valid integer"),
        (["serve", "--checkpoint", "x", "--sp", "0"], "transformer.sp='0': Input should be greater than or equal to 1"),
        (
            ["serve", "--checkpoint", "x", "--gangs", "-1"],
            "transformer.num_replicas='-1': Input should be",
        ),
        (
            ["serve", "--config", "four-gpus", "--set", "transformer.gpus_per_rank=1.5"],
            "transformer.gpus_per_rank: must be 0 to 1, a card or a share of one (got 1.5)",
        ),
        (
            ["serve", "--config", "autoscaling", "--gangs", "2"],
            "transformer: num_replicas=2 and autoscaling exclude each other",
        ),
        (["serve", "--checkpoint", "x", "--port", "eighty"], "http.port='eighty': Input should be a valid integer"),
        (["generate", *REQUEST], "or --url of a running app instead (got None)"),
        (["generate", *REQUEST, "--url", "http://127.0.0.1:9"], "error: http://127.0.0.1:9: nothing listens there"),
        (["serve", "--checkpoint", "x", "--set", "name.x=1"], "name.x: no such key; name is a single value"),
        (["generate", *REQUEST, "--url", "http://a b"], "such as http://127.0.0.1:8000 (got 'http://a b')"),
        (["generate", *REQUEST, "--url", f"http://{'a' * 64}.b"], "error: http://aaaa"),
        (["generate", *REQUEST, "--url", "http://127.0.0.1:9", "--out", "."], "such as clip or clip.mp4 (got '.')"),
        (
            ["demo", "--out", "no/such/folder/demo"],
            "must be a path in an existing directory (got 'no/such/folder/demo.mp4')",
        ),
        (["demo", "--checkpoint", "/proc/no/such/place"], "or a place for a new one (got '/proc/no/such/place')"),
        (
            ["generate", *REQUEST, "--url", "127.0.0.1:9"],
            "error: url must be an address such as http://127.0.0.1:8000 (got '127.0.0.1:9')",
        ),
    ],
)
def test_wrong_arguments_are_one_line(arguments: list[str], said: str, run: Run) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert said in only_line(done.stderr)


def test_the_checkpoint_is_given_once(run: Run) -> None:
    said = only_line(run("serve", "nowhere", "--model", "elsewhere").stderr)
    assert said == "error: checkpoint must be left out beside nowhere (got 'elsewhere'). Give one of them."


@pytest.mark.parametrize("command", [["serve"], ["serve", "--model"], ["generate", *REQUEST, "--model"]])
def test_a_model_may_have_the_name_that_people_type(command: list[str], run: Run) -> None:
    assert only_line(run(*command, "nowhere").stderr).startswith("error: nowhere: no such directory")


def test_underscores_are_dashes_and_a_wrong_flag_names_the_nearest_one(run: Run) -> None:
    flags = ["--prompt", "a_b", "--num_frames=9", "--num-inference-steps", "3"]
    assert only_line(run("generate", *flags, "--model", "nowhere").stderr).startswith("error: nowhere: ")
    said = run("serve", "x", "--tensr_parallel_size", "2").stderr
    assert "unknown arguments: --tensr-parallel-size 2; did you mean --tensor-parallel-size?" in said


def test_without_a_command_there_is_help(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    assert "download" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert (left.value.code, capsys.readouterr().out) == (0, "cosmos3-serve 0.1.0\n")


def test_a_broken_shard_is_refused_before_ray_starts(tiny_nano: Path, tmp_path: Path, run: Run) -> None:
    root = tmp_path / "broken"
    shutil.copytree(tiny_nano, root)
    weights = next((root / "transformer").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    said = only_line(run("serve", str(root)).stderr)
    assert f"{weights.name}: truncated" in said
    assert said.endswith("`cosmos3 tiny-checkpoint DIR` makes a small random one.")


def test_a_wrong_key_in_a_file_names_the_nearest_one(run: Run, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("checkpoint: x\nvae: {chunk_latent: 2}\n")
    done = run("serve", "--config", "typo.yaml")
    assert done.returncode == 2
    expected = "error: the configuration is wrong: vae.chunk_latent: no such key; did you mean chunk_latents?"
    assert only_line(done.stderr) == expected


def test_a_binary_configuration_file_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.yaml").write_bytes(b"checkpoint: \xff\xfe\n")
    done = run("serve", "--config", "broken.yaml")
    assert done.returncode == 2
    assert only_line(done.stderr).startswith("error: broken.yaml: cannot be read as YAML: ")


@pytest.mark.parametrize("timeout", ["nan", "inf", "-1", "0", "soon"])
def test_an_invalid_timeout_is_refused(timeout: str, run: Run) -> None:
    done = run("check", "--url", "http://127.0.0.1:9", "--timeout", timeout)
    assert done.returncode == 2
    assert f"argument --timeout: must be a number above 0, up to 1e+06 (got '{timeout}')" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "given"),
    [(["--set", "transformer.tp=3"], 3), (["--tp", "16"], 16), (["--set", "transformer.tp=2", "--tp", "3"], 3)],
)
def test_a_layout_that_cannot_be_is_refused_before_anything_starts(
    arguments: list[str], given: int, tiny_nano: Path, run: Run
) -> None:
    done = run("serve", "--checkpoint", str(tiny_nano), *arguments)
    assert done.returncode == 2
    assert "error: tp must be one of 1, 2, 4" in only_line(done.stderr)
    assert f"(got {given})" in done.stderr


def test_help_loads_nothing_heavy(tmp_path: Path) -> None:
    script = (
        "import sys\nfrom deployments.launch.cli import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print(sorted({'torch', 'ray', 'av', 'pydantic', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    commands = ("generate", "serve", "check", "demo", "tiny-checkpoint", "bench")
    for arguments in (["--help"], ["generate", "--help"], ["serve", "--help"], ["bench", "vae", "--help"]):
        command = [sys.executable, "-c", script, *arguments]
        done = subprocess.run(command, env=environment(), cwd=tmp_path, capture_output=True, text=True, timeout=100)
        assert done.returncode == 0
        assert done.stderr == "[]\n"
        assert arguments != ["--help"] or all(name in done.stdout for name in commands)


def test_an_open_ray_is_refused_unless_told_otherwise(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    for command in (["serve", "--checkpoint", "nowhere"], ["check", "--checkpoint", "nowhere"]):
        said = only_line(run(*command).stderr)
        assert said.startswith("error: RAY_AUTH_MODE=disabled lets every user of this machine run code as you."), said
        assert "nowhere: no such directory" in only_line(run(*command, "--allow-open-ray").stderr)


def test_the_callback_of_serves_proxies_is_the_guards() -> None:
    name, _, value = proxy_guard.CALLBACK_SETTING.partition("=")
    assert cli._LOCAL_RAY_ENVIRONMENT[name] == value
    assert callable(getattr(proxy_guard, value.rpartition(".")[2]))


def test_serve_still_reads_the_settings_of_the_local_ray() -> None:
    """Serve ignores names that it does not know."""
    read = Path(constants.__file__).read_text()
    names = [name for name in cli._LOCAL_RAY_ENVIRONMENT if name.startswith("RAY_SERVE_")]
    assert [name for name in names if f'"{name}"' not in read] == []
